"""Keys that an operator makes with openssl: ed25519 to sign by and X25519 to seal to, each a file in PEM.

Importing it takes the extra `crypto`; ConfigError says so where it is missing.
"""

from collections.abc import Callable
from pathlib import Path

from guard.errors import ConfigError

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
except ModuleNotFoundError:
    raise ConfigError("keys need the extra, pip install 'guard-moderation[crypto]'") from None

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_PURPOSE = b"guard capture 1"  # what was sealed to the same key for another one is not taken for ours


def signer(key: Path) -> Callable[[bytes], bytes]:
    """Signs, in 64 bytes. Raises ConfigError for a file that is no ed25519 private key."""
    private = _private(key)
    if not isinstance(private, Ed25519PrivateKey):
        raise _unfit(key, "ed25519 private")
    return private.sign


def verifier(key: Path) -> Callable[[bytes, bytes], bool]:
    """Tells whether its first argument is a signature of the second. Raises ConfigError for no ed25519 public key."""
    public = _public(key)
    if not isinstance(public, Ed25519PublicKey):
        raise _unfit(key, "ed25519 public")

    def verify(signature: bytes, data: bytes) -> bool:
        try:
            public.verify(signature, data)
        except InvalidSignature:
            return False
        return True

    return verify


def sealer(key: Path) -> Callable[[bytes], bytes]:
    """Seals by HPKE (RFC 9180) to the owner of the private key. Raises ConfigError for no X25519 public key."""
    public = _public(key)
    if not isinstance(public, X25519PublicKey):
        raise _unfit(key, "X25519 public")
    return lambda data: _SUITE.encrypt(data, public, _PURPOSE)


def unsealer(key: Path) -> Callable[[bytes], bytes | None]:
    """Opens what was sealed to the key; None for anything else. Raises ConfigError for no X25519 private key."""
    private = _private(key)
    if not isinstance(private, X25519PrivateKey):
        raise _unfit(key, "X25519 private")

    def unseal(sealed: bytes) -> bytes | None:
        try:
            return _SUITE.decrypt(sealed, private, _PURPOSE)
        except InvalidTag:
            return None

    return unseal


def _private(key: Path) -> object:
    return _loaded(key, lambda pem: load_pem_private_key(pem, None))


def _public(key: Path) -> object:
    return _loaded(key, load_pem_public_key)


def _loaded(key: Path, load: Callable[[bytes], object]) -> object:
    """None where the file holds no key, or one with a password."""
    try:
        return load(key.read_bytes())
    except OSError as error:
        raise ConfigError(f"{key}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def _unfit(key: Path, expected: str) -> ConfigError:
    return ConfigError(f"{key}: expected an {expected} key in PEM, without a password")
