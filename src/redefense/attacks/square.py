"""Square: random search with square patches, from scores alone (Andriushchenko et al., 2020)."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from redefense.attacks.apgd import filtered
from redefense.attacks.base import OFFICIAL, RED_RELEASED, TORCHATTACKS, Attack, Presets
from redefense.attacks.early_stop import GRADIENT_SHARE, SEARCH_CHECK, SEARCH_FACTOR, out_of_reach
from redefense.attacks.objectives import margin
from redefense.limits import at_least, within
from redefense.rng import ImageStreams
from redefense.threat import TINY, Threat
from redefense.types import Bool, Float, Images, Int, Labels, Victim, correct

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


@runtime_checkable
class Draws(Protocol):
    """Where the search takes its random numbers from."""

    def of(self, rows: Int[Tensor, " K"]) -> "Draws":
        """For some of the images."""
        ...

    def follow(self, part: "Draws") -> None:
        """Advance to the position of a part of these streams."""
        ...

    def signs(self, *shape: int, shared: bool = False) -> Tensor:
        """(K or 1, *shape) of +-1; `shared` ones may be common to the batch."""
        ...

    def offsets(self, room: int) -> Int[Tensor, " K"]:
        """(K or 1,) places of a window that can move by `room` pixels."""
        ...

    def flips(self) -> Bool[Tensor, " K"]: ...


@dataclass
class OwnDraws:
    """Each image from its own stream; windows reach every pixel."""

    streams: ImageStreams

    def of(self, rows: Int[Tensor, " K"]) -> "OwnDraws":
        return OwnDraws(self.streams.select(rows))

    def follow(self, part: Draws) -> None:
        if isinstance(part, OwnDraws):
            self.streams.counter = part.streams.counter

    def signs(self, *shape: int, shared: bool = False) -> Tensor:
        return torch.where(self.streams.uniform(*shape) < 0.5, -1.0, 1.0)

    def offsets(self, room: int) -> Int[Tensor, " K"]:
        return self.streams.integers(0, room + 1)

    def flips(self) -> Bool[Tensor, " K"]:
        return self.streams.uniform() > 0.5


@dataclass
class BatchDraws:
    """As published: one window for the whole batch, never at the far border."""

    rng: Generator
    count: int
    device: torch.device

    def of(self, rows: Int[Tensor, " K"]) -> "BatchDraws":
        return BatchDraws(self.rng, len(rows), self.device)

    def follow(self, part: Draws) -> None:
        """All draw from one generator: nothing to do."""

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.rng, device=self.rng.device).to(self.device)

    def signs(self, *shape: int, shared: bool = False) -> Tensor:
        return (2 * self._uniform(1 if shared else self.count, *shape) - 1).sign()

    def offsets(self, room: int) -> Int[Tensor, " K"]:
        return (room * self._uniform(1)).long()

    def flips(self) -> Bool[Tensor, " K"]:
        return self._uniform(1) > 0.5


def window_index(
    top: Int[Tensor, " K"], left: Int[Tensor, " K"], side: int, width: int
) -> Int[Tensor, "K S"]:
    """Flat indices of a square window's pixels, row by row."""
    span = torch.arange(side, device=top.device)
    rows, columns = top[:, None] + span, left[:, None] + span
    return (rows[:, :, None] * width + columns[:, None, :]).flatten(1)


def pixels_of(index: Int[Tensor, "K S"], x: Images) -> Bool[Tensor, "K 1 H W"]:
    """Where the windows lie."""
    height, width = x.shape[2:]
    inside = torch.zeros(len(index), height * width, dtype=torch.bool, device=x.device)
    return inside.scatter(1, index, True).view(-1, 1, height, width)


def unit(patch: Tensor) -> Tensor:
    return patch.div(torch.linalg.vector_norm(patch).clamp_min(TINY))


