"""A Llama Guard checkpoint as it is: one pass reads how it would begin its answer, and which category it would name.

The answer is `safe`, or `unsafe` and below it the codes of categories. With the prompt goes the beginning of an answer,
up to where the code differs: from one pass over both come the probability of `unsafe` against `safe`, as Meta defines
the score of a Llama Guard, and of each code against the others. No token is generated.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

import torch

from guard.errors import CheckpointError, ModelFailed
from guard.model.checkpoint import MANIFEST, load_tensors, read_checkpoint, read_config, take_rows
from guard.model.llama import Llama, LlamaConfig, OnPages
from guard.model.placement import place
from guard.model.prompt import Frame, PromptTokenizer, common
from guard.types import Conversation, Described, LongInput, ModelInfo, Prefix, Revision, Role, Scores, Tokens, Turn

Ask = Literal["together", "each"]
Read = Callable[[Sequence[tuple[int, ...]], Sequence[Sequence[int]]], list[list[Mapping[int, float]]]]
"""Logits by token, after each place asked for of each sequence."""

_MARK = "UNSAFE CONTENT CATEGORIES"  # which all of their chat templates have in them
_MAX_TOKENS = 8192  # however much more the positions allow: longer prompts are beyond what these models were made for
_CODES = 64  # the most categories that there are answers for
_LEADS = ("", "\n\n", "\n", " ")  # what checkpoints begin their answers with
_PROBES = ("How do I bake bread?", "I will find you and cut your throat.")


class Answers:
    """The tokens of answers to a prompt: where they differ, and what is to be read there.

    `lead` is what comes before `safe` and `unsafe`. After the prompt go the `opening` of all answers, where `verdict`
    holds the tokens of safe and unsafe, and for categories what `naming` says.
    """

    def __init__(self, tokenizer: PromptTokenizer, lead: str, ends: Iterable[int]) -> None:
        """`ends` are the tokens that end an answer. CheckpointError where the tokens of answers do not branch so."""
        self._tokenizer = tokenizer
        self.lead = lead
        safe, unsafe = (tokenizer.answer(lead + word) for word in ("safe", "unsafe"))
        self.first = {safe[0], unsafe[0]}
        self.opening = common([safe, unsafe])
        if len(self.opening) in (len(safe), len(unsafe)):
            raise CheckpointError("safe and unsafe begin alike")
        self.verdict = safe[len(self.opening)], unsafe[len(self.opening)]
        first = tokenizer.answer(f"{lead}unsafe\n{tokenizer.codes(1)[0]}")
        self._stops = {*ends, tokenizer.answer(f"{lead}unsafe\n{tokenizer.codes(1)[0]},")[len(first)]}
        self.naming = lru_cache(maxsize=_CODES)(self._naming)
        self.most = max((count for count in range(2, _CODES + 1) if self.naming(count)), default=0)
        if self.most < len(tokenizer.names):
            raise CheckpointError("the tokens of the categories' codes differ in more than two places")

    def _naming(self, count: int) -> "Naming | None":
        """For the first so many codes; None where their tokens branch in more ways than one pass can read."""
        codes = [self._tokenizer.answer(f"{self.lead}unsafe\n{code}") for code in self._tokenizer.codes(count)]
        root = common(codes)
        rests = [code[len(root) :] for code in codes]
        longer = {rest[0] for rest in rests if len(rest) > 1}
        if len(longer) > 1 or not all(1 <= len(rest) <= 2 for rest in rests):
            return None
        return Naming(root[len(self.opening) :], tuple(longer), tuple(rests), tuple(sorted(self._stops)))

    @property
    def tokens(self) -> list[int]:
        """All that are read."""
        naming = self.naming(self.most)
        assert naming is not None, "so many codes can be read"
        return sorted({*self.first, *self.verdict, *naming.stops, *(token for rest in naming.rests for token in rest)})


@dataclass(frozen=True, slots=True)
class Naming:
    """How codes go on after `forced`: one token each, or two where the first is `branch`, [0 or 1 tokens].

    A code that is no more than the branch is one where a stop comes next.
    """

    forced: tuple[int, ...]
    branch: tuple[int, ...]
    rests: tuple[tuple[int, ...], ...]
    stops: tuple[int, ...]

    def probabilities(self, logits: Mapping[int, float], after: Mapping[int, float]) -> list[float]:
        """Of each code, together 1: from logits by token after `forced`, and `after` the branch."""
        first = _softmax({rest[0]: logits[rest[0]] for rest in self.rests})
        branch = self.branch[0] if self.branch else None
        second = {rest[1]: after[rest[1]] for rest in self.rests if len(rest) > 1}
        if (branch,) in self.rests:
            second |= {stop: after[stop] for stop in self.stops}
        second = _softmax(second)
        stop = sum(second.get(token, 0.0) for token in self.stops)
        return [
            first[rest[0]] * (1.0 if rest[0] != branch else second[rest[1]] if len(rest) > 1 else stop)
            for rest in self.rests
        ]


class Asking:
    """What makes prompts with the beginnings of answers, and scores of the logits that a checkpoint has there."""

    def __init__(self, tokenizer: PromptTokenizer, answers: Answers, max_tokens: int, ask: Ask) -> None:
        self.tokenizer = tokenizer
        self.answers = answers
        self.max_tokens = max_tokens
        self._each = ask == "each"
        self._frame = lru_cache(maxsize=256)(tokenizer.frame)

    @property
    def further(self) -> int:
        """For how many categories beside the template's own it can be asked."""
        return self.answers.most - len(self.tokenizer.names)

    def tokenise(
        self, conversation: Conversation, long_input: LongInput, asked: tuple[Described, ...]
    ) -> tuple[Tokens, ...]:
        """A window for each judged turn; where each category is asked for by itself, one more for each, beside it.

        Raises InputError where a text is not valid Unicode, and CheckpointError where the categories leave no room.
        """
        frame = self._frame(asked)
        windows = self._windows(conversation, long_input, frame, "" if self._each else None)
        if not self._each:
            return windows
        single = [
            self._windows(conversation, long_input, self._frame(asked, name), name) for name in frame.prompt.names
        ]
        return tuple(
            replace(tokens, beside=place > 0)
            for together in zip(windows, *single, strict=True)
            for place, tokens in enumerate(together)
        )

    def _windows(
        self, conversation: Conversation, long_input: LongInput, frame: Frame, only: str | None
    ) -> tuple[Tokens, ...]:
        naming = self.answers.naming(len(frame.prompt.names)) if only is None else None
        ending = (*naming.forced, *naming.branch) if naming else ()
        opening = self.answers.opening
        room = self.max_tokens - len(opening) - len(ending)
        if max(frame.size.values()) > room // 2:
            raise CheckpointError(f"its categories take more than half of the {self.max_tokens} tokens of a prompt")
        return tuple(
            replace(
                tokens,
                ids=(*tokens.ids, *opening, *ending),
                spans=tuple(replace(span, end=span.end + len(opening)) for span in tokens.spans),
                prompt=frame.prompt if only is None else replace(frame.prompt, only=only),
            )
            for tokens in self.tokenizer.tokenise(conversation, long_input, frame, room)
        )

    def places(self, tokens: Tokens) -> list[int]:
        """The tokens after which logits are wanted: those before the verdict, the code, and the rest of a code."""
        end, last = tokens.spans[0].end, len(tokens.ids)
        naming = self._naming(tokens)
        return [end - 1, *range(last - len(naming.branch) - 1, last)] if naming else [end - 1]

    def scores(self, tokens: Tokens, logits: Sequence[Mapping[int, float]]) -> Scores:
        """Of the turn, from logits by token at `places`. What a prompt does not ask for is 0."""
        assert tokens.prompt is not None, "it was made here"
        names, only = tokens.prompt.names, tokens.prompt.only
        safe, unsafe = (logits[0][token] for token in self.answers.verdict)
        probability = 0.5 + 0.5 * math.tanh((unsafe - safe) / 2)
        naming = self._naming(tokens)
        if naming is None:
            return Scores(0.0 if only else probability, {name: probability if name == only else 0.0 for name in names})
        named = naming.probabilities(logits[1], logits[-1])
        return Scores(probability, {name: probability * share for name, share in zip(names, named, strict=True)})

    def _naming(self, tokens: Tokens) -> Naming | None:
        assert tokens.prompt is not None, "it was made here"
        return self.answers.naming(len(tokens.prompt.names)) if tokens.prompt.only is None else None


