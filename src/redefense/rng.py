"""Named random streams, streams of single images, and the operating system's entropy.

This package does not change the state of torch's, numpy's or Python's global generators. Only for
networks that draw random numbers are they seeded, temporarily, by `seeded`.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed 64-bit number
_MIX_1 = -4658895280553007687  # the two multipliers of the splitmix64 finaliser
_MIX_2 = -7723592293110705685

PROTOCOL_DRAWS: Final = 5
"""Fresh draws by which the published protocol classifies the attacked images."""

CHUNK: Final = 100
"""Images per chunk of an evaluation. Streams are named by chunk, so results depend on it."""


def stream(seed: int, *path: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for one named purpose, e.g. `stream(seed, "attack", "pgd", 512)`.

    Equal (seed, path) give equal streams; different ones are unrelated, so that work can be split,
    reordered, resumed or repeated alone and still give the same bits. What counts is the path's
    text with `/` between the parts: 512 and "512" are one name, and so are ("a", "b") and "a/b".
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


Seed = int | Tensor
"""A seed: a number, or a tensor on the device."""

Draw = Callable[[torch.Generator], Tensor]


class Draws(torch.Generator):
    """A generator that stores the results of `drawn` in static memory on the device.

    A replayed training step draws nothing: `renew` draws before it, in the same order and from the
    step's stream, into the memory that the recording reads.

    Args:
        rng: the stream of the first step. It is not advanced.
        device: device of the numbers.
    """

    def __new__(cls, rng: torch.Generator, device: torch.device) -> "Draws":
        return super().__new__(cls, rng.device)  # type: ignore[call-arg]  # torch's stub lacks it

    def __init__(self, rng: torch.Generator, device: torch.device) -> None:
        self.device_of_values = device
        self.made: list[tuple[Draw, Tensor]] = []
        self.place: int | None = None
        self.set_state(rng.get_state())

    def take(self, draw: Draw) -> Tensor:
        """The result of `draw`: drawn now, or after `renew` that of the same call then.

        Raises:
            RuntimeError: if there are more calls than stored results.
        """
        if self.place is None:
            self.made.append((draw, draw(self).to(self.device_of_values, copy=True)))
            return self.made[-1][1]
        if self.place == len(self.made):
            raise RuntimeError("the step draws more numbers than the one before it")
        self.place += 1
        return self.made[self.place - 1][1]

    def repeats(self, rng: torch.Generator) -> bool:
        """Whether all draws from a copy of the stream `rng` were made by `drawn`."""
        again = torch.Generator(rng.device)
        again.set_state(rng.get_state())
        for draw, _ in self.made:
            draw(again)
        return torch.equal(again.get_state(), self.get_state())

    def renew(self, rng: torch.Generator) -> None:
        """Draw the numbers of another step from its stream."""
        self.place = 0
        for draw, value in self.made:
            value.copy_(draw(rng))


def drawn(rng: torch.Generator, draw: Draw, device: torch.device) -> Tensor:
    """The result of `draw` with a generator, on the device.

    All draws of a training loss must use this, so that its steps can be recorded.
    """
    return rng.take(draw) if isinstance(rng, Draws) else draw(rng).to(device)


def draw_seed(rng: torch.Generator) -> int:
    """One 63-bit seed drawn from `rng`: the only draw of an attack from its generator."""
    return int(_draw_seed(rng))


def _draw_seed(rng: torch.Generator) -> Tensor:
    return torch.randint(2**63 - 1, (), generator=rng, device=rng.device)


def seed_from(rng: torch.Generator | Seed) -> Seed:
    """A given seed, or one drawn from a generator (on the device for `Draws`)."""
    if isinstance(rng, Draws):
        return rng.take(_draw_seed)
    return draw_seed(rng) if isinstance(rng, torch.Generator) else rng


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of 64-bit numbers that torch holds as signed."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def mix64(z: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea & Flood, 2014) on int64, wrapping around."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


@dataclass(slots=True)
class ImageStreams:
    """One random stream per image, so that a result does not depend on the rest of the batch.

    Counter-based: the n-th number of an image's stream is a hash of (its key, n); all images are
    served in one vectorised call, with the same bits on every device.

    Attributes:
        keys: (B,) int64, one per image.
        counter: number of values consumed, common to all images.
    """

    keys: Tensor
    counter: int = 0

    @classmethod
    def of(cls, rng: torch.Generator | Seed, x: Tensor, y: Tensor) -> "ImageStreams":
        """Streams from one seed, drawn from `rng` or given, and each image's bits and label."""
        # in single precision, so that images converted to another dtype keep their streams
        bits = x.detach().to(torch.float32).contiguous().flatten(1).view(torch.int32).long()
        # mixed with its place, or images with permuted pixels would share a stream
        place = mix64(torch.arange(1, bits.shape[1] + 1, device=x.device) * _GOLDEN)
        content = (mix64(bits * _GOLDEN + place)).sum(1)
        return cls(mix64(mix64(content + y.long() * _GOLDEN) ^ seed_from(rng)))

    def _next(self, count: int) -> Tensor:
        steps = torch.arange(self.counter + 1, self.counter + count + 1, device=self.keys.device)
        self.counter += count
        return mix64(self.keys[:, None] + steps * _GOLDEN)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float64 in [0, 1): 53 random bits each."""
        count = int(torch.Size(shape).numel())
        return (_shift(self._next(count), 11).double() * 2.0**-53).view(-1, *shape)

    def integers(self, low: Tensor | int, high: Tensor | int, *shape: int) -> Tensor:
        """(B, *shape) int64 in [low, high); the bias is at most (high - low) / 2**53."""
        span = torch.as_tensor(high, device=self.keys.device) - low
        # the product may be rounded up to `span`
        return (self.uniform(*shape) * span).long().minimum(span.long() - 1) + low

    def select(self, rows: Tensor) -> "ImageStreams":
        """The same streams, at the same position, for some of the images (mask or indices)."""
        return ImageStreams(self.keys[rows], self.counter)


def system_stream() -> torch.Generator:
    """A generator on the CPU seeded with 63 bits of the operating system's entropy."""
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)


