"""Pixle: copies pixels of an image to random places of it, in lock-step over the batch."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from redefense.attacks.base import TORCHATTACKS, Attack, Distortion, Presets
from redefense.attacks.pixels import (
    format_of,
    logits_at,
    numpy_states,
    rechecks,
    true_margins,
    true_probs,
)
from redefense.errors import ConfigError
from redefense.limits import at_least
from redefense.rng import ImageStreams
from redefense.threat import Threat
from redefense.types import Bool, Float, Images, Int, Labels, Victim, correct


def move_pixels(
    source: Images, base: Images, origins: Int[Tensor, "B k"], destinations: Int[Tensor, "B k"]
) -> Images:
    """Copy pixels of `source` into `base`, at flat positions; -1 as a destination copies nothing.

    Of two with the same destination the later one is used, on every device.
    """
    area = source.shape[2] * source.shape[3]
    order = torch.arange(origins.shape[1], device=source.device).expand_as(origins)
    winner = torch.full((len(source), area + 1), -1, device=source.device)
    # position `area` takes what is copied nowhere
    place = torch.where(destinations < 0, area, destinations)
    winner = winner.scatter_reduce(1, place, order, "amax")[:, :area]
    taken = origins.gather(1, winner.clamp_min(0))[:, None].expand(-1, source.shape[1], -1)
    moved = source.flatten(2).gather(2, taken)
    moved = torch.where(winner[:, None] >= 0, moved, base.flatten(2)).view(source.shape)
    return moved.contiguous(memory_format=format_of(source))


@dataclass
class StreamPatches:
    """Random windows and destinations over the whole image, from streams of the images."""

    streams: ImageStreams
    height: int
    width: int
    heights: tuple[int, int]
    widths: tuple[int, int]

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Flat origins and destinations (A, k) for the images `rows`."""
        mine = self.streams.select(rows)
        tall, wide = (
            mine.integers(min(low, size), min(high, size) + 1)
            for (low, high), size in ((self.heights, self.height), (self.widths, self.width))
        )
        top, left = (
            mine.integers(0, self.height - tall + 1),
            mine.integers(0, self.width - wide + 1),
        )
        most = min(self.heights[1], self.height) * min(self.widths[1], self.width)
        # as many as the largest window needs: all streams advance by the same count
        destinations = mine.integers(0, self.height * self.width, most)
        self.streams.counter = mine.counter
        k = torch.arange(most, device=rows.device)
        origins = (
            (top[:, None] + k // wide[:, None]) * self.width + left[:, None] + k % wide[:, None]
        )
        valid = k < (tall * wide)[:, None]
        return origins.where(valid, 0), destinations.where(valid, -1)


@dataclass
class NumpyPatches:
    """Windows and destinations as in TorchAttacks: never in the last row or column."""

    states: list[np.random.RandomState]
    height: int
    width: int
    heights: tuple[int, int]
    widths: tuple[int, int]

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        most = self.heights[1] * self.widths[1]
        origins = np.zeros((len(rows), most), dtype=np.int64)
        destinations = np.full((len(rows), most), -1)
        for i, row in enumerate(rows.tolist()):
            state = self.states[row]
            u, v = state.uniform(0, 1, 2)
            wide = state.randint(self.widths[0], self.widths[1] + 1)
            tall = state.randint(self.heights[0], self.heights[1] + 1)
            left, top = int(u * (self.width - 1)), int(v * (self.height - 1))
            wide, tall = min(wide, self.width - left), min(tall, self.height - top)
            k = np.arange(wide * tall)
            origins[i, : len(k)] = (top + k // wide) * self.width + left + k % wide
            # the library's first number is the row; it scales it by the width, as in a square
            to = state.uniform(0, 1, (len(k), 2))
            down = (to[:, 0] * (self.height - 1)).astype(np.int64)
            destinations[i, : len(k)] = down * self.width + (to[:, 1] * (self.width - 1)).astype(
                np.int64
            )
        device = rows.device
        return torch.from_numpy(origins).to(device), torch.from_numpy(destinations).to(device)


@dataclass(frozen=True, kw_only=True)
class Pixle(Attack):
    """Copies pixels of an image to random places of it (Pomponi et al., 2022).

    A candidate copies a random window of the clean image, pixel by pixel, to random positions of
    the best image so far. The default makes one query per candidate, accepts every improvement of
    the margin, and draws over the whole image, which need not be square. It returns the first
    success, else the best candidate.

    Attributes:
        height: smallest and largest height of the window, in pixels.
        width: smallest and largest width.
        restarts: rounds.
        iterations: candidates per round.
        recheck: query the victim again after a success, as the library does; this matters only for
            a randomized victim. None: in presets only.
        preset: published settings: scores by probability and copies into an image that only changes
            between rounds, even to a worse one if none was better.
    """

    height: tuple[int, int] = (2, 10)
    width: tuple[int, int] = (2, 10)
    restarts: int = 20
    iterations: int = 20
    recheck: bool | None = None
    preset: str | None = None

    bounded: ClassVar[bool] = False
    stated: ClassVar[Distortion | None] = ("l0", 10.0)
    summary: ClassVar[str] = "copies pixels of the image to random places of it, black box"
    presets: ClassVar[Presets] = {
        TORCHATTACKS: {"height": (2, 10), "width": (2, 10), "restarts": 20, "iterations": 10}
    }

    def check(self) -> None:
        for name, (low, high) in (("height", self.height), ("width", self.width)):
            if not 1 <= low <= high:
                raise ConfigError(f"{name} must be 1 <= low <= high, got {(low, high)}")
        at_least(1, restarts=self.restarts, iterations=self.iterations)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        size = (x.shape[2], x.shape[3], self.height, self.width)
        if self.preset is None:
            return self._strong(victim, x, y, StreamPatches(ImageStreams.of(rng, x, y), *size))
        return self._published(victim, x, y, NumpyPatches(numpy_states(rng, x, y), *size))

    def _judge(
        self, victim: Victim, x: Images, y: Labels
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Energies, lower is better, and successes."""
        logits = logits_at(victim, x)
        energy = (true_margins if self.preset is None else true_probs)(logits, y)
        if rechecks(self.recheck, self.preset):
            logits = logits_at(victim, x)
        return energy, ~correct(logits, y)

    def _strong(self, victim: Victim, x: Images, y: Labels, patches: StreamPatches) -> Images:
        # any candidate is better than the clean image
        best, lowest = x.clone(), torch.full_like(y, math.inf, dtype=x.dtype)
        rows = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts * self.iterations):
            if not len(rows):
                break
            candidate = move_pixels(x[rows], best[rows], *patches.draw(rows))
            energy, fooled = self._judge(victim, candidate, y[rows])
            better = (energy < lowest[rows]) | fooled
            taken = rows[better]
            best[taken], lowest[taken] = candidate[better], energy[better].to(x.dtype)
            rows = rows[~fooled]
        return best

    def _published(self, victim: Victim, x: Images, y: Labels, patches: NumpyPatches) -> Images:
        base, best, found = x.clone(), x.clone(), torch.zeros_like(y, dtype=torch.bool)
        lowest = true_probs(logits_at(victim, x), y)
        rows = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            candidate = base[rows]
            for _ in range(self.iterations):
                if not len(rows):
                    return base
                candidate = move_pixels(x[rows], base[rows], *patches.draw(rows))
                energy, fooled = self._judge(victim, candidate, y[rows])
                better = energy < lowest[rows]
                taken = rows[better]
                best[taken], lowest[taken], found[taken] = candidate[better], energy[better], True
                base[rows[fooled]] = candidate[fooled]
                rows, candidate = rows[~fooled], candidate[~fooled]
            base[rows] = torch.where(found[rows, None, None, None], best[rows], candidate)
        return base