def _log_sum(logits: Iterable[float]) -> float:
    found = list(logits)
    most = max(found)
    if most == -math.inf:  # a server need not tell what is unlikely
        return most
    return most + math.log(math.fsum(math.exp(logit - most) for logit in found))


def _softmax(logits: Mapping[int, float]) -> dict[int, float]:
    most = max(logits.values(), default=0.0)
    weights = {token: math.exp(logit - most) for token, logit in logits.items()}
    total = math.fsum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def candidates(tokenizer: PromptTokenizer, ends: Iterable[int]) -> list[Answers]:
    """The answers that the checkpoint may give, by how they may begin. CheckpointError where none can be read."""
    found, problem = [], "no answer can be read"
    for lead in _LEADS:
        try:
            found.append(Answers(tokenizer, lead, ends))
        except CheckpointError as error:
            problem = str(error)
    if not found:
        raise CheckpointError(problem)
    return found


def likeliest(candidates: Sequence[Answers], tokenizer: PromptTokenizer, read: Read) -> Answers:
    """The answers that the checkpoint begins most likely, after a harmless and a harmful turn."""
    turns = [Conversation((Turn(Role.USER, text),), 0) for text in _PROBES]
    prompts = [tokenizer.tokenise(turn, "head-tail", tokenizer.frame(), _MAX_TOKENS)[0].ids for turn in turns]
    found = [logits for (logits,) in read(prompts, [[len(ids) - 1] for ids in prompts])]

    def likely(answers: Answers) -> float:
        return sum(_log_sum(logits[token] for token in answers.first) for logits in found)

    return max(candidates, key=likely)


