"""OnePixel, and functions shared by the black-box attacks that change few pixels.

All images take each step together, with one forward pass for all candidates. An image is removed
from the batch when it is misclassified. Each image has its own random stream, so that its result
does not depend on the rest of the batch. The threat does not bound them: OnePixel bounds the number
of pixels, Pixle (in `pixle`) bounds nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redefense.attacks.base import TORCHATTACKS, Attack, Distortion, Presets
from redefense.attacks.objectives import margin
from redefense.limits import at_least
from redefense.rng import ImageStreams
from redefense.threat import Threat
from redefense.types import Bool, Float, Images, Int, Labels, Logits, Victim, correct

_QUERIES = {"cpu": 64}  # candidates in one forward pass: larger batches exceed a processor's cache
_QUERIES_ELSEWHERE = 1024  # uses an accelerator fully and bounds the memory


def logits_at(victim: Victim, x: Images) -> Logits:
    """(B, C) logits without a graph, in forward passes of bounded size."""
    size = _QUERIES.get(x.device.type, _QUERIES_ELSEWHERE)
    with torch.no_grad():
        return torch.cat([cast(Tensor, victim(part)) for part in x.split(size)])


def format_of(x: Images) -> torch.memory_format:
    """The memory format of the images; candidates use it, since convolutions are faster in one."""
    dense = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if dense else torch.channels_last


def numpy_states(rng: torch.Generator, x: Images, y: Labels) -> list[np.random.RandomState]:
    """One numpy stream per image, for presets of libraries that draw from numpy."""
    # RandomState accepts seeds of 32 bits
    seeds = ImageStreams.of(rng, x, y).integers(0, 2**32)
    return [np.random.RandomState(seed) for seed in seeds.tolist()]


def rechecks(recheck: bool | None, preset: str | None) -> bool:
    """Whether a success is verified by a second query."""
    return preset is not None if recheck is None else recheck


def true_probs(logits: Logits, y: Labels) -> Float[Tensor, " B"]:
    """(B,) probability of the true class."""
    return logits.softmax(1).gather(1, y[:, None]).squeeze(1)


def true_margins(logits: Logits, y: Labels) -> Float[Tensor, " B"]:
    """(B,) true logit minus the best wrong one; negative if misclassified."""
    return -margin(logits, y)


def paint(
    x: Images,
    rows: Int[Tensor, "B P k"],
    columns: Int[Tensor, "B P k"],
    colours: Float[Tensor, "B P k ch"],
) -> Float[Tensor, "B*P ch H W"]:
    """P copies of each image with k pixels set; of coinciding pixels the later one is used."""
    count, copies, pixels = rows.shape
    out = x.repeat_interleave(copies, dim=0).contiguous(memory_format=format_of(x))
    each = torch.arange(count * copies, device=x.device)
    for i in range(pixels):
        place = (each, slice(None), rows[..., i].flatten(), columns[..., i].flatten())
        out[place] = colours[:, :, i].flatten(0, 1).to(x.dtype)
    return out


def paint_genes(x: Images, genes: Float[Tensor, "B P V"]) -> Float[Tensor, "B*P ch H W"]:
    """Paint candidates given by numbers in [0, 1]: row, column and colour of each pixel."""
    channels, height, width = x.shape[1:]
    pixel = genes.unflatten(2, (-1, 2 + channels))
    rows, columns = (
        # SciPy's order of operations, centre plus offset, for equal bits in the preset
        (0.5 * size + (pixel[..., i] - 0.5) * size).long().clamp(0, size - 1)
        for i, size in enumerate((height, width))
    )
    return paint(x, rows, columns, 0.5 + (pixel[..., 2:] - 0.5))


@dataclass
class StreamProposals:
    """best + F (a - b) with F in [0.5, 1) drawn per image, from streams of the images.

    Positions outside the image are redrawn; colours outside [0, 1] are clipped to black or white,
    the strongest ones.
    """

    streams: ImageStreams
    size: int
    pixels: int
    channels: int

    def first(self) -> Float[Tensor, "B P V"]:
        """The first population."""
        return self.streams.uniform(self.size, self.pixels * (2 + self.channels))

    def trials(self, population: Tensor, rows: Tensor) -> Float[Tensor, "A P V"]:
        """Candidates for the images `rows`; the best of a population has index 0."""
        mine = self.streams.select(rows)
        a = mine.integers(0, self.size - 1, self.size)
        b = mine.integers(0, self.size - 2, self.size)
        scale = 0.5 + 0.5 * mine.uniform(1, 1)
        fresh = mine.uniform(*population.shape[1:])
        self.streams.counter = mine.counter
        own = torch.arange(self.size, device=a.device)
        # distinct numbers from smaller ranges: skip the own index, then the two that are taken
        a = a + (a >= own).long()
        low, high = torch.minimum(a, own), torch.maximum(a, own)
        b = b + (b >= low).long()
        b = b + (b >= high).long()
        each = torch.arange(len(rows), device=a.device)[:, None]
        # "best1": every candidate starts from the best one, as SciPy's solver does by default
        trial = population[:, :1] + scale * (population[each, a] - population[each, b])
        place = torch.arange(trial.shape[2], device=a.device) % (2 + self.channels) < 2
        outside = place & ((trial < 0) | (trial > 1))
        return torch.where(outside, fresh, trial.clamp(0.0, 1.0))


@dataclass
class NumpyProposals:
    """The same step with exactly the random numbers of SciPy's solver in TorchAttacks."""

    states: list[np.random.RandomState]
    size: int
    genes: int
    device: torch.device

    def first(self) -> Tensor:
        rows = [state.random_sample((self.size, self.genes)) for state in self.states]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def trials(self, population: Tensor, rows: Tensor) -> Tensor:
        numbers = population.cpu().numpy()
        trials = [self._of(self.states[i], numbers[j]) for j, i in enumerate(rows.tolist())]
        return torch.from_numpy(np.stack(trials)).to(self.device)

    def _of(self, state: np.random.RandomState, pop: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = state.rand() * 0.5 + 0.5
        pairs = np.empty((self.size, 2), dtype=np.int64)
        for i in range(self.size):
            # the calls repeat those of the solver, so that its random numbers come out in the same
            # order
            state.randint(0, self.genes)  # where a crossover would begin
            others = [j for j in range(self.size) if j != i]
            state.shuffle(others)
            pairs[i] = others[:2]
            state.rand(self.genes)  # the crossover, which takes every gene
        trial = pop[0] + scale * (pop[pairs[:, 0]] - pop[pairs[:, 1]])
        outside = (trial < 0) | (trial > 1)
        trial[outside] = state.rand(int(outside.sum()))
        return cast(NDArray[np.float64], trial)


Proposals = StreamProposals | NumpyProposals
"""Source of the candidates of a differential evolution."""

Score = Callable[[Tensor, Tensor], tuple[Float[Tensor, "A P"], Bool[Tensor, "A P"]]]
"""Energies, lower is better, and successes of candidates (A, P, V) for the images `rows` (A,)."""


def evolve(
    proposals: Proposals,
    score: Score,
    recheck: Callable[[Tensor, Tensor], Bool[Tensor, " A"]] | None,
    *,
    generations: int,
    check_first: bool,
) -> Float[Tensor, "B V"]:
    """Differential evolution of all images in lock-step.

    Args:
        proposals: candidates.
        score: their energies and successes.
        recheck: queries again whether the best genes (A, V) of the images `rows` succeed; None uses
            the result of their scoring.
        generations: maximum number; an image stops after one in which its best candidate succeeds.
        check_first: an image may also stop before the first generation.

    Returns:
        The best genes of each image.
    """
    population = proposals.first()
    rows = torch.arange(len(population), device=population.device)
    energy, fooled = score(population, rows)
    lead = energy.argmin(1)
    # the best candidate has index 0, where `trials` expects it
    for values in (population, energy, fooled):
        values[rows, 0], values[rows, lead] = values[rows, lead], values[rows, 0]
    for generation in range(generations + 1):
        if generation > 0:
            mine, level, wins = population[rows], energy[rows], fooled[rows]
            trials = proposals.trials(mine, rows)
            values, hits = score(trials, rows)
            better = values < level
            mine = torch.where(better[..., None], trials, mine)
            level, wins = torch.where(better, values, level), torch.where(better, hits, wins)
            # the first of the lowest accepted ones becomes the best, if it is lower than the best
            value, lead = level.masked_fill(~better, math.inf).min(1)
            lead = torch.where(value < level[:, 0], lead, 0)
            each = torch.arange(len(rows), device=rows.device)
            for values in (mine, level, wins):
                values[:, 0] = values[each, lead]
            population[rows], energy[rows], fooled[rows] = mine, level, wins
        if generation > 0 or check_first:
            stop = fooled[rows, 0] if recheck is None else recheck(population[rows, 0], rows)
            rows = rows[~stop]
        if not len(rows):
            break
    return population[:, 0]


@dataclass(frozen=True, kw_only=True)
class OnePixel(Attack):
    """Few pixels of any colour, found by differential evolution (Su et al., 2019).

    The default makes at most popsize * (steps + 1) = 5,100 queries, about Square's budget, and
    stops at the first success. It always returns the best candidate found.

    Attributes:
        pixels: number of pixels that may change.
        steps: generations.
        popsize: candidates per generation.
        recheck: query the victim again before an image stops, as the library does; this matters
            only for a randomized victim. None: in presets only.
        preset: published settings: 120 queries, on probabilities, and a population of
            max(5, popsize rounded down to a multiple of the genes).
    """

    pixels: int = 1
    steps: int = 50
    popsize: int = 100
    recheck: bool | None = None
    preset: str | None = None

    bounded: ClassVar[bool] = False
    stated: ClassVar[Distortion | None] = ("l0", 1.0)
    summary: ClassVar[str] = "few pixels of any colour by differential evolution, black box"
    presets: ClassVar[Presets] = {TORCHATTACKS: {"steps": 10, "popsize": 10}}

    @property
    def scored_at(self) -> Distortion:
        return "l0", float(self.pixels)

    def check(self) -> None:
        at_least(1, pixels=self.pixels)
        at_least(0, steps=self.steps)
        # a candidate needs the best one and two others besides itself
        at_least(4, popsize=self.popsize)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        published = self.preset is not None
        energy_of = true_probs if published else true_margins

        def score(genes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            copies = genes.shape[1]
            logits = logits_at(victim, paint_genes(x[rows], genes))
            true = y[rows].repeat_interleave(copies)
            energy, fooled = energy_of(logits, true), ~correct(logits, true)
            return energy.view(-1, copies), fooled.view(-1, copies)

        def fools(genes: Tensor, rows: Tensor) -> Tensor:
            return ~correct(logits_at(victim, paint_genes(x[rows], genes[:, None])), y[rows])

        genes = evolve(
            self._numpy_proposals(x, y, rng) if published else self._proposals(x, y, rng),
            score,
            fools if rechecks(self.recheck, self.preset) else None,
            generations=self.steps,
            check_first=not published,
        )
        return paint_genes(x, genes[:, None])

    def _proposals(self, x: Images, y: Labels, rng: torch.Generator) -> Proposals:
        return StreamProposals(ImageStreams.of(rng, x, y), self.popsize, self.pixels, x.shape[1])

    def _numpy_proposals(self, x: Images, y: Labels, rng: torch.Generator) -> Proposals:
        genes = self.pixels * (2 + x.shape[1])
        # TorchAttacks rounds to a multiple of the genes; SciPy's solver takes at least five
        size = max(5, max(1, self.popsize // genes) * genes)
        return NumpyProposals(numpy_states(rng, x, y), size, genes, x.device)
