"""The attack on subsets of members: which of them can be fooled by one and the same point?"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from redefense.attacks.adaptive import Support
from redefense.attacks.apgd import AutoAscent, auto_climb, face_starts
from redefense.attacks.base import Best, Look, Looker, input_gradient
from redefense.attacks.objectives import margin, targeted_margin
from redefense.errors import ConfigError
from redefense.threat import TINY, Threat
from redefense.types import Bool, Float, Images, Int, Labels

MOST_MEMBERS = 12
"""Of so many members all subsets are considered; of more, those of the ones nearest to erring."""


@dataclass(frozen=True)
class Goal:
    """What a climb aims at, for each of its images.

    Attributes:
        subset: (B, M) the members to be fooled together.
        target: (B, M) the class that each is driven towards; -1 for any wrong one.
        scale: (B, M) unit of each member's margin.
    """

    subset: Bool[Tensor, "B M"]
    target: Int[Tensor, "B M"]
    scale: Float[Tensor, "B M"]


def look_at_subset(support: Support, y: Labels, goal: Goal, temperature: float) -> Looker:
    """Looks at the smooth minimum of the scaled margins of each image's subset of members.

    A member that errs in any way counts as fooled, whatever class it was driven towards.
    """

    def look(x: Tensor, with_grad: bool) -> Look:
        x = x.detach().requires_grad_(with_grad)
        margins, right = [], []
        for place, m in enumerate(support.indices):
            with torch.set_grad_enabled(with_grad):
                logits = support.ensemble.logits_of(m, x)
                gap = margin(logits, y)
                target = goal.target[:, place]
                aimed = targeted_margin(logits, y, target.clamp_min(0))
                gap = torch.where((target >= 0) & (gap <= 0), aimed, gap)
                gap = gap / goal.scale[:, place]
                margins.append(torch.where(goal.subset[:, place], gap, math.inf))
            right.append(logits.detach())
        with torch.set_grad_enabled(with_grad):
            value = -temperature * (-torch.stack(margins, 1) / temperature).logsumexp(1)
        grad = input_gradient(value, x) if with_grad else None
        return Look(value.detach(), support.correct(right, y), grad)

    return look


@dataclass(frozen=True, kw_only=True)
class Subset(AutoAscent):
    """Auto-PGD on subsets of members, each a little more probable than those fooled so far.

    For each image and each subset that would lower the exact expected accuracy, climbs the smooth
    minimum of the subset's margins: towards any wrong class, then towards one wrong class for all,
    then towards each member's own likeliest ones. When a subset falls, what counts is the next
    larger one; an image on which all members err is done.

    The nearest published relative is the Lattice Climber (Gnecco Heredia et al., 2023), which also
    goes from a subset fooled to a larger one. It adds members one by one in the order of their
    probabilities; this attack tries every subset, aims at classes, and starts anew.

    Attributes:
        temperature: of the smooth minimum, in units of the members' margins.
        num_targets: wrong classes that all members are driven towards, one after the other.
        subsets: most subsets that are tried for an image before one falls, those nearest to it.
    """

    temperature: float = 0.125
    num_targets: int = 9
    subsets: int = 8

    adaptive: ClassVar[bool] = True
    takes_starts: ClassVar[bool] = True
    summary: ClassVar[str] = "auto-PGD on subsets of members that are to be fooled together"

    def check(self) -> None:
        AutoAscent.check(self)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be positive and finite, got {self.temperature}")
        if self.num_targets < 0:
            raise ConfigError(f"num_targets must not be negative, got {self.num_targets}")
        if self.subsets < 1:
            raise ConfigError(f"subsets must be at least 1, got {self.subsets}")

    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        return self.perturb_from(victim, x, y, threat, None, rng=rng)

    def perturb_from(
        self,
        victim: nn.Module,
        x: Images,
        y: Labels,
        threat: Threat,
        starts: Float[Tensor, "K B ch H W"] | None,
        *,
        rng: Generator,
    ) -> Images:
        support, best = Support(victim), Best.start(x)
        start = face_starts(x, y, threat, rng)
        clean = torch.stack([z.detach() for z in support.each(x)], dim=1)
        scale = clean.std(2).clamp_min(TINY)
        nearness = torch.stack([margin(z, y) for z in clean.unbind(1)], 1) / scale
        aims = self._aims(support, clean, y)
        for given in () if starts is None else starts:
            support.offer(best, given, y)
        job = torch.zeros_like(y)
        subsets, count = self._subsets(support, best.correct, nearness)
        while True:
            points = start()
            rows = ((best.correct > 0) & (job < count * len(aims))).nonzero().flatten()
            if len(rows) == 0:
                break
            which, aim = job[rows] % count[rows], job[rows] // count[rows]
            goal = Goal(subsets[rows, which], aims[aim, rows], scale[rows])
            before = best.correct[rows]
            self._climb(support, best, goal, rows, points, x, y, threat)
            job[rows] += 1
            fell = rows[best.correct[rows] < before]
            if len(fell):
                job[fell] = 0
                subsets[fell], count[fell] = self._subsets(
                    support, best.correct[fell], nearness[fell]
                )
        support.offer_clean(best, x, y)
        return best.x

    def _climb(
        self,
        support: Support,
        best: Best,
        goal: Goal,
        rows: Int[Tensor, " K"],
        points: Images,
        x: Images,
        y: Labels,
        threat: Threat,
    ) -> None:
        part = best.select(rows)
        found = Best.start(points[rows])
        look = look_at_subset(support, y[rows], goal, self.temperature)
        auto_climb(
            look, points[rows], x[rows], threat, steps=self.steps, rho=self.rho, keeper=found
        )
        support.offer(part, found.x, y[rows])
        best.update(rows, part)

    def _aims(
        self, support: Support, clean: Float[Tensor, "B M C"], y: Labels
    ) -> Int[Tensor, "A B M"]:
        """Classes to drive the members towards: none, one for all, or each member's own."""
        shares = torch.tensor(support.shares, device=clean.device, dtype=clean.dtype)
        mean = (clean.softmax(2) * shares[:, None]).sum(1).scatter(1, y[:, None], -1)
        common = mean.topk(min(self.num_targets, clean.shape[2] - 1), 1).indices
        aims = [torch.full(clean.shape[:2], -1, device=clean.device)]
        aims += [target[:, None].expand(clean.shape[:2]) for target in common.t()]
        return torch.stack(aims)

    def _subsets(
        self, support: Support, correct: Float[Tensor, " B"], nearness: Float[Tensor, "B M"]
    ) -> tuple[Bool[Tensor, "B S M"], Int[Tensor, " B"]]:
        """The smallest subsets more probable than what is fooled, nearest to falling first.

        Returns:
            The subsets, and how many of them count.
        """
        shares = torch.tensor(support.shares, device=nearness.device).double()
        members = nearness.topk(min(MOST_MEMBERS, len(shares)), 1).indices
        few = members.shape[1]
        codes = torch.arange(1, 2**few, device=nearness.device)
        masks = (codes[:, None] >> torch.arange(few, device=nearness.device)) & 1 == 1
        share = shares[members]
        mass = share @ masks.double().t()
        least = torch.where(masks, share[:, None], math.inf).amin(2)
        fooled = (1 - correct.double().clamp(0, 1))[:, None]
        wanted = (mass > fooled + 1e-8) & (mass - least <= fooled + 1e-8)
        near = torch.where(masks, nearness.gather(1, members)[:, None], math.inf).amin(2)
        near = torch.where(wanted, near, -math.inf)
        top = near.topk(min(self.subsets, len(codes)), 1)
        chosen = masks[top.indices]
        everyone = torch.zeros(
            *chosen.shape[:2], len(shares), dtype=torch.bool, device=members.device
        )
        everyone.scatter_(2, members[:, None].expand(chosen.shape), chosen)
        return everyone, (top.values > -math.inf).sum(1)
