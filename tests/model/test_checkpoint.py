import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from guard.errors import CheckpointError
from guard.model.checkpoint import load_tensors, read_checkpoint, save_checkpoint
from guard.types import Role

HAZARDS = ("S1", "X1")
FITS = {"unsafe": (1.5, -0.25), "S1": (1.0, 0.0), "X1": (0.5, 0.125)}
CALIBRATION = {Role.USER: FITS, Role.AGENT: dict.fromkeys(FITS, (1.25, 0.5))}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(50, 16),
        "model.layers.0.mlp.up_proj.weight": torch.randn(24, 16) * torch.logspace(-4, 2, 24)[:, None],
        "model.norm.weight": torch.randn(16),
        "score.weight": torch.randn(3, 16),
        "score.bias": torch.randn(3),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(
        tmp_path / "model",
        tensors(),
        config={"hidden_size": 16},
        tokenizer_json='{"version": "1.0"}',
        name="tiny",
        max_tokens=2048,
        hazards=HAZARDS,
        calibration=CALIBRATION,
    )
    return tmp_path / "model"


def vouch(path: Path, **changes: object) -> None:
    """Writes guard.json anew, with the hashes of the files as they are now."""
    manifest = json.loads((path / "guard.json").read_text())
    manifest["files"] = {name: sha256((path / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (path / "guard.json").write_text(json.dumps(manifest | changes))


def test_what_is_saved_is_read(saved: Path) -> None:
    """A saved model says what it was saved with, and its revision is the hash of its manifest."""
    checkpoint = read_checkpoint(saved)
    assert (checkpoint.path, checkpoint.name, checkpoint.max_tokens) == (saved, "tiny", 2048)
    assert (checkpoint.hazards, checkpoint.calibration) == (HAZARDS, CALIBRATION)
    assert checkpoint.config == {"hidden_size": 16}
    assert checkpoint.revision == sha256((saved / "guard.json").read_bytes()).hexdigest()[:16]


def test_matrices_lose_half_a_step_and_the_rest_nothing(saved: Path) -> None:
    """A weight is off by at most half of its row's int8 step; vectors and the head come back as they were."""
    original, loaded = tensors(), load_tensors(saved, torch.float32)
    assert loaded.keys() == original.keys()
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        step = original[name].abs().amax(dim=1, keepdim=True) / 127
        assert ((loaded[name] - original[name]).abs() <= step * 0.5001).all()
    for name in ("model.norm.weight", "score.weight", "score.bias"):
        assert torch.equal(loaded[name], original[name])
    assert {name: t.dtype for name, t in load_tensors(saved, torch.bfloat16).items()} == {
        name: torch.bfloat16 if name.endswith(("embed_tokens.weight", "up_proj.weight")) else torch.float32
        for name in original
    }


def test_a_matrix_that_meets_the_gated_product_is_stored_turned(tmp_path: Path) -> None:
    """What is large in one column costs the others no precision, and nobody who reads the matrix sees a difference."""
    name = "model.layers.0.mlp.down_proj.weight"
    matrix = torch.randn(16, 512, generator=torch.Generator().manual_seed(5))
    matrix[:, 7] *= 50
    save_checkpoint(tmp_path, tensors() | {name: matrix}, {}, "{}", "tiny", 2048, HAZARDS, CALIBRATION)
    error = load_tensors(tmp_path, torch.float32)[name] - matrix
    step = matrix.abs().amax(dim=1, keepdim=True) / 127
    assert error.square().mean().sqrt() < 0.5 * (step / 12**0.5).mean()
    again = tmp_path / "again"
    save_checkpoint(again, load_tensors(tmp_path, torch.float32), {}, "{}", "tiny", 2048, HAZARDS, CALIBRATION)
    torch.testing.assert_close(load_tensors(again, torch.float32)[name], matrix + error)


def test_saving_what_was_loaded_changes_nothing(saved: Path, tmp_path: Path) -> None:
    """A model that was read and is saved again has the same weights, so that calibrating it anew does not wear it."""
    again = tmp_path / "again"
    loaded = load_tensors(saved, torch.float32)
    save_checkpoint(again, loaded, {"hidden_size": 16}, '{"version": "1.0"}', "tiny", 2048, HAZARDS, CALIBRATION)
    reloaded = load_tensors(again, torch.float32)
    assert all(torch.allclose(reloaded[name], loaded[name], rtol=1e-6, atol=0) for name in loaded)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hugging_face_directory_is_read(tmp_path: Path, sharded: bool) -> None:
    """Float tensors of a foreign directory are read from one file or from the shards of its index."""
    original = tensors()
    names = list(original)
    if sharded:
        save_file({name: original[name] for name in names[:2]}, tmp_path / "a.safetensors")
        save_file({name: original[name] for name in names[2:]}, tmp_path / "b.safetensors")
        weight_map = {name: "a.safetensors" if name in names[:2] else "b.safetensors" for name in names}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(original, tmp_path / "model.safetensors")
    loaded = load_tensors(tmp_path, torch.float32)
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name]) for name in original)


SHARD = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("name", ["guard.json", "config.json", "tokenizer.json", SHARD, "model.safetensors.index.json"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    """A model directory without one of its files is refused, and the file is named."""
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: No such file"):
        read_checkpoint(saved)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SHARD, "model.safetensors.index.json"])
def test_a_changed_file_is_named(saved: Path, name: str) -> None:
    """A model directory of which one byte was changed is refused, and the file is named."""
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: its SHA-256"):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "guard.json: format: Input should be 2"),
        ({"max_tokens": None}, "guard.json: max_tokens"),
        ({"surprise": 1}, "guard.json: surprise: Extra inputs"),
        ({"calibration": {"user": {"unsafe": [1, 0]}}}, "calibration.user: differs from the hazards in S1, X1"),
        ({"files": {}}, f"guard.json: files lacks config.json, {SHARD}, model.safetensors.index.json, tokenizer.json"),
        ({"files": {"pytorch_model.bin": ""}}, "'pytorch_model.bin' is neither JSON nor safetensors"),
        ({"files": {"../model/config.json": ""}}, "'../model/config.json' is neither JSON nor safetensors"),
    ],
)
def test_a_wrong_manifest_is_explained(saved: Path, changes: dict[str, object], message: str) -> None:
    """A manifest of another format, with a wrong key, or that vouches for too little or for other files is refused."""
    vouch(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(saved)


def test_what_is_not_json_is_named(saved: Path) -> None:
    """A manifest, or a configuration that is vouched for, is refused when it is not JSON."""
    (saved / "config.json").write_text("{")
    vouch(saved)
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        read_checkpoint(saved)
    (saved / "guard.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"guard\.json: is not a JSON object"):
        read_checkpoint(saved)


def test_an_index_leads_nowhere_else(saved: Path) -> None:
    """An index that points to a pickle, or out of the directory, is refused."""
    for name in ("pytorch_model.bin", "../model.safetensors"):
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match=r"index\.json: .* is no safetensors file in this directory"):
            load_tensors(saved, torch.float32)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    """A file that is no safetensors, or whose int8 matrix has no scale, is refused, and named."""
    (tmp_path / "model.safetensors").write_bytes(b"PK not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        load_tensors(tmp_path, torch.float32)
    save_file({"w": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lacks 'w_scale'"):
        load_tensors(tmp_path, torch.float32)
