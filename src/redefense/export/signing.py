"""Signatures of bundles: Ed25519 (RFC 8032) over the bytes of the manifest.

The manifest holds the hash of every other file, so one signature covers the whole bundle. It is the
raw 64 bytes, so that openssl can verify it without redefense.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from redefense.errors import ConfigError, DataError, need
from redefense.export.runner import SIGNATURE, BundleError, Trust

Sign = Callable[[bytes], bytes]
"""Maps a manifest to its signature."""

_SIZE: Final = 64


class SignatureError(BundleError):
    """A manifest is not signed, or its signature does not match the given key."""


def sign_with(private: Path) -> Sign:
    """A function that signs with the Ed25519 key in a PEM file.

    Raises:
        ConfigError: the file has no such key, is encrypted, or is readable by others, or the
            package cryptography is missing.
        DataError: the file does not exist.
    """
    content = _read(private)
    serialization = need("cryptography.hazmat.primitives.serialization", extra="sign")
    kinds = need("cryptography.hazmat.primitives.asymmetric.ed25519", extra="sign")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    # cryptography's error for an encrypted key without a password
    except TypeError:
        raise ConfigError(f"{private} has a passphrase, which is not supported") from None
    except Exception:  # noqa: BLE001 - damaged files raise many types
        raise ConfigError(f"{private} holds no private key in PEM form") from None
    if not isinstance(key, kinds.Ed25519PrivateKey):
        raise ConfigError(f"{private} holds another kind of key than Ed25519")
    # checked last: for a public key, given by mistake, it would be the wrong advice
    if (mode := private.stat().st_mode) & 0o077:
        raise ConfigError(f"{private} may be read by others (mode {mode & 0o777:o}): chmod 600")
    sign: Sign = key.sign
    return sign


def trust_in(public: Path) -> Trust:
    """A function that refuses every manifest not signed with the private key of this public key.

    Args:
        public: a PEM file with an Ed25519 public key.

    Raises:
        ConfigError: the file has no such key, or the package cryptography is missing.
        DataError: the file does not exist.
    """
    content = _read(public)
    serialization = need("cryptography.hazmat.primitives.serialization", extra="sign")
    kinds = need("cryptography.hazmat.primitives.asymmetric.ed25519", extra="sign")
    invalid = need("cryptography.exceptions", extra="sign").InvalidSignature
    try:
        key = serialization.load_pem_public_key(content)
    except Exception:  # noqa: BLE001 - damaged files raise many types
        raise ConfigError(f"{public} holds no public key in PEM form") from None
    if not isinstance(key, kinds.Ed25519PublicKey):
        raise ConfigError(f"{public} holds another kind of key than Ed25519")

    def trust(folder: Path, manifest: bytes) -> None:
        place = folder / SIGNATURE
        # a link could be turned to another file after the check
        if place.is_symlink() or not place.is_file():
            raise SignatureError(f"the bundle is not signed: it lacks {SIGNATURE}")
        # before it is read, since an untrusted file may be of any size
        if place.stat().st_size != _SIZE:
            raise SignatureError(f"{SIGNATURE} has {place.stat().st_size} bytes, not {_SIZE}")
        try:
            key.verify(place.read_bytes(), manifest)
        except invalid:
            raise SignatureError(
                f"{SIGNATURE} is not the signature of this manifest by the key {public}"
            ) from None

    return trust


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"key {path}: {error.strerror}") from None
