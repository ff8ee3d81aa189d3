"""A model directory: Hugging Face tensors as int8 safetensors, and `guard.json`, which vouches for every file.

    guard.json            format, kind, name, max_tokens, hazards, calibration, and the SHA-256 of each other file
    config.json           the backbone's Hugging Face configuration
    tokenizer.json        its tokenizer; of a Llama Guard also tokenizer_config.json and its chat template
    model-*.safetensors   the tensors, in shards, and the index that says where each is

A matrix [out, in] is stored as int8 with one float32 scale for each of its rows, `<name>_scale` [out]; vectors and the
classifier's head stay float32. One that meets the gated product has turned columns (see guard.model.kernels.turned), as
its inputs have where they are rounded; by which span is in `<name>_span` [1]. Nothing but JSON and safetensors is ever
read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from shutil import copyfile
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from guard.errors import CheckpointError
from guard.model.kernels import span_of, turned
from guard.types import Role

MANIFEST = "guard.json"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SCALE = "_scale"
_SPAN = "_span"
_HEAD = "lm_head.weight"
_TURNED = "mlp.down_proj.weight"
_SHARD_BYTES = 90_000_000
_SUFFIXES = (".json", ".jinja", ".safetensors")  # of chat templates the second


Calibration = Mapping[Role, Mapping[str, tuple[float, float]]]
Kind = Literal["turn-classifier", "llama-guard"]


@dataclass(frozen=True)
class Checkpoint:
    """What a model directory says of itself; `calibration` has (a, b) for p = sigmoid(a * logit + b).

    It has them for turns of users and of agents, by head; other roles are taken for users. One of a Llama Guard has
    none, and no hazards: its chat template says what it looks for.

    `int8` says that products of int8 were measured to change hardly a verdict (see guard.training.quantise).
    `revision` is the first 16 hex digits of the SHA-256 of `guard.json`, and so stands for the content of every file.
    """

    path: Path
    name: str
    revision: str
    max_tokens: int
    hazards: tuple[str, ...]
    calibration: Calibration
    int8: bool
    config: Mapping[str, Any]
    kind: Kind = "turn-classifier"


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal[2]
    kind: Kind = "turn-classifier"
    name: str
    max_tokens: int
    hazards: tuple[str, ...]
    calibration: dict[Role, dict[str, tuple[float, float]]]
    int8: bool = False
    files: dict[str, str]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads and verifies a Guard model directory.

    Raises CheckpointError, naming the file, where one is missing, damaged, of another format, or not safetensors.
    """
    content = _read(path / MANIFEST)
    try:
        manifest = _Manifest.model_validate(_parse(path / MANIFEST, content))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path / MANIFEST}: {problems}") from error
    for role in (Role.USER, Role.AGENT) if manifest.kind == "turn-classifier" else ():
        if odd := manifest.calibration.get(role, {}).keys() ^ {"unsafe", *manifest.hazards}:
            where = f"{path / MANIFEST}: calibration.{role}"
            raise CheckpointError(f"{where}: differs from the hazards in {', '.join(sorted(odd))}")
    for name, digest in manifest.files.items():
        if Path(name).name != name or Path(name).suffix not in _SUFFIXES:
            raise CheckpointError(f"{path / MANIFEST}: {name!r} is neither JSON nor safetensors in this directory")
        if _digest(path / name) != digest:
            raise CheckpointError(f"{path / name}: its SHA-256 is not the one in {MANIFEST}")
    read = {_CONFIG, _TOKENIZER, _INDEX, *(shard.name for shard in tensor_files(path))}
    if unvouched := read - manifest.files.keys():
        raise CheckpointError(f"{path / MANIFEST}: files lacks {', '.join(sorted(unvouched))}")
    return Checkpoint(
        path=path,
        name=manifest.name,
        revision=sha256(content).hexdigest()[:16],
        max_tokens=manifest.max_tokens,
        hazards=manifest.hazards,
        calibration=manifest.calibration,
        int8=manifest.int8,
        config=read_config(path),
        kind=manifest.kind,
    )


def read_kind(path: Path) -> str | None:
    """What `guard.json` says that a directory is, unverified; None where there is none."""
    if not (path / MANIFEST).exists():
        return None
    return str(_parse(path / MANIFEST, _read(path / MANIFEST)).get("kind", "turn-classifier"))


def read_config(path: Path) -> dict[str, Any]:
    """A directory's config.json. Raises CheckpointError where there is none."""
    return _parse(path / _CONFIG, _read(path / _CONFIG))


