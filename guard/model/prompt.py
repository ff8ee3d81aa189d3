"""Conversation to tokens for a Llama Guard checkpoint: its own template, out of which no text can break."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, takewhile
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from guard.errors import CheckpointError, InputError
from guard.types import Conversation, Coverage, Described, LongInput, Prompt, Role, Span, Tokens

Side = Literal["user", "assistant"]  # as chat templates call those that speak
Render = Callable[[Sequence[str]], str]
"""A prompt, as a checkpoint has it, around texts that a user and an assistant say in turn."""
_Said = tuple[Role, str]

_OVERLAP = 4  # a part of a long turn shares a quarter with the next one
_SLACK = 8  # tokens by which texts may count more together than one by one
_BLOCK = re.compile(r"(?<=<BEGIN UNSAFE CONTENT CATEGORIES>\n).*?(?=<END UNSAFE CONTENT CATEGORIES>)", re.DOTALL)
_ENTRY = re.compile(r"^([A-Z]\d+): (.+)\n(?:(?![A-Z]\d+: ).*\n)*", re.MULTILINE)
_BRACKETED = re.compile(r"[<\[](/?[A-Z]+(?: [A-Z]+)*)[>\]]")
_TITLES = {
    "violent-crimes": "S1",
    "non-violent-crimes": "S2",
    "sex-crimes": "S3",
    "sex-related-crimes": "S3",
    "child-exploitation": "S4",
    "child-sexual-exploitation": "S4",
    "defamation": "S5",
    "specialized-advice": "S6",
    "privacy": "S7",
    "intellectual-property": "S8",
    "indiscriminate-weapons": "S9",
    "hate": "S10",
    "self-harm": "S11",
    "suicide-self-harm": "S11",
    "suicide-and-self-harm": "S11",
    "sexual-content": "S12",
    "elections": "S13",
    "code-interpreter-abuse": "S14",
}
"""Categories of the checkpoints, by title, to hazards of the taxonomy. Their codes differ from one to the next."""


class Template:
    """What a chat template puts before, between and after texts: found by rendering some, and held against others."""

    def __init__(self, render: Render) -> None:
        """Raises CheckpointError for a template that does more to texts than to strip them and put words around."""
        marks = ["⟦1⟧", "⟦2⟧", "⟦3⟧"]
        one, two, three = (_split(render(marks[:count]), marks[:count]) for count in (1, 2, 3))
        self.before: Mapping[Side, str] = {"user": one[0], "assistant": two[0]}
        self.between: Mapping[Side, str] = {"assistant": three[1], "user": three[2]}
        self.after: Mapping[Side, str] = {"user": one[-1], "assistant": two[-1]}
        self._strips = render([f" {marks[0]} "]) == render(marks[:1])
        probe = ["a\n", " b\n\nc", "⟦4⟧", "", "e"]
        for count in range(1, len(probe) + 1):
            if render(probe[:count]) != "".join(self.pieces(probe[:count], self.before)):
                raise CheckpointError("the chat template does more to a text than to put words around it")
        words = "".join(chain(self.before.values(), self.between.values(), self.after.values()))
        names = {r"\s+".join(map(re.escape, name.split())) for name in _BRACKETED.findall(words)}
        labels = {re.escape(text.rpartition("\n")[2].strip(" :")) for text in self.between.values()} - {""}
        bracketed = rf"(?P<open>[<\[])(?=\s*(?:{_either(names)})\s*[>\]])"
        label = rf"^(?P<gap>\s*)(?P<label>{_either(labels)})(?=\s*:)"
        self._delimiter = re.compile(rf"{bracketed}|{label}", re.IGNORECASE | re.MULTILINE)

    def pieces(self, texts: Sequence[str], before: Mapping[Side, str]) -> Iterator[str]:
        """The prompt: words of the template and texts by turns. Who says the last of them is judged."""
        judged: Side = "user" if len(texts) % 2 else "assistant"
        yield before[judged]
        for place, text in enumerate(texts):
            if place:
                yield self.between["assistant" if place % 2 else "user"]
            yield text.strip() if self._strips else text
        yield self.after[judged]

    def neutral(self, text: str) -> str:
        """A text in which what delimits the template's parts visibly does not.

        `<END CONVERSATION>` becomes `< END CONVERSATION>`, and `Agent:` at the beginning of a line `"Agent":`.
        """
        return self._delimiter.sub(_opened, text)


def _opened(found: re.Match[str]) -> str:
    return f"{found['open']} " if found["open"] else f'{found["gap"]}"{found["label"]}"'


def _either(patterns: Iterable[str]) -> str:
    return "|".join(sorted(patterns, reverse=True)) or "(?!)"  # which matches nothing


def _split(rendered: str, marks: Sequence[str]) -> list[str]:
    parts = re.split(_either(map(re.escape, marks)), rendered)
    if len(parts) != len(marks) + 1:
        raise CheckpointError("the chat template does not say every text once")
    return parts


@dataclass(frozen=True, slots=True)
class Frame:
    """The words before the first text, by whose turn is judged, with the categories of a prompt in them.

    So many of their tokens are `shared` by all prompts of the frame, and so many has one whose texts are empty.
    """

    prompt: Prompt
    before: Mapping[Side, str]
    shared: Mapping[Side, int]
    size: Mapping[Side, int]


class PromptTokenizer:
    """Renders conversations as a checkpoint's chat template does, with further categories put in.

    Each judged turn has a prompt of its own, at whose end the checkpoint answers. Turns of agents are an agent's, all
    others a user's; where two of one side follow each other, an empty one stands between them.
    """

    def __init__(self, tokenizer_json: Path, render: Render, encode: Callable[[str], list[int]]) -> None:
        """`encode` is how the checkpoint's own tokenizer reads a rendered prompt.

        Raises CheckpointError where the template names no categories, or the two disagree on a prompt.
        """
        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        self._tokenizer.encode_special_tokens = True  # means: encode their text like any other text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        self._specials = re.compile(f"({_either(map(re.escape, self._special))})")
        self.template = Template(render)
        block = _BLOCK.search(self.template.before["user"])
        entries = list(_ENTRY.finditer(block[0])) if block else []
        if not entries:
            raise CheckpointError("the chat template names no categories")
        self.names = tuple(_name(entry[2]) for entry in entries)
        self._codes = [entry[1] for entry in entries]
        self._entries = [entry[0] for entry in entries]
        self._after = {side: len(self._encode([words])) for side, words in self.template.after.items()}
        self._gap = 2 * max(len(self._encode([words])) for words in self.template.between.values())  # with an empty one
        texts = ["Is this read alike?", "It is.\n\nÄ 12,345", "Good!"]
        for count in range(1, len(texts) + 1):
            if self._prompt(texts[:count], self.template.before) != encode(render(texts[:count])):
                raise CheckpointError("tokenizer.json does not read a prompt as the checkpoint's tokenizer does")

    def codes(self, count: int) -> tuple[str, ...]:
        """Those of the template's own categories, then those that follow on."""
        letter, last = self._codes[-1][0], int(self._codes[-1][1:])
        return (*self._codes[:count], *(f"{letter}{last + more}" for more in range(1, count - len(self._codes) + 1)))

    def frame(self, asked: tuple[Described, ...] = (), only: str | None = None) -> Frame:
        """The prompt with further categories; or with `only` one of them all, by name."""
        names = (*self.names, *(one.name for one in asked))
        further = self.codes(len(names))[len(self.names) :]
        entries = [*self._entries, *(self._entry(code, one) for code, one in zip(further, asked, strict=True))]
        block = "".join(entry for name, entry in zip(names, entries, strict=True) if only in (None, name))
        before = {side: _BLOCK.sub(lambda _: block, words, count=1) for side, words in self.template.before.items()}
        words = [*before.values(), *self.template.between.values(), *self.template.after.values()]
        return Frame(
            Prompt(sha256("\0".join(words).encode()).hexdigest()[:16], names),
            before,
            shared={"user": self._shared(before, []), "assistant": self._shared(before, [""])},
            size={"user": len(self._prompt([""], before)), "assistant": len(self._prompt(["", ""], before))},
        )

    def answer(self, text: str) -> tuple[int, ...]:
        """The tokens of what a checkpoint answers to a prompt. CheckpointError where they hang on the prompt's end."""
        end = self._specials.split(self.template.after["user"])[-1]
        before, after = self._encode([end]), self._encode([end + text])
        if after[: len(before)] != before:
            raise CheckpointError("the tokens of an answer hang on the end of the prompt")
        return tuple(after[len(before) :])

    def tokenise(self, conversation: Conversation, long_input: LongInput, frame: Frame, room: int) -> list[Tokens]:
        """A prompt for every judged turn, of at most `room` tokens; for `window` also those of its parts.

        What does not fit is left out: the oldest turns first, then the middle of the judged turn. The coverage counts
        tokens of turns, and of what the template has between them. Raises InputError where a text is not valid Unicode.
        """
        turns = [(turn.role, self._text(place, turn.text)) for place, turn in enumerate(conversation.turns)]
        judged = range(len(turns)) if conversation.target is None else (conversation.target,)
        return [tokens for place in judged for tokens in self._windows(turns[: place + 1], long_input, frame, room)]

    def text(self, token: int) -> str:
        """What a token says."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def ends(self, text: str) -> list[int]:
        """After which characters of a text its tokens end; a character of several tokens counts once."""
        return sorted({end for _, end in self._offsets(text)})

    def _windows(self, turns: Sequence[_Said], long_input: LongInput, frame: Frame, room: int) -> Iterator[Tokens]:
        """Those of the last of the turns."""
        place, (role, text) = len(turns) - 1, turns[-1]
        side: Side = "assistant" if role is Role.AGENT else "user"

        def window(turns: Sequence[_Said], lost: int = 0) -> Tokens:
            ids = self._prompt(_by_turns(turns), frame.before)
            seen = len(ids) - frame.size[side]
            coverage = Coverage(seen + (lost if long_input == "window" else 0), seen + lost)
            kept = len(ids) - self._after[side] - 1  # what ends a text may go together with what follows
            span = Span(place, role, 0, len(ids), coverage)
            return Tokens(tuple(ids), (span,), kept=kept, shared=frame.shared[side], prompt=frame.prompt)

        whole = window(turns)
        if len(whole.ids) <= room:
            yield whole
            return
        sizes = [len(self._encode(["", own])) + self._gap for _, own in turns]
        free = room - frame.size[side] - _SLACK
        if sizes[-1] <= free:
            first = next(first for first in range(len(turns)) if sum(sizes[first:]) <= free)
            yield window(turns[first:], sum(sizes[:first]))
            return
        ends, free = self._offsets(text), free - self._gap
        lost, half = sum(sizes) - free, free // 2
        yield window([(role, text[: ends[half][0]] + text[ends[half - free][0] :])], lost)
        if long_input == "window":
            step = free - free // _OVERLAP
            for start in range(0, len(ends) - free + step, step):
                part = ends[start : start + free]
                yield window([(role, text[part[0][0] : part[-1][1]])], lost)

    def _text(self, place: int, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"turns[{place}].text", "is not valid Unicode (it holds a lone surrogate)") from None
        return self.template.neutral(text)

    def _entry(self, code: str, one: Described) -> str:
        """A category in the words of its author, written as the template's own are."""
        lines = [f"{code}: {self._line(one.title).rstrip('.')}."]
        if one.definition:
            lines.append(self._line(one.definition))
        for belongs, heading in ((True, "Examples of it:"), (False, "Not of it:")):
            examples = [f"- {self._line(text)}" for text, label in one.examples if label == belongs]
            lines += [heading, *examples] if examples else []
        return "".join(f"{line}\n" for line in lines)

    def _line(self, text: str) -> str:
        """A text on a line of a prompt's own words, where it is to have no special tokens either."""
        plain = self._specials.sub(lambda found: f"{found[0][0]} {found[0][1:]}", " ".join(text.split()))
        return self.template.neutral(plain)

    def _shared(self, before: Mapping[Side, str], earlier: list[str]) -> int:
        first = [self._prompt([text, *earlier], before) for text in ("a", "1", ".", "\nÄ")]
        return len(common(first))

    def _prompt(self, texts: Sequence[str], before: Mapping[Side, str]) -> list[int]:
        return self._encode(list(self.template.pieces(texts, before)))

    def _encode(self, pieces: Sequence[str]) -> list[int]:
        """Tokens of pieces in one, every other of which, from the first on, is of the template: these have specials."""
        chunks, specials = [""], list[int]()
        for place, piece in enumerate(pieces):
            first, *rest = [piece] if place % 2 else self._specials.split(piece)
            chunks[-1] += first
            specials += (self._special[special] for special in rest[::2])
            chunks += rest[1::2]
        # As a batch, since for that the tokenizer lets other threads run meanwhile.
        encodings = self._tokenizer.encode_batch_fast(chunks, add_special_tokens=False)
        ids = list(encodings[0].ids)
        for special, encoding in zip(specials, encodings[1:], strict=True):
            ids += [special, *encoding.ids]
        return ids

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets


def common(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What they all begin with."""
    return tuple(alike[0] for alike in takewhile(lambda alike: len(set(alike)) == 1, zip(*sequences, strict=False)))


def _name(title: str) -> str:
    """A hazard of the taxonomy, or a name made of the title."""
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return _TITLES.get(words, words)


def _by_turns(turns: Sequence[_Said]) -> list[str]:
    """Texts of a user and an agent by turns."""
    said = list[str]()
    for role, text in turns:
        if (role is Role.AGENT) != (len(said) % 2 == 1):
            said.append("")
        said.append(text)
    return said
