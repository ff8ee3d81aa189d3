"""What policies teach a model: NAME_heads.safetensors beside a policy, with a head for each category that has examples.

Of a category the file holds `<category>.weight`, float32 [hidden], and `<category>.bias`, float32 [1]; and in its
metadata by category, as JSON, the revision of the model that they were fitted to and the SHA-256 of the examples.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from guard.errors import ConfigError, PolicyError
from guard.policy.check import Report
from guard.policy.compile import Policy, unknown_hazards
from guard.policy.document import Read, read_file
from guard.policy.examples import few
from guard.policy.schema import PolicySpec
from guard.types import HAZARDS, Head, ModelInfo

Floats = NDArray[np.floating]


def heads_file(policy: Path) -> Path:
    return policy.with_name(f"{policy.stem}_heads.safetensors")


def make_head(category: str, model: str, examples: str, weight: Floats, bias: float) -> Head:
    """A head, in float32, named after its category and its content: other weights never go by the same name."""
    numbers = *weights, offset = np.append(weight, bias).astype(np.float32).tolist()
    name = f"{category}-{sha256(json.dumps([model, numbers]).encode()).hexdigest()[:8]}"
    return Head(name, model, examples, tuple(weights), offset)


def read_heads(policy: Path, read: Read = read_file) -> dict[str, Head]:
    """The heads beside a policy, by category; none where there is no file. Raises PolicyError for a damaged one."""
    path = heads_file(policy)
    try:
        content = read(path, -1)
        tensors, header = load(content), int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header]).get(
            "__metadata__", {}
        )  # which safetensors reads from files alone
        return {
            category: make_head(
                category,
                str(said["model"]),
                str(said["examples"]),
                _finite(tensors[f"{category}.weight"]),
                float(_finite(tensors[f"{category}.bias"])[0]),
            )
            for category, said in ((name, json.loads(text)) for name, text in metadata.items())
        }
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        raise PolicyError(f"{path}: expected heads as `guard policy fit` writes them, found something else") from None


def write_heads(policy: Path, heads: Mapping[str, Head]) -> None:
    """Raises ConfigError where the file cannot be written."""
    path = heads_file(policy)
    tensors = {f"{category}.weight": np.array(head.weight, np.float32) for category, head in heads.items()}
    tensors |= {f"{category}.bias": np.array([head.bias], np.float32) for category, head in heads.items()}
    said = {name: json.dumps({"model": head.model, "examples": head.examples}) for name, head in heads.items()}
    try:
        path.write_bytes(save(tensors, said))  # save_file would leave it to be read by its owner alone
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def digest(examples: Path, read: Read = read_file) -> str | None:
    """The SHA-256 of a file of examples; None where there is none, as where only what is served was shipped."""
    content = _content(examples, read)
    return None if content is None else sha256(content).hexdigest()


def _content(path: Path, read: Read) -> bytes | None:
    try:
        return read(path, -1)
    except OSError:
        return None


def check_examples(
    policy: PolicySpec, path: Path, to: Report, read: Read
) -> tuple[Mapping[str, Head], Mapping[str, tuple[tuple[str, bool], ...]]]:
    """The heads beside the policy's file, and a few of the examples, by category.

    Reports examples that are missing, and those that no head was fitted from.
    """
    named = {name: category.examples for name, category in policy.categories.items() if category.examples}
    try:
        heads = read_heads(path, read) if named else {}
    except PolicyError as error:
        to.report(("categories", next(iter(named)), "examples"), str(error))
        return {}, {}
    shown = {}
    for name, examples in named.items():
        content, loc, head = _content(path.with_name(examples), read), ("categories", name, "examples"), heads.get(name)
        there = None if content is None else sha256(content).hexdigest()
        shown[name] = few(examples, content or b"")
        if there is None and head is None:
            to.report(loc, f"expected a file beside the policy, found no {examples}")
        elif head is None or there not in (None, head.examples):
            state = "has learned nothing from them yet" if head is None else "has learned from other ones"
            to.warn(loc, f"the model {state}; run: guard policy fit {path}")
    return heads, shown


def check_model(policy: Policy, model: ModelInfo) -> None:
    """Raises PolicyError where a model lacks a hazard that the policy asks for, or has not learned what it teaches.

    One that can be asked lacks nothing that the policy says in words.
    """
    name, revision = model.revision.name, model.revision.revision
    run = f"run: guard policy fit {policy.name}.yaml"
    if model.asks:
        if (further := sum(one.name not in model.hazards for one in policy.described)) > model.asks:
            raise PolicyError(
                f"policy {policy.name}: {name} can be asked for {model.asks} categories beside its own, not {further}"
            )
        if unknown := ", ".join(unknown_hazards(policy, (*HAZARDS, *model.hazards))):
            raise PolicyError(f"policy {policy.name}: {name} does not score {unknown}")
        return
    if asked := ", ".join(category.name for category in policy.categories if category.scoring == "asked"):
        raise PolicyError(f"policy {policy.name}: {name} is no Llama Guard checkpoint, which can be asked for {asked}")
    for category, head in policy.own.items():
        if head is None:
            raise PolicyError(f"policy {policy.name}: no model has learned {category} from its examples yet; {run}")
        if head.model != revision:
            raise PolicyError(
                f"policy {policy.name}: {category} was learned by model {head.model}, which is not {name} {revision}; "
                f"{run}"
            )
    if unknown := ", ".join(unknown_hazards(policy, model.hazards)):
        raise PolicyError(f"policy {policy.name}: {name} does not score {unknown}")


def _finite(tensor: Floats) -> Floats:
    if tensor.dtype != np.float32 or tensor.ndim != 1 or not np.isfinite(tensor).all():
        raise ValueError
    return tensor
