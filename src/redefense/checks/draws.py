"""S-checks of randomness: results of attacks with the draw fixed or averaged out."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.checks.check import Check
from redefense.checks.sample import Sample
from redefense.ensembles import Independent
from redefense.rng import stream
from redefense.threat import Threat


def copies(sample: Sample) -> Check:
    """S28: an ensemble of copies of one member is deterministic and equals that member."""
    member = sample.ensemble.member(0)
    one, many = Independent([member]), Independent([member] * 3)
    gap = 0
    for name in ("hinge", "meanprob_pgd", "transfer"):
        # one stream for both, so that equality is exact
        alone, together = (sample.run(ATTACKS[name](), "S28", victim) for victim in (one, many))
        gap += int((sample.q(alone, one) - sample.q(together, one)).abs().sum())
    return Check("S28", gap == 0, f"three copies of member 0 change {gap} answers")


def pinned(sample: Sample) -> Check:
    """S29: with the draw fixed to one member, the attack equals the attack on that member."""
    mixture = [0.0] * sample.ensemble.num_members
    mixture[-1] = 1.0
    members = [sample.ensemble.member(m) for m in range(sample.ensemble.num_members)]
    fixed = Independent(members, mixture).sampled(rng=stream(0, "S29"))
    on_view, alone = (sample.run(ATTACKS["pgd"](), "S29", v) for v in (fixed, members[-1]))
    same = torch.equal(on_view, alone)
    return Check("S29", same, f"a fixed draw is {'' if same else 'not '}the member alone, exactly")


class _Plane(nn.Module):
    def __init__(self, sign: float, offset: float) -> None:
        super().__init__()
        self.sign, self.offset = sign, offset

    def forward(self, x: Tensor) -> Tensor:
        z = 4 * (self.sign * (x.flatten(1)[:, 0] - 0.5) + self.offset)
        return torch.stack([z, -z], 1)


def planes(sample: Sample) -> Check:
    """S30: two linear members that are fooled in opposite directions, then in a common one."""
    x, y = torch.full((4, 1, 1, 1), 0.5), torch.zeros(4, dtype=torch.long)
    left = []
    # opposite: boundaries at 0.4 and 0.6, one of which a point can cross; common: both at 0.4
    for second, name in ((-1.0, "opposite"), (1.0, "common")):
        pair = Independent([_Plane(1.0, 0.1), _Plane(second, 0.1)])
        toy = Sample(ensemble=pair, x=x, y=y, threat=Threat(eps=0.2), seed=sample.seed)
        found = [toy.q(toy.run(ATTACKS[a](), f"S30 {name}")) for a in ("hinge", "arc")]
        left.append(float(torch.stack(found).amin(0).mean()))
    text = f"opposite planes leave {100 * left[0]:.0f} %, a common one {100 * left[1]:.0f} %"
    return Check("S30", left == [0.5, 0.0], text)


def expectation(sample: Sample) -> Check:
    """S35: the mean gradient over many draws has the direction of the exact expectation."""
    ensemble, rng = sample.ensemble, stream(sample.seed, "S35")

    def gradient(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        point = sample.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = loss_of(point)
            if not loss.requires_grad:
                return torch.zeros_like(point).flatten(1)
            return torch.autograd.grad(loss, point)[0].flatten(1)

    def one(m: int, x: Tensor) -> Tensor:
        return F.cross_entropy(ensemble.logits_of(m, x), sample.y, reduction="sum")

    view = ensemble.sampled(rng=rng, per="image")

    def drawn(x: Tensor) -> Tensor:
        return F.cross_entropy(view(x), sample.y, reduction="sum")

    shares = ensemble.mixture.tolist()
    # the expectation over the draw is a finite sum
    exact = sum(p * gradient(partial(one, m)) for m, p in enumerate(shares) if p > 0)
    draws = sum(gradient(drawn) for _ in range(64))
    cosine = float(F.cosine_similarity(cast(Tensor, exact), cast(Tensor, draws)).mean())
    lost = not bool(cast(Tensor, exact).any())
    return Check("S35", None if lost else cosine >= 0.9,
                 "no gradient" if lost else f"cosine {cosine:.3f} after 64 draws")  # fmt: skip
