"""Signed policies: what every file of their directory holds, in a manifest with an ed25519 signature beside it."""

import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, NonNegativeInt, ValidationError

from guard.errors import ConfigError
from guard.policy.document import read_file

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"

_MAX_MANIFEST = 1_000_000  # bytes
_SIGNATURE_BYTES = 64


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    bytes: NonNegativeInt
    sha256: str


class _Manifest(BaseModel):
    """`format` keeps what the key signed for another purpose from being taken for policies."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["guard-policies-1"] = "guard-policies-1"
    signed: AwareDatetime
    files: dict[str, _File]


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of a directory as they were when their signature was checked, by name; `signed` is when."""

    signed: datetime
    files: Mapping[str, bytes]

    def read(self, path: Path, limit: int) -> bytes:
        """As `guard.policy.document.read_file`, from what was checked and not from the disk."""
        if path.name not in self.files:
            raise FileNotFoundError(errno.ENOENT, "it is not in the manifest")
        content = self.files[path.name]
        return content if limit < 0 else content[:limit]


class Signatures:
    """Opens directories that were signed by the owner of one key."""

    def __init__(self, key: Path) -> None:
        """`key` is public, in PEM. Raises ConfigError where it is none."""
        from guard.keys import verifier

        self._verify = verifier(key)

    def open(self, directory: Path, newest: datetime | None = None) -> Bundle:
        """Reads every file, once; `newest` is when what is in force was signed, than which nothing may be older.

        Raises ConfigError with every reason not to use any of them, one a line.
        """
        manifest = self._manifest(directory, newest)
        names, files, problems = _names(directory), dict[str, bytes](), list[str]()
        for name in sorted(names | manifest.files.keys()):
            signed = manifest.files.get(name)
            content = _content(directory / name, signed.bytes + 1) if signed and name in names else b""
            if signed is None:
                problems.append(f"{directory / name}: is not in the manifest")
            elif name not in names:
                problems.append(f"{directory / name}: is in the manifest, but not there")
            elif len(content) != signed.bytes or _hash(content) != signed.sha256:
                problems.append(f"{directory / name}: is not what was signed")
            files[name] = content
        if problems:
            raise ConfigError("\n".join(problems))
        return Bundle(manifest.signed, files)

    def _manifest(self, directory: Path, newest: datetime | None) -> _Manifest:
        path = directory / MANIFEST
        content = _content(path, _MAX_MANIFEST)
        if not self._verify(_content(directory / SIGNATURE, _SIGNATURE_BYTES + 1), content):
            raise ConfigError(f"{directory / SIGNATURE}: is no signature of {MANIFEST} by that key")
        try:
            manifest = _Manifest.model_validate_json(content)
        except ValidationError:
            raise ConfigError(f"{path}: expected a manifest of policies in the form that this version reads") from None
        if newest is not None and manifest.signed < newest:
            raise ConfigError(f"{path}: was signed at {manifest.signed}, before what is in force, {newest}")
        return manifest


def sign(directory: Path, key: Path) -> int:
    """Writes manifest and signature, by the private key. Returns the number of files; raises ConfigError."""
    from guard.keys import signer

    signature_of = signer(key)
    contents = {name: _content(directory / name) for name in sorted(_names(directory))}
    files = {name: _File(bytes=len(content), sha256=_hash(content)) for name, content in contents.items()}
    manifest = _Manifest(signed=datetime.now(UTC), files=files).model_dump_json(indent=1).encode() + b"\n"
    for name, content in ((MANIFEST, manifest), (SIGNATURE, signature_of(manifest))):
        try:
            (directory / name).write_bytes(content)
        except OSError as error:
            raise ConfigError(f"{directory / name}: cannot be written: {error.strerror}") from None
    return len(files)


def _names(directory: Path) -> set[str]:
    """All but what is hidden, which nothing reads: where Kubernetes mounts a ConfigMap, say, its `..data`."""
    try:
        names = {entry.name for entry in os.scandir(directory) if not entry.name.startswith(".")}
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error.strerror}") from None
    return names - {MANIFEST, SIGNATURE}


def _content(path: Path, limit: int = -1) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would hold its reader up
        raise ConfigError(f"{path}: expected a file")
    try:
        return read_file(path, limit)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
