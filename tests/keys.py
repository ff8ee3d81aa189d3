"""Pairs of keys as openssl makes them."""

from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


class Pair(NamedTuple):
    """Files in PEM."""

    private: Path
    public: Path


def to_sign(directory: Path) -> Pair:
    return _write(directory, Ed25519PrivateKey.generate())


def to_seal(directory: Path) -> Pair:
    return _write(directory, X25519PrivateKey.generate())


def _write(directory: Path, key: Ed25519PrivateKey | X25519PrivateKey) -> Pair:
    directory.mkdir(exist_ok=True)
    pair = Pair(directory / "private.pem", directory / "public.pem")
    pair.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pair.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return pair