def load_tensors(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of any Hugging Face safetensors directory, in one file or in shards, by name.

    Matrices come in `dtype`, those stored as int8 dequantised; for int8 they come as they are stored, or rounded, with
    their scales beside them. Vectors and the head `score.*` come in float32.
    Raises CheckpointError, naming the file, where one is missing or no safetensors.
    """
    tensors: dict[str, Tensor] = {}
    for shard in tensor_files(path):
        try:
            stored = load_file(shard)
            tensors |= as_integers(stored) if dtype == torch.int8 else _dequantised(stored, dtype)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{shard}: {error}") from error
        except KeyError as error:
            raise CheckpointError(f"{shard}: lacks {error}") from error
    return tensors


def take_rows(tensors: dict[str, Tensor], rows: Sequence[int]) -> Tensor:
    """Some rows of a language model's head, float32 [rows, hidden]; the rest of it is dropped.

    They are those of the embedding where the checkpoint ties the two. Raises CheckpointError where it has neither.
    """
    tied = next((name for name in tensors if name.endswith("embed_tokens.weight")), "")
    name = _HEAD if _HEAD in tensors else tied
    if name not in tensors:
        raise CheckpointError(f"the checkpoint has no tensor {_HEAD}")
    taken = tensors[name][rows].float()
    if (scales := tensors.get(name + _SCALE)) is not None:
        taken *= scales[rows, None]
    for unused in (_HEAD, _HEAD + _SCALE):
        tensors.pop(unused, None)
    return taken


def _dequantised(stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Raises KeyError where an int8 matrix lacks its scale."""
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    tensors = {}
    for name in stored.keys() - {name + more for name in quantised for more in (_SCALE, _SPAN)}:
        tensor = stored[name]
        if name in quantised:
            tensor = turned(tensor.float() * stored[name + _SCALE][:, None], int(stored.get(name + _SPAN, 0)))
        tensors[name] = tensor.to(torch.float32 if _keeps_float32(name, tensor) else dtype)
    return tensors


def as_integers(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a model directory stores them: matrices as int8, with their scales beside them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            tensors[name] = tensor
        elif _keeps_float32(name, tensor):
            tensors[name] = tensor.float()
        else:
            tensors |= _quantised(name, tensor)
    return tensors


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    tokenizer_json: str,
    name: str,
    max_tokens: int,
    hazards: tuple[str, ...],
    calibration: Calibration,
    kind: Kind = "turn-classifier",
    documents: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a model directory; matrices become int8 with a scale for each row, `guard.json` comes last.

    `documents` are further files that it vouches for, by name.
    """
    path.mkdir(parents=True, exist_ok=True)
    for document, text in documents.items():
        (path / document).write_text(text, encoding="utf-8")
    (path / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (path / _TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
    shards = _fill_shards(tensors)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for shard_name, shard in zip(names, shards, strict=True):
        (path / shard_name).write_bytes(serialise(shard, metadata={"format": "pt"}))
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (path / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    manifest = _Manifest(
        format=2,
        kind=kind,
        name=name,
        max_tokens=max_tokens,
        hazards=hazards,
        calibration={role: dict(fits) for role, fits in calibration.items()},
        files={file: _digest(path / file) for file in (_CONFIG, _TOKENIZER, *documents, _INDEX, *names)},
    )
    (path / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def copy_checkpoint(base: Path, path: Path) -> None:
    """Copies what a model directory vouches for, and `guard.json`."""
    path.mkdir(parents=True, exist_ok=True)
    manifest = _Manifest.model_validate_json(_read(base / MANIFEST))
    for file in (*manifest.files, MANIFEST):
        copyfile(base / file, path / file)


def amend_checkpoint(path: Path, documents: Mapping[str, str] | None = None, **changes: Any) -> None:
    """Changes what `guard.json` says, by key, adds JSON files by name, and vouches for all files as they are now."""
    documents = documents or {}
    for name, text in documents.items():
        (path / name).write_text(text, encoding="utf-8")
    manifest = _Manifest.model_validate_json(_read(path / MANIFEST))
    files = {name: _digest(path / name) for name in (*manifest.files, *documents)}
    amended = manifest.model_copy(update={**changes, "files": files})
    (path / MANIFEST).write_text(amended.model_dump_json(indent=2) + "\n", encoding="utf-8")


def extend_checkpoint(
    base: Checkpoint, path: Path, hazard: str, weight: Tensor, bias: Tensor, name: str | None = None
) -> None:
    """Writes a copy of a model directory with one more output of the head, `weight` [hidden] and `bias` [].

    Nothing else of it changes, but for the name where there is one. The output's calibration is (1, 0).
    """
    copy_checkpoint(base.path, path)
    rows = {"score.weight": weight.float()[None], "score.bias": bias.float()[None]}
    for shard in tensor_files(base.path):
        stored = load_file(shard)
        if extended := {tensor: torch.cat([stored[tensor], row]) for tensor, row in rows.items() if tensor in stored}:
            (path / shard.name).write_bytes(serialise(stored | extended, metadata={"format": "pt"}))
    index = _parse(path / _INDEX, _read(path / _INDEX))
    index["metadata"]["total_size"] += sum(row.nbytes for row in rows.values())
    (path / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    manifest = _Manifest.model_validate_json(_read(path / MANIFEST))
    amend_checkpoint(
        path,
        name=name or manifest.name,
        hazards=(*manifest.hazards, hazard),
        calibration={role: fits | {hazard: (1.0, 0.0)} for role, fits in manifest.calibration.items()},
    )


def _fill_shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        stored = {name: tensor.float().contiguous()} if _keeps_float32(name, tensor) else _quantised(name, tensor)
        bytes_ = sum(part.nbytes for part in stored.values())
        if shards[-1] and size + bytes_ > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1] |= stored
        size += bytes_
    return shards


def _quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
    matrix, span = tensor.float(), span_of(tensor.shape[1]) if name.endswith(_TURNED) else 0
    matrix = turned(matrix, span)
    scale = matrix.abs().amax(dim=1).clamp_min(1e-12) / 127  # [out]
    stored = {name: (matrix / scale[:, None]).round().to(torch.int8), name + _SCALE: scale}
    return stored | ({name + _SPAN: torch.tensor([span])} if span else {})


def _keeps_float32(name: str, tensor: Tensor) -> bool:
    return tensor.ndim < 2 or name.startswith("score.")


def tensor_files(path: Path) -> list[Path]:
    """The files of tensors of a directory, as the index names them, or the only one."""
    if not (path / _INDEX).exists():
        return [path / _SINGLE]
    weight_map = _parse(path / _INDEX, _read(path / _INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path / _INDEX}: has no weight_map of file names")
    for name in weight_map.values():
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise CheckpointError(f"{path / _INDEX}: {name!r} is no safetensors file in this directory")
    return [path / name for name in sorted(set(weight_map.values()))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return document


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