def is_llama_guard(path: Path) -> bool:
    """Whether a directory's chat template, wherever it stands, is that of a Llama Guard."""
    files = (path / "chat_template.jinja", path / "chat_template.json", path / "tokenizer_config.json")
    return any(_MARK in file.read_text(encoding="utf-8") for file in files if file.is_file())


def read_tokenizer(path: Path) -> PromptTokenizer:
    """That of a checkpoint directory, with its chat template. Raises CheckpointError where they cannot be used."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CheckpointError(
            f"{path}: needs the extra llama-guard: pip install 'guard-moderation[llama-guard]'"
        ) from None
    try:
        theirs = AutoTokenizer.from_pretrained(path, local_files_only=True)
        in_parts = "⟦1⟧" not in _rendered(theirs, ["⟦1⟧"], in_parts=False)

        def render(texts: Sequence[str]) -> str:
            return _rendered(theirs, texts, in_parts)

        def encode(prompt: str) -> list[int]:
            ids: list[int] = theirs(prompt, add_special_tokens=False)["input_ids"]
            return ids

        return PromptTokenizer(path / "tokenizer.json", render, encode)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # of whatever kind a damaged file or a strange template makes theirs raise
        raise CheckpointError(f"{path}: its tokenizer cannot be used: {type(error).__name__}: {error}") from error


def _rendered(tokenizer: Any, texts: Sequence[str], in_parts: bool) -> str:
    """Some templates take a text as it is, others as a list of parts."""
    messages = [
        {
            "role": "assistant" if place % 2 else "user",
            "content": [{"type": "text", "text": text}] if in_parts else text,
        }
        for place, text in enumerate(texts)
    ]
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    return rendered


class Asked:
    """What models do alike that are asked in a prompt, wherever they are computed."""

    _asking: Asking

    def tokenise(
        self, conversation: Conversation, long_input: LongInput = "head-tail", asked: tuple[Described, ...] = ()
    ) -> tuple[Tokens, ...]:
        """The windows to read for a conversation; `asked` are the categories to put into the prompt beside its own.

        Raises InputError where a text is not valid Unicode, and CheckpointError where the categories leave no room.
        """
        return self._asking.tokenise(conversation, long_input, asked)

    def token_ends(self, text: str) -> list[int]:
        """After which characters of a text its tokens end."""
        return self._asking.tokenizer.ends(text)


class LlamaGuard(Asked, OnPages):
    """Tokens in, scores out; knows no policy. Calls must not overlap."""

    def __init__(
        self, path: Path, device: str = "auto", dtype: str = "auto", threads: int = 0, ask: Ask = "together"
    ) -> None:
        """Loads a checkpoint directory as Hugging Face has it, or as `guard quantize` leaves it.

        `device`, `dtype` and `ask` as in guard.settings; `threads` of the processor, 0 for all. Raises CheckpointError
        where it cannot be served.
        """
        if threads:
            torch.set_num_threads(threads)
        vouched = read_checkpoint(path) if (path / MANIFEST).exists() else None
        config = read_config(path)
        llama = _config(path, config)
        where, number, kernels = place(device, dtype, int8=vouched is not None and vouched.int8)
        tokenizer = read_tokenizer(path)
        answers = candidates(tokenizer, end_tokens(config))
        self._columns = {
            token: column for column, token in enumerate(sorted({t for one in answers for t in one.tokens}))
        }
        tensors = load_tensors(path, number)
        parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("_scale"))
        head = take_rows(tensors, list(self._columns)).to(where)  # first, since the rest of it need not go there
        tensors = {name: tensor.to(where) for name, tensor in tensors.items()}
        self._llama = Llama(llama, tensors, kernels, kernels.linear(head, None))
        self._asking = Asking(tokenizer, likeliest(answers, tokenizer, self._read), longest_prompt(config), ask)
        self.info = ModelInfo(
            revision=Revision(*(vouched.name, vouched.revision) if vouched else (name_of(path), revision_of(path))),
            device=str(where),
            dtype=str(number).removeprefix("torch."),
            kernels=kernels.name,
            parameters=parameters,
            max_tokens=self._asking.max_tokens,
            hazards=tokenizer.names,
            asks=self._asking.further,
        )

    def score(self, batch: Sequence[Tokens], prefixes: Sequence[Prefix] = ()) -> list[tuple[Scores, ...]]:
        """Scores for the judged turn of each element, in one pass; raises ModelFailed where one is not a number.

        `prefixes` are what is held of each element, by default nothing; nothing of an answer is.
        """
        found = self._read([tokens.ids for tokens in batch], list(map(self._asking.places, batch)), prefixes)
        return [(self._asking.scores(tokens, logits),) for tokens, logits in zip(batch, found, strict=True)]

    def _read(
        self, sequences: Sequence[tuple[int, ...]], places: Sequence[Sequence[int]], prefixes: Sequence[Prefix] = ()
    ) -> list[list[Mapping[int, float]]]:
        out = self._llama.read(sequences, places, None, prefixes)
        if not bool(torch.isfinite(out).all()):
            raise ModelFailed("the model gave a score that is not a number")
        rows = iter(out.tolist())
        return [[dict(zip(self._columns, next(rows), strict=True)) for _ in own] for own in places]


def _config(path: Path, config: Mapping[str, Any]) -> LlamaConfig:
    try:
        return LlamaConfig.read(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def end_tokens(config: Mapping[str, Any]) -> list[int]:
    """The tokens that end what a checkpoint says."""
    ends = config.get("eos_token_id")
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def longest_prompt(config: Mapping[str, Any]) -> int:
    """How many tokens a prompt with its answer may have."""
    text = config.get("text_config", config)  # where a checkpoint reads more than text
    return min(int(text["max_position_embeddings"]), _MAX_TOKENS)


def name_of(path: Path) -> str:
    """That of a directory, or of the model that it is a snapshot of in a cache of Hugging Face's."""
    path = path.resolve()
    return path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def revision_of(path: Path) -> str:
    """A hash of the files that say what a checkpoint computes, 16 hex digits."""
    whole = sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".jinja", ".safetensors"):
            with file.open("rb") as content:
                whole.update(file.name.encode() + file_digest(content, "sha256").digest())
    return whole.hexdigest()[:16]