def pyramid(side: int, flips: Bool[Tensor, " K"], dtype: torch.dtype) -> Float[Tensor, "K S"]:
    """The L2 patch: a rising and a falling half, each a stack of centred frames; unit length."""

    def half(height: int) -> Tensor:
        rows = (torch.arange(height, device=flips.device) - height // 2).abs()
        columns = (torch.arange(side, device=flips.device) - side // 2).abs()
        frames = max(height // 2, side // 2) + 1
        # the published bumps: each frame adds 1 / k^2, so that the centre is highest
        steps = torch.arange(1, frames + 1, device=flips.device, dtype=dtype) ** -2.0
        stack = steps.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], columns)]
        return unit(stack)

    patch = unit(torch.cat([half(side // 2), -half(side - side // 2)]))
    return torch.where(flips[:, None, None], patch.t(), patch).flatten(1)


def _length(delta: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return length.view(-1, 1, 1)


def _per_channel(delta: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta, dim=2, keepdim=True)
    return length + TINY


def stripes(draws: Draws, x: Images, eps: float) -> Images:
    """L-inf start: every column of every channel up or down by eps."""
    sign = draws.signs(x.shape[1], 1, x.shape[3]).to(x.dtype)
    return (x + eps * sign).clamp(0.0, 1.0)


def patch_linf(draws: Draws, x: Images, point: Images, side: int, eps: float) -> Images:
    """One window of each channel moved to a face of the ball."""
    height, width = x.shape[2:]
    index = window_index(draws.offsets(height - side), draws.offsets(width - side), side, width)
    sign = draws.signs(x.shape[1], 1, 1, shared=True).to(x.dtype)
    return torch.where(pixels_of(index, x), x + eps * sign, point).clamp(0.0, 1.0)


def tiles(draws: Draws, x: Images, eps: float) -> Images:
    """L2 start: the image tiled with patches of random sign, scaled to the ball's surface."""
    channels, height, width = x.shape[1:]
    side = max(min(height, width) // 5, 1)
    first = max(height - side * 5, 0) // 2
    flat = torch.zeros_like(x).flatten(2)
    for top in range(first, height - side + 1, side):
        for left in range(first, width - side + 1, side):
            patch = pyramid(side, draws.flips(), x.dtype)[:, None, :]
            place = torch.tensor([[top], [left]], device=x.device)
            index = window_index(place[0], place[1], side, width)[0]
            flat[:, :, index] += patch * draws.signs(channels, 1).to(x.dtype)
    return onto_sphere(flat, x, eps)


def patch_l2(draws: Draws, x: Images, point: Images, side: int, eps: float) -> Images:
    """Move the length of one window, and the unused part of eps, to another window."""
    channels, height, width = x.shape[1:]
    flat = (point - x).flatten(2)
    target = window_index(draws.offsets(height - side), draws.offsets(width - side), side, width)
    source = window_index(draws.offsets(height - side), draws.offsets(width - side), side, width)
    target, source = (i[:, None, :].expand(len(x), channels, -1) for i in (target, source))
    involved = torch.zeros_like(flat).scatter(2, target, 1.0).scatter(2, source, 1.0)
    # what is left of the budget, divided among the channels
    free = (eps**2 - _length(flat) ** 2).clamp_min(0.0) / channels
    budget = (free + _length(flat * involved) ** 2).sqrt()
    old = flat.gather(2, target)
    new = pyramid(side, draws.flips(), x.dtype)[:, None, :] * draws.signs(channels, 1).to(x.dtype)
    new = new + old / _per_channel(old)
    new = new / _per_channel(new) * budget
    return onto_sphere(flat.scatter(2, source, 0.0).scatter(2, target, new), x, eps)


def onto_sphere(flat: Float[Tensor, "B ch D"], x: Images, eps: float) -> Images:
    return (x + (flat / (_length(flat) + TINY) * eps).view_as(x)).clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Random search: moves a square patch to the ball's surface and keeps it if the margin falls.

    Needs scores only. Returns the point of the smallest margin; a preset returns the clean image
    where a last query is correct, and moves the same patch in all images of the batch.

    Attributes:
        queries: patches tried per image, until it is fooled.
        p_init: share of the image that the first patches cover, in (0, 1].
        rescale: stretch the schedule of patch sizes, made for 10,000 queries, to `queries`.
        reevaluate: query the best point again before each patch, and do not stop at a success: on
            a random victim the best score of many queries is biased by its draw.
        preset: published settings.
    """

    queries: int = 5000
    p_init: float = 0.8
    rescale: bool = True
    reevaluate: bool = False
    preset: str | None = None

    summary: ClassVar[str] = "random search with square patches, from scores alone"
    presets: ClassVar[Presets] = {
        name: {"queries": 5000, "p_init": 0.8, "rescale": name != OFFICIAL}
        for name in (TORCHATTACKS, OFFICIAL, RED_RELEASED)
    }

    def check(self) -> None:
        at_least(1, queries=self.queries)
        within("(0, 1]", p_init=self.p_init)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        if self.preset is None:
            return self.search(victim, x, y, threat, OwnDraws(ImageStreams.of(rng, x, y)))
        return self.published(victim, x, y, threat, rng=rng)

    def published(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        """The success-filtered form, with random numbers for the batch."""

        def attempt(x: Images, y: Labels) -> tuple[Images, Bool[Tensor, " B"]]:
            draws = BatchDraws(rng, len(x), x.device)
            found = self.search(victim, x, y, threat, draws, ties_fool=True)
            return found, ~correct(victim(found), y)

        return filtered(victim, x, y, lambda _: [attempt])

    def search(
        self,
        victim: Victim,
        x: Images,
        y: Labels,
        threat: Threat,
        draws: Draws,
        *,
        ties_fool: bool = False,
        by_gradients: Float[Tensor, " B"] | None = None,
    ) -> Images:
        """The best point found.

        Args:
            victim: queried for scores.
            x: clean images.
            y: their labels.
            threat: the ball.
            draws: the source of all randomness.
            ties_fool: count equal logits as a success, as published.
            by_gradients: the margin that attacks by gradients reached. Every tenth of the queries,
                images far from being fooled are skipped, but only where gradients gained about as
                much as this search: see `GRADIENT_SHARE`. None skips no image.
        """
        linf = threat.norm == math.inf
        propose = partial(patch_linf if linf else patch_l2, eps=threat.eps)

        def judge(x: Images, y: Labels) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
            with torch.no_grad():
                logits = victim(x)
            value = margin(logits, y)
            return value, value >= 0 if ties_fool else ~correct(logits, y)

        point = (stripes if linf else tiles)(draws, x, threat.eps)
        value, fooled = judge(point, y)
        given_up = torch.zeros_like(fooled)
        clean = value if by_gradients is None else judge(x, y)[0]
        seen: dict[int, Float[Tensor, " B"]] = {}
        for query in range(self.queries):
            if by_gradients is not None:
                useful = by_gradients - clean >= GRADIENT_SHARE * (value - clean)
                given_up |= self._far(query, value, seen) & useful
            rows = (~fooled & ~given_up).nonzero().flatten()
            if self.reevaluate:
                rows = torch.arange(len(x), device=x.device)
                value, _ = judge(point, y)
            if len(rows) == 0:
                break
            own = draws.of(rows)
            new = propose(own, x[rows], point[rows], self._side(query, x, odd=not linf))
            draws.follow(own)
            new_value, new_fooled = judge(new, y[rows])
            better = new_value > value[rows]
            # a success is taken whatever its margin; a single noisy answer proves nothing
            better = better if self.reevaluate else better | new_fooled
            point[rows[better]] = new[better]
            value[rows[better]] = new_value[better]
            fooled[rows] = new_fooled
        return point

    def _far(
        self, query: int, value: Float[Tensor, " B"], seen: dict[int, Float[Tensor, " B"]]
    ) -> Bool[Tensor, " B"]:
        """The images far from being fooled, at some queries; `seen` keeps earlier values."""
        none = torch.zeros_like(value, dtype=torch.bool)
        tenth = int(SEARCH_CHECK * self.queries)
        period = max(int(SEARCH_CHECK * tenth), 1)
        # with fewer than 100 queries the check period is shorter than one query
        if tenth < 10 or query == 0 or query % period:
            return none
        seen[query] = value.clone()
        if query % tenth:
            return none
        before = seen[period * (query // (10 * period))]
        # in factors of ten, since each tenfold of queries gains about as much
        remaining = math.log10(self.queries / query)
        return out_of_reach(value, before, 0.0, SEARCH_FACTOR * remaining)

    def _side(self, query: int, x: Images, *, odd: bool) -> int:
        """Side of the patches at this query."""
        place = int(query / self.queries * 10000) if self.rescale else query
        share = self.p_init / 2 ** sum(place > bound for bound in _HALVINGS)
        height, width = x.shape[2:]
        # the L2 patch is symmetric around a central pixel, so its side is odd
        side = max(round(math.sqrt(share * height * width)), 3 if odd else 1)
        if odd and side % 2 == 0:
            side += 1
        return min(side, height, width)
