"""The kinds of models that can be served, and how a directory says which it is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from guard.errors import CheckpointError
from guard.model.checkpoint import MANIFEST, Kind, read_config, read_kind
from guard.model.llama_guard import LlamaGuard, is_llama_guard
from guard.model.remote import RemoteGuard
from guard.model.turn_classifier import TurnClassifier
from guard.settings import Settings
from guard.types import Conversation, Described, LongInput, ModelInfo, Scores, Tokens


class Classifier(Protocol):
    """A model that reads conversations. `score` is never called twice at a time."""

    info: ModelInfo

    def tokenise(
        self, conversation: Conversation, long_input: LongInput = "head-tail", asked: tuple[Described, ...] = ()
    ) -> tuple[Tokens, ...]: ...

    def token_ends(self, text: str) -> list[int]: ...

    def score(self, batch: Sequence[Tokens]) -> list[tuple[Scores, ...]]: ...


def _turn_classifier(settings: Settings) -> Classifier:
    return TurnClassifier(settings.model, settings.device, settings.dtype, settings.threads)


def _llama_guard(settings: Settings) -> Classifier:
    if settings.endpoint:
        return RemoteGuard(settings.model, settings.endpoint, settings.endpoint_model, settings.ask)
    return LlamaGuard(settings.model, settings.device, settings.dtype, settings.threads, settings.ask)


# Checkpoints that are no Llamas (ShieldGemma, Qwen3Guard) would be further kinds.
_LOADERS: Mapping[Kind, Callable[[Settings], Classifier]] = MappingProxyType(
    {"turn-classifier": _turn_classifier, "llama-guard": _llama_guard}
)


def kind_of(path: Path) -> Kind:
    """What guard.json of a directory says; or what config.json and the chat template do, as Hugging Face has them.

    Raises CheckpointError for a directory of no known kind.
    """
    said = read_kind(path)
    if said is not None:
        found = next((kind for kind in _LOADERS if kind == said), None)
        if found is None:
            raise CheckpointError(f"{path / MANIFEST}: kind: expected {' or '.join(_LOADERS)}, found {said!r}")
        return found
    config = read_config(path)
    if not is_llama_guard(path):
        which = ", ".join(config.get("architectures") or [str(config.get("model_type"))])
        raise CheckpointError(
            f"{path}: expected a model of Guard ({MANIFEST}) or a Llama Guard checkpoint, found {which} "
            "whose chat template has no UNSAFE CONTENT CATEGORIES"
        )
    return "llama-guard"


def load_classifier(settings: Settings) -> Classifier:
    """The model of the settings. Raises CheckpointError where it cannot be served."""
    kind = kind_of(settings.model)
    if settings.endpoint and kind != "llama-guard":
        raise CheckpointError(f"{settings.model}: only a Llama Guard checkpoint can be served by an endpoint")
    return _LOADERS[kind](settings)
