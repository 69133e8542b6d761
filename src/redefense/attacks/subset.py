"""Attack on subsets of members: searches points that fool all members of a subset."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import one_hot

from redefense.attacks.adaptive import Support
from redefense.attacks.apgd import AutoAscent, auto_climb, face_starts
from redefense.attacks.base import Best, Oracle, OracleResult, input_gradient
from redefense.attacks.early_stop import early_stopping
from redefense.attacks.objectives import margin, targeted_margin
from redefense.errors import ConfigError
from redefense.limits import at_least
from redefense.threat import TINY, Threat
from redefense.types import Bool, Float, Images, Int, Labels, Logits, correct

MOST_MEMBERS = 12
"""Up to this many members all subsets are listed; with more members, those of smallest margin."""

ANY = -1
"""Marks an untargeted attack on a member."""


@dataclass(frozen=True)
class Goal:
    """Goal of an ascent, for each of its images.

    Attributes:
        subset: (B, M) the members to be fooled by one point.
        target: (B, M) target class of each member, or `ANY`.
        scale: (B, M) unit of each member's margin.
    """

    subset: Bool[Tensor, "B M"]
    target: Int[Tensor, "B M"]
    scale: Float[Tensor, "B M"]

    def select(self, rows: Int[Tensor, " K"]) -> "Goal":
        """The goals of some of the images."""
        return Goal(self.subset[rows], self.target[rows], self.scale[rows])


def subset_oracle(support: Support, y: Labels, goal: Goal, temperature: float) -> Oracle:
    """Oracle for the smooth minimum of the scaled margins of each image's subset of members.

    Queries each member only on the images whose subset contains it. A member that predicts any
    wrong class counts as fooled, whatever its target. `correct` is the fraction of the subset's
    members that are correct.
    """

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        x = x.detach().requires_grad_(with_grad)
        right = torch.zeros_like(goal.subset)
        with torch.set_grad_enabled(with_grad):
            gaps = torch.full(goal.subset.shape, math.inf, dtype=x.dtype, device=x.device)
            for place, m in enumerate(support.indices):
                rows = goal.subset[:, place].nonzero().flatten()
                if len(rows) == 0:
                    continue
                # indexing copies the images, and the graph would keep the copy
                logits = support.ensemble.logits_of(m, x if len(rows) == len(x) else x[rows])
                labels, target = y[rows], goal.target[rows, place]
                gap = margin(logits, labels)
                # ANY is no class: its result is not used
                aimed = targeted_margin(logits, labels, target.clamp_min(0))
                # once the member errs, the target is no longer needed: any wrong class counts
                gap = torch.where((target != ANY) & (gap <= 0), aimed, gap)
                gap = (gap / goal.scale[rows, place]).to(x.dtype)
                gaps = gaps.index_put((rows, torch.full_like(rows, place)), gap)
                right[rows, place] = correct(logits.detach(), labels)
            value = -temperature * (-gaps / temperature).logsumexp(1)
        grad = input_gradient(value, x) if with_grad else None
        return OracleResult(value.detach(), (right.sum(1) / goal.subset.sum(1)).to(x.dtype), grad)

    return oracle


def over_subsets(
    values: Float[Tensor, "B F"], join: Callable[[Tensor, Tensor], Tensor], empty: float
) -> Float[Tensor, "B S"]:
    """Reduce the members' values per subset; subset k contains the members of k + 1's bits."""
    table = torch.full_like(values[:, :1], empty)
    for value in values.unbind(1):
        table = torch.cat([table, join(table, value[:, None])], dim=1)
    return table[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Subset(AutoAscent):
    """Auto-PGD on subsets of members, each a little more probable than those fooled so far.

    First each member is attacked alone, untargeted and towards its likeliest wrong classes; members
    that no point fools are excluded. Then come minimal subsets of the others whose probability
    exceeds that of the members fooled by the best point so far. Each ascent maximises the smooth
    minimum of the members' margins: untargeted, from the best point so far and from a random one;
    towards one class for all, the likeliest wrong ones on average; towards mixed classes, each
    member's likeliest or second. When a point lowers the exact expected accuracy, the next larger
    subsets are attacked. An image on which all members err is done. Given starts are scored first;
    members that they fool are not attacked alone.

    At each probability reached at most `subsets` subsets are attacked, those of the highest
    smallest margin at any point scored, with `2 + num_targets + mixed` ascents each. With 8 or 12
    members most subsets are therefore never attacked.

    The nearest published relative is the Lattice Climber (Gnecco Heredia et al., "On the role of
    randomization in adversarially robust classification", 2023), which also goes from a fooled
    subset to one with one more member. It adds members to one point in one order. This attack
    restarts for each subset, tries several at each probability, and is targeted, too.

    Attributes:
        steps: gradients per ascent; many short ascents find more than few long ones.
        temperature: of the smooth minimum; a member's margins are measured in standard deviations
            of its logits on the clean image.
        num_targets: number of common target classes of all members.
        mixed: ascents in which the first members of the subset have separate targets.
        subsets: maximum number of subsets attacked at each probability reached.
        early_stop: end an ascent that is far from its goal after three tenths of its steps.
        restarts: attempts per subset and target, each from another start.
    """

    steps: int = 50
    temperature: float = 0.125
    num_targets: int = 9
    mixed: int = 8
    subsets: int = 8
    early_stop: bool = True

    adaptive: ClassVar[bool] = True
    takes_starts: ClassVar[bool] = True
    summary: ClassVar[str] = "auto-PGD on subsets of members, to be fooled by one point"

    def check(self) -> None:
        AutoAscent.check(self)
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be positive and finite, got {self.temperature}")
        at_least(0, num_targets=self.num_targets, mixed=self.mixed)
        at_least(1, subsets=self.subsets)

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
        start, search = face_starts(x, y, threat, rng), Search(self, Support(victim), x, y)
        all_images = torch.arange(len(x), device=x.device)
        search.judge(all_images, start())
        for given in () if starts is None else starts:
            search.judge(all_images, given)
        while True:
            points = start()  # for all images, so that streams do not depend on which remain
            rows, goal, advances = search.next_goals()
            if len(rows) == 0:
                break
            points = torch.where(advances.view(-1, 1, 1, 1), search.best.x[rows], points[rows])
            search.judge(rows, self._climb(search, rows, goal, points, threat))
        search.support.offer_clean(search.best, x, y)
        return search.best.x

    def _climb(
        self, search: "Search", rows: Int[Tensor, " K"], goal: Goal, points: Images, threat: Threat
    ) -> Images:
        """The best point for each image's goal; images that are done are not attacked further."""

        def oracle_of(part: Int[Tensor, " K"]) -> Oracle:
            return subset_oracle(
                search.support, search.y[rows[part]], goal.select(part), self.temperature
            )

        found = Best.start(points)
        # offset of the smooth minimum of equal values below them
        least = -self.temperature * goal.subset.sum(1).to(points.dtype).log()
        oracle = early_stopping(
            oracle_of, len(rows), steps=self.steps if self.early_stop else None, goal=least
        )
        auto_climb(
            oracle, points, search.x[rows], threat, steps=self.steps, rho=self.rho, keeper=found
        )
        return found.x


class Search:
    """State of the search for a batch, and the choice of what to attack next.

    Attributes:
        best: the best point of each image.
        erred: (B, M) whether some point fooled the member.
        members: (B, F) indices of the members whose subsets are listed.
        height: (B, S) for each subset the largest, over the points, smallest margin of its members.
        listed: (B, L) the subsets to attack now, `valid` masks the entries in use.
        tries: (B, S) ascents made for each subset; `alone`: (B, M) for each member.
    """

    def __init__(self, attack: Subset, support: Support, x: Images, y: Labels) -> None:
        self.attack, self.support, self.x, self.y = attack, support, x, y
        self.best = Best.start(x)
        with torch.no_grad():
            clean = torch.stack(list(support.each(x)), dim=1)
        # margins of members with larger logits could not be compared with the others'
        self.scale = clean.std(2).nan_to_num(1.0, 1.0, 1.0).clamp_min(TINY)
        gaps = self._margins(clean.unbind(1), torch.arange(len(x), device=x.device))
        self.members = gaps.topk(min(MOST_MEMBERS, len(support.shares)), 1).indices
        places = torch.arange(self.members.shape[1], device=x.device)
        codes = torch.arange(1, 2 ** len(places), device=x.device)
        self.masks = (codes[:, None] >> places) & 1 == 1
        shares = torch.tensor(support.shares, dtype=torch.float64, device=x.device)
        # double precision: probabilities of subsets are compared with each other below
        self.mass = over_subsets(shares[self.members], torch.add, 0.0)
        self.least = over_subsets(shares[self.members], torch.minimum, math.inf)
        self.height = torch.full_like(gaps[:, :1], -math.inf).expand(self.mass.shape).clone()
        self.tries, self.alone = (
            torch.zeros(v.shape, dtype=torch.long, device=x.device) for v in (self.mass, gaps)
        )
        self.erred = torch.zeros_like(gaps, dtype=torch.bool)
        self._name_targets(clean, shares)
        self.listed = torch.zeros(
            len(x), min(attack.subsets, len(codes)), dtype=torch.long, device=x.device
        )
        self.valid = torch.zeros_like(self.listed, dtype=torch.bool)

    def _margins(self, logits: Sequence[Logits], rows: Int[Tensor, " K"]) -> Float[Tensor, "K M"]:
        gaps = torch.stack([margin(z, self.y[rows]) for z in logits], 1) / self.scale[rows]
        return gaps.nan_to_num(nan=math.inf)  # NaN logits are misclassified

    def _name_targets(self, clean: Float[Tensor, "B M C"], shares: Float[Tensor, " M"]) -> None:
        """Wrong classes, likeliest first: each member's own, and those of the average."""
        total, classes = clean.shape[1:]
        # with two classes a targeted attack is the untargeted one
        self.targets = min(self.attack.num_targets, classes - 1) if classes > 2 else 0
        size = self.masks.sum(1)
        mixed = (2**size).clamp_max(self.attack.mixed) * (size > 1) * (classes > 2)
        self.aims = (2 + self.targets + mixed) * self.attack.restarts
        wrong = clean.softmax(2).nan_to_num(nan=0.0)
        wrong = wrong.scatter(2, self.y[:, None, None].expand(-1, total, 1), -1)
        self.own = wrong.topk(min(max(self.targets, 2), classes - 1), 2).indices
        mean = (wrong * shares[:, None].to(wrong)).sum(1)
        self.common = mean.topk(self.own.shape[2], 1).indices

    def judge(self, rows: Int[Tensor, " K"], points: Images) -> None:
        """Query all members at a point for each of some images, and update the listed subsets."""
        y = self.y[rows]
        part, erred = self.best.select(rows), self.erred[rows]
        with torch.no_grad():
            logits = self.support.each(points)
            before, odds = part.correct, self.support.log_odds(logits, y)
            part.offer(points, self.support.correct(logits, y), odds)
        self.best.update(rows, part)
        self.erred[rows] |= torch.stack([~correct(z, y) for z in logits], 1)
        near = self._margins(logits, rows).gather(1, self.members[rows])
        low = over_subsets(near, torch.minimum, math.inf)
        self.height[rows] = self.height[rows].maximum(low)
        changed = (part.correct < before) | (self.erred[rows] != erred).any(1)
        self._list(rows[changed])

    def _list(self, rows: Int[Tensor, " K"]) -> None:
        """List the minimal subsets more probable than those the best point fools, nearest first."""
        fooled = (1 - self.best.correct[rows].double().clamp(0, 1))[:, None]
        mass, least = self.mass[rows], self.least[rows]
        # minimal: more probable than what is fooled, but not without its least probable member;
        # the tolerance of 1e-6 allows for `best.correct`, which has the precision of the images
        wanted = (mass > fooled + 1e-6) & (mass - least <= fooled + 1e-6)
        never = (~self.erred[rows]).gather(1, self.members[rows]).double()
        # a member that no point fools alone is fooled in no subset either
        wanted &= never @ self.masks.double().t() == 0
        nearest = torch.where(wanted, self.height[rows], -math.inf).topk(self.listed.shape[1], 1)
        self.listed[rows], self.valid[rows] = nearest.indices, nearest.values > -math.inf

    def next_goals(self) -> tuple[Int[Tensor, " K"], Goal, Bool[Tensor, " K"]]:
        """The images that are not done, with the goal and the start of each.

        A subset's first ascent continues from the best point; the others start from random points.
        """
        alone = ~self.erred & (self.alone < (1 + self.targets) * self.attack.restarts)
        tries = self.tries.gather(1, self.listed)
        joint = self.valid & (tries < self.aims[self.listed])
        rows = ((self.best.correct > 0) & (alone.any(1) | joint.any(1))).nonzero().flatten()
        single = alone.any(1)[rows]
        member = alone[rows].to(torch.int8).argmax(1)
        # fewest attempts first, then nearest
        place = torch.where(joint, tries, self.aims.max())[rows].argmin(1)
        code = self.listed[rows, place]
        aim = torch.where(single, self.alone[rows, member], self.tries[rows, code])
        self.alone[rows[single], member[single]] += 1
        self.tries[rows[~single], code[~single]] += 1
        subset = torch.zeros_like(self.erred[rows])
        subset.scatter_(1, self.members[rows], self.masks[code])
        subset[single] = one_hot(member[single], subset.shape[1]).bool()
        aim = aim // self.attack.restarts
        advances = ~single & (aim == 0)
        target = self._targets_of(rows, subset, (aim - (~single).long()).clamp_min(0))
        return rows, Goal(subset, target, self.scale[rows]), advances

    def _targets_of(
        self, rows: Int[Tensor, " K"], subset: Bool[Tensor, "K M"], aim: Int[Tensor, " K"]
    ) -> Int[Tensor, "K M"]:
        """Target classes of an ascent by its number: any, one for all, or mixed."""
        own, rank = self.own[rows], (aim - 1).clamp(0, max(self.targets - 1, 0))
        common = self.common[rows].gather(1, rank[:, None])
        alone = own.gather(2, rank[:, None, None].expand(-1, own.shape[1], 1)).squeeze(2)
        target = torch.where(subset.sum(1, keepdim=True) == 1, alone, common)
        # shifts of 64-bit numbers are defined for fewer than 64 places only
        place = (subset.cumsum(1) - 1).clamp(0, 62)
        second = ((aim - 1 - self.targets).clamp_min(0)[:, None] >> place) & 1
        mixed = own.gather(2, second.clamp_max(own.shape[2] - 1)[:, :, None]).squeeze(2)
        target = torch.where((aim > self.targets)[:, None], mixed, target)
        return torch.where((aim == 0)[:, None], ANY, target)
