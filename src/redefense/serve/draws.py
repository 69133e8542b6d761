"""Draws the member that answers each image, after the batch is formed.

Every policy is a function from a batch's images and clients to member indices. Fresh draws use the
bundle's runner (`redefense.export.runner`), which `verify` tests.
"""

import hmac
import ipaddress
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from redefense.errors import ConfigError, DataError
from redefense.export.runner import draw_members
from redefense.serve.settings import Settings

Floats = NDArray[np.float32]
Ensemble = NDArray[np.int64]
Mixture = NDArray[np.float64]
Draw = Callable[[Floats, Sequence[str]], Ensemble]
"""(images (N, C, H, W), the client of each) -> member index of each (N,)."""

_EPOCH = 3600.0  # seconds
_KEY_BYTES = 32
_STEPS = 2**64


def pick(numbers: Sequence[int], mixture: Mixture) -> Ensemble:
    """Members from uniform numbers in [0, 2**64); the bias is below 2**-52, that of the mixture."""
    edges = np.cumsum(mixture)
    # thresholds as integers: a float cannot hold 64 bits
    thresholds = [int(edge / edges[-1] * 2**53) * 2**11 for edge in edges[:-1]]
    chosen = [sum(number >= limit for limit in thresholds) for number in numbers]
    return np.array(chosen, dtype=np.int64)


def fresh(mixture: Mixture) -> Draw:
    """A new secret draw for every image of every request."""

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        return draw_members(mixture, len(images))

    return draw


def canonical(image: Floats) -> bytes:
    """The identity of an image for `per-input`: its 8-bit pixels and shape.

    The same picture as PNG, as JSON and as binary tensor is one image, as are two that differ by
    less than a rounding step. A pixel that changes by a whole level makes another image.
    """
    levels = np.rint(image * 255).astype(np.uint8)
    return repr(levels.shape).encode() + levels.tobytes()


def keyed(key: bytes, *parts: bytes) -> int:
    """A pseudorandom number in [0, 2**64) (HMAC-SHA-256), uniform without the key."""
    # with lengths: else (ab, c) and (a, bc) would be the same message
    framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    return int.from_bytes(hmac.digest(key, framed, "sha256")[:8], "big")


def per_input(mixture: Mixture, key: bytes) -> Draw:
    """An image is always answered by the same member, for any client and encoding."""

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        return pick([keyed(key, b"input", canonical(image)) for image in images], mixture)

    return draw


def per_client(
    mixture: Mixture, key: bytes, *, epoch: float, clock: Callable[[], float] = time.time
) -> Draw:
    """A client is answered by one member for an epoch; the start of its epochs is secret, too."""

    def number(client: str, now: float) -> int:
        name = client.encode()
        # each client has its own start, so that not all members change at one known moment
        shift = keyed(key, b"shift", name) / _STEPS
        turn = int(now / epoch + shift)
        return keyed(key, b"client", name, str(turn).encode())

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        now = clock()
        return pick([number(client, now) for client in clients], mixture)

    return draw


def network_of(address: str) -> str:
    """The identity of a client: its address, for IPv6 only the first 64 bits."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    # the same client, seen by a socket that listens for both versions
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    # whoever has one address of a /64 has all, and could come as a new client with each
    return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))


def seeded(mixture: Mixture, seed: int) -> Draw:
    """Reproducible draws, for research only."""
    # named, since numpy may change the default generator and so the sequence of a seed
    generator = np.random.Generator(np.random.Philox(seed))

    def draw(images: Floats, clients: Sequence[str]) -> Ensemble:
        numbers = generator.integers(_STEPS, size=len(images), dtype=np.uint64)
        return pick([int(number) for number in numbers], mixture)

    return draw


def read_key(path: Path | None) -> bytes:
    """The secret of the keyed policies: a file's bytes, or new ones.

    Raises:
        ConfigError: the file is too short, or readable by others.
        DataError: the file does not exist.
    """
    if path is None:
        return os.urandom(_KEY_BYTES)
    try:
        key, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise DataError(f"key {path}: {error.strerror}") from None
    if len(key) < _KEY_BYTES:
        raise ConfigError(f"key {path} must hold at least {_KEY_BYTES} bytes, got {len(key)}")
    if mode & 0o077:
        raise ConfigError(f"key {path} may be read by others (mode {mode & 0o777:o}): chmod 600")
    return key


def draw_by(settings: Settings, mixture: Mixture, key: bytes) -> Draw:
    """The draw policy of the settings."""
    if settings.seed is not None:
        return seeded(mixture, settings.seed)
    if settings.policy == "per-input":
        return per_input(mixture, key)
    if settings.policy == "per-client":
        return per_client(mixture, key, epoch=settings.epoch or _EPOCH)
    return fresh(mixture)
