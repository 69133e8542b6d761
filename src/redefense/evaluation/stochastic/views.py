"""Views of a stochastic network for attacks: fixed seeds, or fresh seeds at every call.

With fixed seeds points can be compared exactly, but an attack can overfit these seeds. Fresh seeds
cannot be overfitted, but comparisons between points are noisy.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, cast

import torch
from torch import Tensor

from redefense.ensembles import Ensemble, Independent
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.rng import draw_seed
from redefense.stochastic.ensemble import BLOCK, Stochastic
from redefense.types import Float, Images, Int, Logits

SMALLEST_GROUP: Final = 16
GROUP_VALUES: Final = SMALLEST_GROUP * 3 * 32 * 32
"""Values of the images of a group, for small images; smaller calls are slower per image."""


class InPlace(Ensemble):
    """A view with fixed seeds that queries each image at its own position in the batch.

    Attacks drop images that are already fooled. The noise of a seed depends on the position of an
    image in the batch, so a shorter batch would get other noise. Images are queried in fixed groups
    of consecutive positions; the missing positions of a group are filled with clean images, and
    groups without a query are skipped. A query is assigned to the nearest clean image.

    Args:
        ensemble: whose members are seeds.
        x: the clean images of the attacked batch.
    """

    def __init__(self, ensemble: Stochastic, x: Images) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble, self.x = ensemble, x
        self.size = max(SMALLEST_GROUP, GROUP_VALUES // x[0].numel())

    def logits_of(self, m: int, x: Images) -> Logits:
        # noise does not depend on positions, or an image has several points, as in a population
        if not self.ensemble.placed or len(x) > len(self.x):
            return self.ensemble.logits_of(m, x)
        places = self._places(x.detach())
        groups, rows = _groups(places, self.size)
        whole = self._filled(places, x)
        logits = [
            self.ensemble.logits_of(m, whole[group * self.size : (group + 1) * self.size])
            for group in groups
        ]
        return torch.cat(logits)[rows]

    def _filled(self, places: Int[Tensor, " K"], x: Float[Tensor, "K ch H W"]) -> Tensor:
        """The clean images, with queries at their positions."""
        return self.x.to(x.dtype).index_copy(0, places, x)

    def _places(self, x: Images) -> Int[Tensor, " K"]:
        """Distinct positions in ascending order, since attacks preserve the order of the images."""
        if len(x) >= len(self.x):
            return torch.arange(len(x), device=x.device)
        # an attacked image is nearer to its clean one than to others, except for a large budget
        distances = torch.cdist(x.flatten(1), self.x.to(x.dtype).flatten(1))
        nearest = distances.argmin(1).tolist()
        if all(a < b for a, b in pairwise(nearest)):
            return torch.tensor(nearest, device=x.device)
        # copies of one image, or points far from all: any distinct positions are valid
        free = sorted(set(range(len(self.x))) - set(nearest), reverse=True)
        seen: set[int] = set()
        for row, place in enumerate(nearest):
            nearest[row] = free.pop() if place in seen else place
            seen.add(place)
        return torch.tensor(nearest, device=x.device)


class InCalls(InPlace):
    """The same, where one call computes the draws of all members as copies of each image."""

    def __init__(self, ensemble: Stochastic, x: Images) -> None:
        super().__init__(ensemble, x)
        self.together = BLOCK

    def logits_of(self, m: int, x: Images) -> Logits:
        return self.logits_of_each([m], [x])[0]

    def member_logits(self, x: Images) -> Float[Tensor, "M B C"]:
        every = range(self.num_members)
        return torch.stack(list(self.logits_of_each(every, [x] * len(every))))

    def logits_of_each(self, members: Sequence[int], xs: Sequence[Images]) -> Sequence[Logits]:
        places = self._places(xs[0].detach())
        queried = dict(zip(members, xs, strict=True))
        found: dict[int, Logits] = {}
        for start in sorted({m - m % BLOCK for m in members}):
            block = range(start, min(start + BLOCK, self.num_members))
            # the noise of a copy depends on its position: all copies of the block are computed
            whole = [self._filled(places, queried[m]) if m in queried else self.x for m in block]
            parts, rows = _groups(places, self.ensemble.images_per_call(len(block)))
            # of the whole block, whichever of its members are queried
            seed = self.ensemble.seeds[start]
            logits = self.ensemble.draw_copies(seed, torch.stack(whole), parts)
            found |= dict(zip(block, logits[:, rows], strict=True))
        return [found[m] for m in members]


def _groups(places: Int[Tensor, " K"], size: int) -> tuple[list[int], Int[Tensor, " K"]]:
    """The groups of `size` consecutive positions that hold some, and their rows in these groups."""
    groups, order = (places // size).unique(return_inverse=True)
    return groups.tolist(), order * size + places % size


class Fresh(Ensemble):
    """A view that draws a new seed for each query of a member.

    Args:
        ensemble: an ensemble whose network is queried.
        draws: number of members of this view: the draws of one step.
        rng: generator of the seeds.
    """

    def __init__(self, ensemble: Stochastic, draws: int, rng: torch.Generator) -> None:
        super().__init__(draws, None)
        self.ensemble, self.rng = ensemble, rng
        self.together = BLOCK if ensemble.rows else 1
        self.mixture = self.mixture.to(ensemble.mixture.device)

    def logits_of(self, m: int, x: Images) -> Logits:
        return cast(Tensor, self.ensemble.sampled(rng=self.rng)(x))

    def member_logits(self, x: Images) -> Float[Tensor, "M B C"]:
        every = range(self.num_members)
        return torch.stack(list(self.logits_of_each(every, [x] * len(every))))

    def logits_of_each(self, members: Sequence[int], xs: Sequence[Images]) -> Sequence[Logits]:
        if not self.ensemble.rows:
            return super().logits_of_each(members, xs)
        found: list[Logits] = []
        for start in range(0, len(xs), BLOCK):
            copies = torch.stack(list(xs[start : start + BLOCK]))
            found += self.ensemble.draw_copies(draw_seed(self.rng), copies)
        return found


def counted(ensemble: Stochastic, meter: Meter) -> Stochastic:
    """The same network and seeds, with every pass of an image counted once per draw."""
    network = Metered(Independent([ensemble.model]), meter).member(0)
    return ensemble.on(network)
