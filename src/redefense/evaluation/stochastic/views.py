"""What attackers of a network that draws are given: seeds that stay, or fresh ones at every call.

Fixed seeds can be judged exactly and compared, but a point that fools them need not fool others.
Fresh seeds cannot be learnt by heart, but of two points the better one may have been lucky.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from redefense.ensembles import Ensemble, Independent
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.stochastic.ensemble import OneMember, Stochastic
from redefense.types import Images, Int, Logits


class InPlace(Ensemble):
    """Fixed seeds, each image asked in its own place of the batch.

    Attacks go on with those images only that still stand. The noise that a seed gives to an image
    depends on its place, so a shorter batch would meet other noise. The missing places are filled
    with the clean images; a query belongs to the clean image that it is nearest to.

    Args:
        ensemble: whose members are seeds.
        x: the clean images of the batch that is attacked.
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
        return OneMember(self, m)

    def _places(self, x: Images) -> Int[Tensor, " K"]:
        """Distinct places in rising order, since attacks keep the order of the images."""
        distances = torch.cdist(x.flatten(1), self.x.to(x.dtype).flatten(1))
        nearest = distances.argmin(1).tolist()
        if all(a < b for a, b in pairwise(nearest)):
            return torch.tensor(nearest, device=x.device)
        # copies of one image, or points far from all: any distinct places will do
        free = sorted(set(range(len(self.x))) - set(nearest), reverse=True)
        seen: set[int] = set()
        for row, place in enumerate(nearest):
            nearest[row] = free.pop() if place in seen else place
            seen.add(place)
        return torch.tensor(nearest, device=x.device)


class Fresh(Ensemble):
    """Seeds that are drawn anew each time a member is asked.

    Args:
        ensemble: whose network is asked.
        draws: how many members there seem to be: the draws of one step.
        rng: gives the seeds.
    """

    def __init__(self, ensemble: Ensemble, draws: int, rng: torch.Generator) -> None:
        super().__init__(draws, None)
        self.ensemble, self.rng = ensemble, rng
        self.mixture = self.mixture.to(ensemble.mixture.device)

    def logits_of(self, m: int, x: Images) -> Logits:
        return cast(Tensor, self.ensemble.sampled(rng=self.rng)(x))

    def member(self, m: int) -> nn.Module:
        return OneMember(self, m)


def counted(ensemble: Stochastic, meter: Meter) -> Stochastic:
    """The same network and seeds; every pass of an image is counted, one for each draw."""
    network = Metered(Independent([ensemble.model]), meter).member(0)
    return ensemble.on(network)