@contextmanager
def generators_kept(device: str | torch.device = "cpu") -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python after the block.

    Args:
        device: CUDA device whose generator is restored, too; none for the CPU.
    """
    place = torch.device(device)
    cuda = [] if place.type != "cuda" else [place]
    state, numpy_state = random.getstate(), np.random.get_state()
    # named, since by default the generators of all GPUs are copied
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed the global generators within the block, and restore them after it.

    Args:
        seed: in [0, 2**63); numpy takes its lowest 32 bits.
        device: device whose generator is seeded besides that of the CPU.
    """
    with generators_kept(device):
        # not torch.manual_seed, which seeds all devices, of which only this one is restored
        torch.default_generator.manual_seed(seed)
        if torch.device(device).type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def system_uniform(count: int) -> Tensor:
    """(count,) float64 in [0, 1) from the operating system's entropy, for secret draws."""
    if count == 0:  # which `frombuffer` refuses
        return torch.empty(0, dtype=torch.float64)
    raw = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64)
    return _shift(raw, 11).double() * 2.0**-53


def system_integers(bound: int, count: int) -> Tensor:
    """(count,) int64 in [0, bound) from the operating system's entropy, by rejection: no bias.

    Raises:
        ValueError: if bound is not in [1, 2**32].
    """
    if not 1 <= bound <= 2**32:
        raise ValueError(f"bound must lie in [1, 2**32], got {bound}")
    # the largest number accepted, not the first refused: 2**63 itself does not fit an int64
    largest = (2**63 // bound) * bound - 1
    parts: list[Tensor] = []
    while (missing := count - sum(map(len, parts))) > 0:
        raw = torch.frombuffer(bytearray(os.urandom(8 * missing)), dtype=torch.int64)
        raw = _shift(raw, 1)
        parts.append(raw[raw <= largest] % bound)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def draw_members(mixture: Tensor, count: int, rng: torch.Generator | None = None) -> Tensor:
    """(count,) int64 indices of members drawn with probabilities `mixture` (M,), on the CPU.

    All torch code draws members here; the bundle's runner and the server, without torch, draw their
    own. With `rng` the draw is reproducible; without, it comes from the operating system's entropy
    (by rejection where the mixture is uniform).
    """
    probs = mixture.detach().double().cpu()
    if rng is None and bool((probs == probs[0]).all()):
        return system_integers(len(probs), count)
    if rng is None:
        u = system_uniform(count)
    else:
        u = torch.rand(count, dtype=torch.float64, generator=rng, device=rng.device).cpu()
    edges = probs.cumsum(0)
    # u * total: rounding of the sum can never select a member beyond the last possible one
    return torch.searchsorted(edges, u * edges[-1], right=True)


def protocol_draws(
    mixture: NDArray[np.float64], count: int, seed: int, name: str
) -> NDArray[np.int64]:
    """(PROTOCOL_DRAWS, count) members that answer `count` images in each draw of the protocol."""
    probs = torch.from_numpy(mixture)
    rngs = (stream(seed, "protocol", name, draw) for draw in range(PROTOCOL_DRAWS))
    found: NDArray[np.int64] = torch.stack(
        [draw_members(probs, count, rng) for rng in rngs]
    ).numpy()
    return found
