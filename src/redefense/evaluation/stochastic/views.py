"""Views of a stochastic network for attacks: fixed seeds, or fresh seeds at every call.

With fixed seeds points can be compared exactly, but an attack can overfit these seeds. Fresh seeds
cannot be overfitted, but comparisons between points are noisy.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from redefense.ensembles import Ensemble, Independent, MemberOf
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.stochastic.ensemble import Stochastic
from redefense.types import Images, Int, Logits


class InPlace(Ensemble):
    """A view with fixed seeds that queries each image at its own position in the batch.

    Attacks drop images that are already fooled. The noise of a seed depends on the position of an
    image in the batch, so a shorter batch would get other noise. The missing positions are filled
    with clean images; a query is assigned to the nearest clean image.

    Args:
        ensemble: an ensemble whose members are seeds.
        x: the clean images of the attacked batch.
    """

    def __init__(self, ensemble: Ensemble, x: Images) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble, self.x = ensemble, x

    def logits_of(self, m: int, x: Images) -> Logits:
        if len(x) >= len(self.x):
            return self.ensemble.logits_of(m, x)
        places = self._places(x.detach())
        whole = self.x.to(x.dtype).index_copy(0, places, x)
        return self.ensemble.logits_of(m, whole)[places]

    def member(self, m: int) -> nn.Module:
        return MemberOf(self, m)

    def _places(self, x: Images) -> Int[Tensor, " K"]:
        """Distinct positions in ascending order, since attacks preserve the order of the images."""
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


class Fresh(Ensemble):
    """A view that draws a new seed for each query of a member.

    Args:
        ensemble: an ensemble whose network is queried.
        draws: number of members of this view: the draws of one step.
        rng: generator of the seeds.
    """

    def __init__(self, ensemble: Ensemble, draws: int, rng: torch.Generator) -> None:
        super().__init__(draws, None)
        self.ensemble, self.rng = ensemble, rng
        self.mixture = self.mixture.to(ensemble.mixture.device)

    def logits_of(self, m: int, x: Images) -> Logits:
        return cast(Tensor, self.ensemble.sampled(rng=self.rng)(x))

    def member(self, m: int) -> nn.Module:
        return MemberOf(self, m)


def counted(ensemble: Stochastic, meter: Meter) -> Stochastic:
    """The same network and seeds, with every pass of an image counted once per draw."""
    network = Metered(Independent([ensemble.model]), meter).member(0)
    return ensemble.on(network)
