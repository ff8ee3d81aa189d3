"""The embedded classifier: a Llama with one linear head, read at the end token of each judged turn."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from guard.errors import CheckpointError, ModelFailed
from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import load_tensors, read_checkpoint
from guard.model.kernels import Linear, Rows
from guard.model.llama import Llama, LlamaConfig, OnPages
from guard.model.placement import place
from guard.types import Conversation, Described, Head, LongInput, ModelInfo, Prefix, Revision, Role, Scores, Tokens


class TurnClassifier(OnPages):
    """Tokens in, calibrated scores out; knows no policy. Calls must not overlap."""

    def __init__(self, path: Path, device: str = "auto", dtype: str = "auto", threads: int = 0) -> None:
        """Loads and verifies a Guard model directory; raises CheckpointError where it cannot be served.

        `device` and `dtype` as in guard.settings; `threads` of the processor, 0 for all.
        """
        if threads:
            torch.set_num_threads(threads)
        checkpoint = read_checkpoint(path)
        where, number, kernels = place(device, dtype, int8=checkpoint.int8)
        tensors = {name: tensor.to(where) for name, tensor in load_tensors(path, number).items()}
        parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("_scale"))
        try:
            head = kernels.linear(tensors.pop("score.weight"), tensors.pop("score.bias"))
        except KeyError as error:
            raise CheckpointError(f"{path}: there is no tensor {error}") from None
        self._outputs = 1 + len(checkpoint.hazards)
        self._llama = Llama(LlamaConfig.read(checkpoint.config), tensors, kernels, _and_hidden(head))
        self._calibration = {
            role: [fits[output] for output in ("unsafe", *checkpoint.hazards)]
            for role, fits in checkpoint.calibration.items()
        }
        self._tokenizer = ChatTokenizer(path / "tokenizer.json", checkpoint.max_tokens)
        self.info = ModelInfo(
            revision=Revision(checkpoint.name, checkpoint.revision),
            device=str(where),
            dtype=str(number).removeprefix("torch."),
            kernels=kernels.name,
            parameters=parameters,
            max_tokens=checkpoint.max_tokens,
            hazards=checkpoint.hazards,
        )

    def tokenise(
        self, conversation: Conversation, long_input: LongInput = "head-tail", asked: tuple[Described, ...] = ()
    ) -> tuple[Tokens, ...]:
        """The windows to read for a conversation; raises InputError where a text is not valid Unicode.

        It can be `asked` for nothing.
        """
        return self._tokenizer.tokenise(conversation, long_input)

    def token_ends(self, text: str) -> list[int]:
        """After which characters of a text its tokens end."""
        return self._tokenizer.ends(text)

    def score(self, batch: Sequence[Tokens], prefixes: Sequence[Prefix] = ()) -> list[tuple[Scores, ...]]:
        """Scores for each span of each element, in one pass; raises ModelFailed where a score is not a number.

        `prefixes` are what is held of each element, by default nothing; the end of no span is.
        """
        reads = [[span.end - 1 for span in tokens.spans] for tokens in batch]
        asked = {tokens.heads for tokens in batch}
        columns = None if any(asked) else self._outputs
        out = self._llama.read([tokens.ids for tokens in batch], reads, columns, prefixes)
        if not bool(torch.isfinite(out).all()):
            raise ModelFailed("the model gave a score that is not a number")
        logits, hidden = out[:, : self._outputs].tolist(), out[:, self._outputs :]  # [sum of spans, …]
        added = {heads: _logits(heads, hidden) if heads else [()] * len(logits) for heads in asked}
        rows = count()
        return [
            tuple(
                self._scores(logits[row], span.role, tokens.heads, added[tokens.heads][row])
                for span, row in zip(tokens.spans, rows, strict=False)
            )
            for tokens in batch
        ]

    def _scores(self, logits: Sequence[float], role: Role, heads: Sequence[Head], added: Sequence[float]) -> Scores:
        fits = self._calibration.get(role) or self._calibration[Role.USER]
        unsafe, *hazards = (
            _sigmoid(slope * logit + offset) for logit, (slope, offset) in zip(logits, fits, strict=True)
        )
        scores = dict(zip(self.info.hazards, hazards, strict=True))
        for head, logit in zip(heads, added, strict=True):
            scores[head.name] = _sigmoid(logit)
        return Scores(unsafe, scores)


def _and_hidden(head: Linear) -> Linear:
    """Beside the outputs what they are made of: hidden states [rows, hidden] to [rows, outputs + hidden]."""

    def both(hidden: Rows) -> Rows:
        outputs = head(hidden)
        assert isinstance(outputs, Tensor), "float32 stays float32"
        assert isinstance(hidden, Tensor), "float32 stays float32"
        return torch.cat([outputs, hidden], 1)

    return both


def _logits(heads: tuple[Head, ...], hidden: Tensor) -> list[list[float]]:
    """[rows, heads] of hidden states [rows, hidden].

    Summed in float64 and rounded to float32, so that a score hangs neither on its neighbours nor on other heads.
    """
    weight, bias = _matrix(heads)
    logits: list[list[float]] = torch.addmm(bias, hidden.double(), weight).float().tolist()
    return logits


@lru_cache(maxsize=4)  # what is in force, and what was until a moment ago
def _matrix(heads: tuple[Head, ...]) -> tuple[Tensor, Tensor]:
    """float64 [hidden, heads] and [heads]."""
    weights = torch.tensor([head.weight for head in heads], dtype=torch.float64)
    return weights.T.contiguous(), torch.tensor([head.bias for head in heads], dtype=torch.float64)


def _sigmoid(logit: float) -> float:
    """One by one: a vectorised one treats the last few elements of an array differently, in their last bit."""
    return 0.5 + 0.5 * math.tanh(logit / 2)
