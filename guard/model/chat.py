"""Conversation to tokens: ChatML whose roles and ends no text can forge."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path

from tokenizers import Tokenizer

from guard.errors import CheckpointError, InputError
from guard.types import Conversation, Coverage, LongInput, Role, Span, Tokens

# Names of roles as SmolLM2 was taught them.
_CHATML = {Role.USER: "user", Role.AGENT: "assistant", Role.SYSTEM: "system", Role.TOOL: "tool"}
_OVERLAP = 4  # a part of a long turn shares a quarter with the next one


class ChatTokenizer:
    """Renders conversations as `<|im_start|>role\\ntext<|im_end|>\\n…`; a turn is scored at its `<|im_end|>`.

    Texts are tokenised by themselves with special tokens off: `<|im_end|>` within a text becomes ordinary tokens.
    """

    def __init__(self, tokenizer_json: Path, max_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        self._tokenizer.encode_special_tokens = True  # means: encode their text like any other text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        start, self._end = ([self._id(token)] for token in ("<|im_start|>", "<|im_end|>"))
        self._headers = {role: start + self._encode(f"{name}\n") for role, name in _CHATML.items()}
        self._gap = self._encode("\n")  # between one turn and the next
        self.max_tokens = max_tokens

    def tokenise(self, conversation: Conversation, long_input: LongInput = "head-tail") -> tuple[Tokens, ...]:
        """The windows to read, each of at most `max_tokens`; every judged turn is scored in one of them.

        There is one window, unless every turn of a conversation longer than `max_tokens` is judged. What does not fit
        is left out, as the coverage tells: the oldest turns first, then the middle of the judged turn itself. For
        `window` further windows follow, with the parts of such turns; nothing of those is left out.
        Raises InputError where a text is not valid Unicode.
        """
        target = conversation.target
        turns = conversation.turns if target is None else conversation.turns[: target + 1]
        whole = [self._block(index, turn.role, turn.text) for index, turn in enumerate(turns)]
        blocks = [self._clip(block) for block in whole]
        gap = len(self._gap)
        totals = [total - gap for total in accumulate(map(len, whole))]  # tokens up to the end token of turn i
        starts = [0, *accumulate(map(len, blocks))]  # turn i, as clipped, stands at starts[i]:starts[i + 1]

        def first_within(turn: int, room: int) -> int:
            """The earliest turn from which on the tokens up to the end of `turn` fit into `room`."""
            return min(turn, bisect_left(starts, starts[turn + 1] - gap - room))

        def window(first: int, judged: Sequence[int]) -> Tokens:
            ids = chain.from_iterable(blocks[first : judged[-1] + 1])
            spans: list[Span] = []
            for turn in judged:
                start, end = starts[turn] - starts[first], starts[turn + 1] - gap - starts[first]
                clipped = len(whole[turn]) - len(blocks[turn])
                seen = end + clipped if long_input == "window" else end
                spans.append(Span(turn, turns[turn].role, start, end, Coverage(seen, totals[turn])))
            return Tokens(tuple(ids)[: spans[-1].end], tuple(spans))

        windows: list[Tokens] = []
        if target is not None:
            windows.append(window(first_within(target, self.max_tokens), (target,)))
        else:
            first, judged = 0, list[int]()
            for turn in range(len(turns)):
                if first_within(turn, self.max_tokens) > first:  # full: the next begins with half of itself as context
                    windows.append(window(first, judged))
                    first, judged = first_within(turn, self.max_tokens // 2), []
                judged.append(turn)
            windows.append(window(first, judged))
        if long_input == "window":
            for span in [span for tokens in windows for span in tokens.spans]:
                if len(blocks[span.turn]) < len(whole[span.turn]):
                    windows += self._parts(whole[span.turn], span)
        return tuple(windows)

    def ends(self, text: str) -> list[int]:
        """After which characters of a text its tokens end; a character of several tokens counts once."""
        return sorted({end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets})

    def _block(self, index: int, role: Role, text: str) -> list[int]:
        try:
            return [*self._headers[role], *self._encode(text), *self._end, *self._gap]
        except TypeError:  # what tokenizers says of a lone surrogate
            raise InputError(f"turns[{index}].text", "is not valid Unicode (it holds a lone surrogate)") from None

    def _clip(self, block: list[int]) -> list[int]:
        """Head and tail of a turn that is too long for any window."""
        room = self.max_tokens + len(self._gap)
        if len(block) <= room:
            return block
        head = room // 2
        return block[:head] + block[head - room :]

    def _parts(self, block: list[int], span: Span) -> Iterator[Tokens]:
        """A turn that is too long for any window in overlapping parts, each rendered as a turn by itself."""
        header = self._headers[span.role]
        text = block[len(header) : -len(self._end + self._gap)]
        room = self.max_tokens - len(header) - len(self._end)
        step = room - room // _OVERLAP
        for start in range(0, len(text) - room + step, step):
            ids = (*header, *text[start : start + room], *self._end)
            yield Tokens(ids, (replace(span, start=0, end=len(ids)),))

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"tokenizer.json: has no token {token}")
        return found

    def _encode(self, text: str) -> list[int]:
        # As a batch of one, since for that the tokenizer lets other threads run meanwhile.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids
