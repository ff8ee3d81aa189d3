"""Signed policies: nothing of a directory is used that is not, to the byte, what was signed."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from guard.errors import ConfigError, PolicyError
from guard.policy.bundle import MANIFEST, SIGNATURE, Signatures, sign
from guard.policy.store import PolicyStore
from tests import keys
from tests.policy.files import CALIBRATION, CRISIS, WHOLE, write


@pytest.fixture
def pair(tmp_path: Path) -> keys.Pair:
    return keys.to_sign(tmp_path / "keys")


@pytest.fixture
def directory(tmp_path: Path, pair: keys.Pair) -> Path:
    """A policy that includes another file, something else that lies beside it, and what signs them."""
    (directory := tmp_path / "policies").mkdir()
    write(directory)
    (directory / "head.safetensors").write_bytes(bytes(range(256)))
    assert sign(directory, pair.private) == 3
    return directory


def load(directory: Path, signatures: Signatures, earlier: PolicyStore | None = None) -> PolicyStore:
    return PolicyStore.load(directory, "whole", CALIBRATION, signatures, earlier)


def refusal(directory: Path, pair: keys.Pair) -> str:
    with pytest.raises(ConfigError) as raised:
        load(directory, Signatures(pair.public))
    return str(raised.value).replace(f"{directory}/", "")


def test_what_was_signed_is_served(directory: Path, pair: keys.Pair) -> None:
    """The same policies as without a signature; hidden entries, as Kubernetes makes them, are nobody's."""
    (directory / "..data").mkdir()
    served = load(directory, Signatures(pair.public)).policies
    assert served == PolicyStore.load(directory, "whole", CALIBRATION).policies


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a policy that differs": (
        lambda directory: (directory / "whole.yaml").write_text(WHOLE.replace("block: 0.9", "block: 0.8")),
        "whole.yaml: is not what was signed",
    ),
    "a longer one": (
        lambda directory: (directory / "whole.yaml").write_text(f"{WHOLE}\n"),
        "whole.yaml: is not what was signed",
    ),
    "an included file that differs": (
        lambda directory: (directory / "crisis_include.yaml").write_text(CRISIS.replace("988", "989")),
        "crisis_include.yaml: is not what was signed",
    ),
    "a head that differs": (
        lambda directory: (directory / "head.safetensors").write_bytes(bytes(256)),
        "head.safetensors: is not what was signed",
    ),
    "another policy": (
        lambda directory: (directory / "more.yaml").write_text(WHOLE),
        "more.yaml: is not in the manifest",
    ),
    "a directory": (lambda directory: (directory / "more").mkdir(), "more: is not in the manifest"),
    "a file that is gone": (
        lambda directory: (directory / "head.safetensors").unlink(),
        "head.safetensors: is in the manifest, but not there",
    ),
    "a pipe": (
        lambda directory: os.mkfifo((directory / "whole.yaml").rename(directory / ".old").with_name("whole.yaml")),
        "whole.yaml: expected a file",
    ),
    "no manifest": (
        lambda directory: (directory / MANIFEST).unlink(),
        "manifest.json: cannot be read: No such file or directory",
    ),
    "no signature": (
        lambda directory: (directory / SIGNATURE).unlink(),
        "manifest.sig: cannot be read: No such file or directory",
    ),
    "half a signature": (
        lambda directory: (directory / SIGNATURE).write_bytes((directory / SIGNATURE).read_bytes()[:32]),
        "manifest.sig: is no signature of manifest.json by that key",
    ),
    "a manifest that differs": (
        lambda directory: (directory / MANIFEST).write_bytes((directory / MANIFEST).read_bytes() + b"\n"),
        "manifest.sig: is no signature of manifest.json by that key",
    ),
}


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=CHANGES)
def test_what_was_not_signed_is_refused(
    directory: Path, pair: keys.Pair, change: Callable[[Path], object], problem: str
) -> None:
    """The error names the file."""
    change(directory)
    assert refusal(directory, pair) == problem


def test_all_that_is_wrong_is_told_at_once(directory: Path, pair: keys.Pair) -> None:
    """A line for each file."""
    for name in ("whole.yaml", "crisis_include.yaml", "more.yaml"):
        (directory / name).write_text("{}")
    assert refusal(directory, pair).splitlines() == [
        "crisis_include.yaml: is not what was signed",
        "more.yaml: is not in the manifest",
        "whole.yaml: is not what was signed",
    ]


def test_a_signature_by_another_key_is_none(directory: Path, pair: keys.Pair, tmp_path: Path) -> None:
    """Whoever may write the files, but has not the key, cannot sign them."""
    sign(directory, keys.to_sign(tmp_path / "others").private)
    assert refusal(directory, pair) == "manifest.sig: is no signature of manifest.json by that key"


def test_what_the_key_signed_for_another_purpose_is_no_manifest(directory: Path, pair: keys.Pair) -> None:
    """Nor is one of a later form."""
    from guard.keys import signer

    manifest = json.loads((directory / MANIFEST).read_text())
    content = json.dumps({**manifest, "format": "guard-policies-2"}).encode()
    (directory / MANIFEST).write_bytes(content)
    (directory / SIGNATURE).write_bytes(signer(pair.private)(content))
    assert (
        refusal(directory, pair) == "manifest.json: expected a manifest of policies in the form that this version reads"
    )


def test_an_older_bundle_does_not_come_back(directory: Path, pair: keys.Pair) -> None:
    """What was opened stays open; what was signed before it is refused, however well it is signed."""
    signatures = Signatures(pair.public)
    older = {name: (directory / name).read_bytes() for name in (MANIFEST, SIGNATURE)}
    earlier = load(directory, signatures)
    sign(directory, pair.private)
    newer = load(directory, signatures, load(directory, signatures, earlier))
    for name, content in older.items():
        (directory / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{MANIFEST}: was signed at ")):
        load(directory, signatures, newer)


def test_a_bundle_that_cannot_be_served_ages_nothing(directory: Path, pair: keys.Pair) -> None:
    """What is in force may come back after one that was signed with a mistake in it."""
    signatures = Signatures(pair.public)
    served = load(directory, signatures)
    good = {path: path.read_bytes() for path in directory.iterdir()}
    write(directory, WHOLE.replace("block: 0.9", "block: 9"))
    sign(directory, pair.private)
    with pytest.raises(PolicyError):
        load(directory, signatures, served)
    for path, content in good.items():
        path.write_bytes(content)
    assert load(directory, signatures, served).policies == served.policies


def test_what_is_read_is_what_was_checked(directory: Path, pair: keys.Pair) -> None:
    """Files that change once they were checked change nothing, and those that come then are not there."""
    bundle = Signatures(pair.public).open(directory)
    for path in list(directory.iterdir()):
        path.write_text("other")
    assert bundle.read(directory / "whole.yaml", 100_000).decode() == WHOLE
    assert bundle.read(directory / "head.safetensors", 3) == bytes(range(3))
    assert bundle.read(directory / "head.safetensors", -1) == bytes(range(256))
    with pytest.raises(OSError, match="it is not in the manifest"):
        bundle.read(directory / "more.yaml", 1)


@pytest.mark.parametrize("content", ["", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", None])
def test_a_file_that_is_no_key_is_refused(pair: keys.Pair, content: str | None) -> None:
    """So is a key of the other half, or of another kind."""
    pair.public.write_text(pair.private.read_text() if content is None else content)
    with pytest.raises(ConfigError, match=r"public\.pem: expected an ed25519 public key in PEM, without a password$"):
        Signatures(pair.public)
    sealing = keys.to_seal(pair.private.parent)
    with pytest.raises(ConfigError, match=r"private\.pem: expected an ed25519 private key in PEM, without a password$"):
        sign(pair.private.parent, sealing.private)
