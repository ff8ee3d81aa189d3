"""The embedded classifier: a Llama with one linear head, read at the end token of each judged turn."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from guard.errors import CheckpointError, ModelFailed
from guard.model.chat import ChatTokenizer
from guard.model.checkpoint import load_tensors, read_checkpoint
from guard.model.kernels import fastest
from guard.model.llama import Llama, LlamaConfig
from guard.types import Conversation, ModelInfo, Revision, Scores, Tokens


class TurnClassifier:
    """Tokens in, calibrated scores out; knows no policy. Calls must not overlap."""

    def __init__(self, path: Path, device: str = "auto", dtype: str = "auto", threads: int = 0) -> None:
        """Loads and verifies a Guard model directory; raises CheckpointError where it cannot be served.

        `device` and `dtype` as in guard.settings; `threads` of the processor, 0 for all.
        """
        if threads:
            torch.set_num_threads(threads)
        checkpoint = read_checkpoint(path)
        place = _pick_device(device)
        number = _pick_dtype(dtype, place)
        kernels = fastest(place)
        tensors = {name: tensor.to(place) for name, tensor in load_tensors(path, number).items()}
        parameters = sum(tensor.numel() for tensor in tensors.values())
        try:
            head = kernels.linear(tensors.pop("score.weight"), tensors.pop("score.bias"))
        except KeyError as error:
            raise CheckpointError(f"{path}: there is no tensor {error}") from None
        self._llama = Llama(LlamaConfig.read(checkpoint.config), tensors, kernels, head)
        self._calibration = [checkpoint.calibration[output] for output in ("unsafe", *checkpoint.hazards)]
        self._tokenizer = ChatTokenizer(path / "tokenizer.json", checkpoint.max_tokens)
        self.info = ModelInfo(
            revision=Revision(checkpoint.name, checkpoint.revision),
            device=str(place),
            dtype=str(number).removeprefix("torch."),
            kernels=kernels.name,
            parameters=parameters,
            max_tokens=checkpoint.max_tokens,
            hazards=checkpoint.hazards,
        )

    def tokenise(self, conversation: Conversation) -> tuple[Tokens, ...]:
        """The windows to read for a conversation; raises InputError where a text is not valid Unicode."""
        return self._tokenizer.tokenise(conversation)

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]:
        """Scores for each span of each element, in one pass; raises ModelFailed where a score is not a number."""
        reads = [[span.end - 1 for span in tokens.spans] for tokens in batch]
        logits = self._llama.read([tokens.ids for tokens in batch], reads)  # [sum of spans, outputs]
        if not bool(torch.isfinite(logits).all()):
            raise ModelFailed("the model gave a score that is not a number")
        rows = iter(logits.tolist())
        return [tuple(self._scores(next(rows)) for _ in row) for row in reads]

    def _scores(self, logits: Sequence[float]) -> Scores:
        # One by one: a vectorised sigmoid treats the last few elements of an array differently, in their last bit.
        unsafe, *hazards = (
            0.5 + 0.5 * math.tanh((slope * logit + offset) / 2)
            for logit, (slope, offset) in zip(logits, self._calibration, strict=True)
        )
        return Scores(unsafe=unsafe, hazards=dict(zip(self.info.hazards, hazards, strict=True)))


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or no such device on this machine
        raise CheckpointError(f"device {name!r} cannot be used here") from error
    return device


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where products of it are fast: CUDA, and CPUs with AMX. Elsewhere float32 is up to twice as fast."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.bfloat16
    return torch.float32
