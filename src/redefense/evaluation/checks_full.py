"""The S-checks that need attacks of their own, on a sample of the images (`--checks full`)."""

import contextlib
import copy
import importlib.util
import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.attacks import ATTACKS, Attack
from redefense.attacks.adaptive import Hinge, MeanProbAPGD, Support, look_at_mean
from redefense.attacks.apgd import APGD
from redefense.attacks.base import Best, Look
from redefense.attacks.gradient import climb, random_starts
from redefense.attacks.square import Square
from redefense.ensembles import Independent, Members
from redefense.evaluation.cells import Cell
from redefense.evaluation.checks import Check
from redefense.evaluation.metrics import exact_expectation, worst_case
from redefense.rng import stream
from redefense.threat import Threat
from redefense.types import Ensemble, Images, Labels

SAMPLE = 32
"""Images looked at."""

CORNERS = 1000
TRACKED_STEPS = 50
ROUNDING = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The ensemble, a few of its images, the threat, and what the suite's white boxes achieved.

    Attributes:
        found: (n,) lowest expected correctness over the suite's bounded white-box cells; None
            where the suite has none.
    """

    ensemble: Ensemble
    x: Images
    y: Labels
    threat: Threat
    seed: int
    found: Tensor | None = None

    def run(self, attack: Attack, name: str, victim: nn.Module | None = None) -> Tensor:
        """Points that an attack finds on the ensemble, or on another victim."""
        subject = cast(nn.Module, self.ensemble) if victim is None else victim
        return attack(subject, self.x, self.y, self.threat, rng=stream(self.seed, name))

    def q(self, x: Tensor, ensemble: Ensemble | None = None) -> Tensor:
        """(n,) expected correctness."""
        judge = self.ensemble if ensemble is None else ensemble
        with torch.no_grad():
            hits = (judge.member_logits(x).argmax(-1) == self.y).double()
        return judge.mixture.to(hits) @ hits

    def at(self, eps: float) -> "Sample":
        """The same at another budget, without the suite's results."""
        threat = Threat(norm=self.threat.norm, eps=eps)
        return Sample(
            ensemble=self.ensemble, x=self.x, y=self.y, threat=threat, seed=self.seed
        )  # fmt: skip


def full_checks(
    ensemble: Ensemble,
    x: Images,
    y: Labels,
    data: Mapping[str, Any],
    records: Mapping[str, Cell],
    seed: int,
) -> list[Check]:
    """All of them, at the threat of the suite's first bounded cell, aware ones first."""
    cells = [c for c in data["cells"] if c["bounded"]]
    cells.sort(key=lambda c: not c["aware"])
    given: Mapping[str, Any] = cells[0]["threat"] if cells else {"norm": "inf", "eps": 8 / 255}
    mixture = ensemble.mixture.detach().double().cpu().numpy()
    white = [
        exact_expectation(records[c["id"]].correct[:, :SAMPLE], mixture)
        for c in cells
        if c["threat"] == given and c["attack"] != "square"
    ]
    sample = Sample(
        ensemble=ensemble,
        x=x[:SAMPLE],
        y=y[:SAMPLE],
        threat=Threat(norm=math.inf if given["norm"] == "inf" else 2.0, eps=given["eps"]),
        seed=seed,
        found=torch.from_numpy(worst_case(white)).to(x.device) if white else None,
    )
    found = [check(sample) for check in CHECKS]
    tracked = track(sample)
    return [*found, incomplete(tracked), silent(tracked), ascent(tracked)]


def zero_budget(sample: Sample) -> Check:
    x_adv = sample.at(0.0).run(ATTACKS["meanprob_pgd"](), "S02")
    same = torch.equal(sample.q(x_adv), sample.q(sample.x))
    return Check("S02", same, f"eps = 0 {'gives the clean' if same else 'changes'} answers")


def batch_mates(sample: Sample) -> Check:
    """S08, in double precision, where it must be exact."""
    ensemble = copy.deepcopy(cast(nn.Module, sample.ensemble)).double()
    x, y, attack = sample.x.double(), sample.y, ATTACKS["hinge"]()

    def run(rows: Tensor) -> Tensor:
        return attack(ensemble, x[rows], y[rows], sample.threat, rng=stream(sample.seed, "S08"))

    everyone = torch.arange(len(x), device=x.device)
    whole, turned = run(everyone), run(everyone.flip(0)).flip(0)
    single = torch.cat([run(row) for row in everyone[:4].split(1)])
    gap = max(float((whole - turned).abs().max()), float((whole[:4] - single).abs().max()))
    return Check("S08", gap < 1e-6, f"another batch moves an attacked pixel by {gap:.1g} at most")


def repeats(sample: Sample) -> Check:
    average = sample.ensemble.averaged()
    first, second = (sample.run(ATTACKS["pgd"](), "S09", average) for _ in range(2))
    same = torch.equal(first, second)
    return Check("S09", same, "same seed, same bits" if same else "same seed, other bits")


def precision(sample: Sample) -> Check:
    """S10: attacked images judged in this precision and in double."""
    x_adv = sample.run(ATTACKS["hinge"](), "S10")
    exact = cast(Members, copy.deepcopy(cast(nn.Module, sample.ensemble)).double())
    gap = float((sample.q(x_adv) - sample.q(x_adv.double(), exact)).mean())
    return Check("S10", abs(gap) <= 0.002, f"double precision changes {100 * gap:+.1f} points")


def grey(sample: Sample) -> Check:
    """S12: within 0.5 any image can become uniform grey."""
    x_adv = Sample.run(_linf(sample, 0.5), ATTACKS["meanprob_pgd"](), "S12")
    accuracy = float(sample.q(x_adv).mean())
    with torch.no_grad():
        classes = sample.ensemble.logits_of(0, sample.x[:1]).shape[1]
    allowed = 1 / classes + 2 * 0.5 / len(sample.x) ** 0.5
    return Check("S12", accuracy <= allowed, f"eps 0.5 leaves {100 * accuracy:.1f} %")


def unbounded(sample: Sample) -> Check:
    accuracy = float(sample.q(_linf(sample, 1.0).run(ATTACKS["hinge"](), "S13")).mean())
    return Check("S13", accuracy == 0, f"eps 1 leaves {100 * accuracy:.1f} %")


def _linf(sample: Sample, eps: float) -> Sample:
    return Sample(
        ensemble=sample.ensemble, x=sample.x, y=sample.y, threat=Threat(eps=eps), seed=sample.seed
    )


def _gain(sample: Sample, less: Attack, more: Attack, name: str, allowed: float) -> Check:
    """What more work finds beyond less of it."""
    short, long = sample.q(sample.run(less, name)), sample.q(sample.run(more, name))
    drop = float((short - torch.minimum(short, long)).mean())
    # one image of the sample may fall by chance
    passed = drop <= max(allowed, 1 / len(sample.x))
    return Check(name, passed, f"{100 * drop:.1f} points more fall to {more!r} than to {less!r}")


def more_steps(sample: Sample) -> Check:
    less, more = (MeanProbAPGD(steps=steps) for steps in (50, 100))
    return _gain(sample, less, more, "S14", 0.01)


def more_restarts(sample: Sample) -> Check:
    less, more = (Hinge(restarts=count) for count in (2, 4))
    return _gain(sample, less, more, "S15", 0.005)


def noise(sample: Sample) -> Check:
    """S19: random corners of the ball."""
    if sample.found is None:
        return Check("S19", None, "no white-box attack to compare with")
    lowest, rng = sample.q(sample.x), stream(sample.seed, "S19")
    for _ in range(CORNERS):
        sign = torch.randint(0, 2, sample.x.shape, generator=rng).to(sample.x) * 2 - 1
        point = sample.threat.project(sample.x + sample.threat.eps * sign, sample.x)
        lowest = torch.minimum(lowest, sample.q(point))
    only = int((lowest < sample.found - 1e-9).sum())
    return Check("S19", only == 0, f"{only} images broken more often by {CORNERS} random corners")


def black_box(sample: Sample) -> Check:
    """S17 by a short Square of our own, for suites that have none."""
    if sample.found is None:
        return Check("S17b", None, "no white-box attack to compare with")
    x_adv = sample.run(Square(queries=200), "S17", sample.ensemble.averaged())
    only = int((sample.q(x_adv) < sample.found - 1e-9).sum())
    return Check("S17b", only == 0, f"{only} images fooled more often by Square-200 alone")


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """A climb watched from outside: per visit and image the objective and expected correctness."""

    value: Tensor
    correct: Tensor
    returned: Tensor


def track(sample: Sample) -> Track:
    """Watch PGD on the mean probability for 50 steps."""
    support = Support(cast(nn.Module, sample.ensemble))
    look, seen = look_at_mean(support, sample.y), list[Look]()

    def watched(x: Tensor, with_grad: bool) -> Look:
        seen.append(look(x, with_grad))
        return seen[-1]

    start = random_starts(sample.x, sample.y, sample.threat, stream(sample.seed, "track"))()
    best = Best.start(sample.x)
    with torch.no_grad():
        climb(
            watched, start, sample.x, sample.threat, steps=TRACKED_STEPS,
            step_size=0.25 * sample.threat.eps, best=best,
        )  # fmt: skip
    value, correct = (torch.stack([getattr(s, key) for s in seen]) for key in ("value", "correct"))
    return Track(value=value, correct=correct, returned=sample.q(best.x))


def incomplete(tracked: Track) -> Check:
    """S23: what the running best still gains in the last 10 steps, of all it gained."""
    best = tracked.value.cummax(0).values
    span = (best[-1] - best[0]).clamp_min(1e-12)
    late = float(((best[-1] - best[-11]) / span).median())
    return Check("S23", late <= 0.05, f"the last 10 of {TRACKED_STEPS} steps bring {late:.3f} "
                 "of the gain (flag above 0.05)")  # fmt: skip


def silent(tracked: Track) -> Check:
    lost = int((tracked.correct.amin(0) < tracked.returned - 1e-6).sum())
    return Check("S24", lost == 0, f"{lost} images had a better point than the one returned")


def ascent(tracked: Track) -> Check:
    share = float((tracked.value[-1] >= tracked.value[0] - 1e-6).double().mean())
    return Check("S26", share >= 0.99, f"the objective rose on {100 * share:.0f} % of the images")


def stability(sample: Sample) -> Check:
    """S25: mean relative change of the loss over 100 random points within 8/255."""
    rng, threat = stream(sample.seed, "S25"), Threat(eps=8 / 255)

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(sample.ensemble.averaged()(x), sample.y, reduction="none")

    base, changes = loss(sample.x), []
    for _ in range(100):
        uniform = torch.rand(sample.x.shape, generator=rng).to(sample.x)
        point = threat.project(sample.x + threat.noise(uniform), sample.x)
        changes.append((loss(point) - base).abs() / base.clamp_min(1e-3))
    change = float(torch.stack(changes).mean())
    return Check("S25", change <= 0.1, f"mean relative loss change {change:.2f} (flag above 0.1)")


class Planted(nn.Module):
    """A two-class head per image that a point inside the ball is known to cross.

    The head separates the members' mean logits at the image from those at the planted point.
    """

    def __init__(self, ensemble: Ensemble, x: Tensor, planted: Tensor) -> None:
        super().__init__()
        self.members = ensemble.member_logits
        with torch.no_grad():
            here, there = self.members(x).mean(0), self.members(planted).mean(0)
        self.normal, self.middle = there - here, (here + there) / 2

    def forward(self, x: Tensor) -> Tensor:
        z = ((self.members(x).mean(0) - self.middle) * self.normal).sum(1)
        return torch.stack([-z, z], 1)


def active(sample: Sample) -> Check:
    """S27: a sound attack finds what was planted (after Zimmermann et al., 2022)."""
    rng = stream(sample.seed, "S27")
    sign = torch.randint(0, 2, sample.x.shape, generator=rng).to(sample.x) * 2 - 1
    planted = sample.threat.project(sample.x + 0.5 * sample.threat.eps * sign, sample.x)
    head = Planted(sample.ensemble, sample.x, planted)
    y = torch.zeros_like(sample.y)
    x_adv = ATTACKS["pgd"]()(head, sample.x, y, sample.threat, rng=stream(sample.seed, "S27 pgd"))
    with torch.no_grad():
        # where the members answer alike at both points nothing was planted
        there, hit = (head(at).argmax(1) == 1 for at in (planted, x_adv))
    if not bool(there.any()):
        return Check("S27", False, "the members answer alike within the whole ball")
    found = float(hit[there].double().mean())
    return Check("S27", found >= 0.95, f"{100 * found:.0f} % of planted weaknesses found")


def copies(sample: Sample) -> Check:
    """S28: copies of one member leave no randomness, so nothing may change."""
    member = sample.ensemble.member(0)
    one, many = Independent([member]), Independent([member] * 3)
    gap = 0
    for name in ("hinge", "meanprob_pgd", "transfer"):
        alone, together = (sample.run(ATTACKS[name](), "S28", victim) for victim in (one, many))
        gap += int((sample.q(alone, one) - sample.q(together, one)).abs().sum())
    return Check("S28", gap == 0, f"three copies of member 0 change {gap} answers")


def pinned(sample: Sample) -> Check:
    """S29: with the draw fixed to one member, the attack is the attack on it alone."""
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
    """S30: two linear members, fooled in opposite directions, then in a common one."""
    x, y = torch.full((4, 1, 1, 1), 0.5), torch.zeros(4, dtype=torch.long)
    left = []
    for second, name in ((-1.0, "opposite"), (1.0, "common")):
        pair = Independent([_Plane(1.0, 0.1), _Plane(second, 0.1)])
        toy = Sample(ensemble=pair, x=x, y=y, threat=Threat(eps=0.2), seed=sample.seed)
        found = [toy.q(toy.run(ATTACKS[a](), f"S30 {name}")) for a in ("hinge", "arc")]
        left.append(float(torch.stack(found).amin(0).mean()))
    text = f"opposite planes leave {100 * left[0]:.0f} %, a common one {100 * left[1]:.0f} %"
    return Check("S30", left == [0.5, 0.0], text)


def expectation(sample: Sample) -> Check:
    """S35: the mean gradient of many draws points where the exact one does."""
    ensemble, rng = sample.ensemble, stream(sample.seed, "S35")

    def gradient(loss_of: "partial[Tensor]") -> Tensor:
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
    exact = sum(p * gradient(partial(one, m)) for m, p in enumerate(shares) if p > 0)
    draws = sum(gradient(partial(drawn)) for _ in range(64))
    cosine = float(F.cosine_similarity(cast(Tensor, exact), cast(Tensor, draws)).mean())
    lost = not bool(cast(Tensor, exact).any())
    return Check("S35", None if lost else cosine >= 0.9,
                 "no gradient" if lost else f"cosine {cosine:.3f} after 64 draws")  # fmt: skip


def rounding(sample: Sample) -> Check:
    """S40: attacked images stored as 8-bit files, at an eps that is a whole number of levels."""
    whole = sample.at(max(1, round(sample.threat.eps * ROUNDING)) / ROUNDING)
    x_adv = whole.run(ATTACKS["hinge"](), "S40")
    rounded = (x_adv * ROUNDING).round() / ROUNDING
    gap = float((sample.q(rounded) - sample.q(x_adv)).mean())
    # one image of the sample is more than a point
    passed = abs(gap) <= max(0.01, 1 / len(sample.x))
    return Check("S40", passed, f"rounding to 8 bits changes {100 * gap:+.1f} points")


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Other libraries reseed the global generators; give them back."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)
    np.random.set_state(numpy_state)


def another_implementation(sample: Sample) -> Check:
    """S39: our APGD in the published form against TorchAttacks', on member 0."""
    if importlib.util.find_spec("torchattacks") is None or sample.threat.norm != math.inf:
        return Check("S39", None, "torchattacks is not installed, or the norm is not linf")
    import torchattacks

    member = copy.deepcopy(sample.ensemble.member(0))
    alone = Independent([member])
    ours = sample.run(APGD(preset="torchattacks-3.5.1"), "S39", member)
    # it prints, and what we print may be read by a machine
    silence = contextlib.redirect_stdout(io.StringIO())
    with global_generators_kept(), silence, torch.enable_grad():
        theirs = torchattacks.APGD(member, eps=sample.threat.eps)(sample.x, sample.y)
    a, b = (float(sample.q(x, alone).mean()) for x in (ours, theirs))
    passed = abs(a - b) <= max(0.005, 1 / len(sample.x))
    return Check("S39", passed, f"APGD on member 0: {100 * a:.1f} %, TorchAttacks {100 * b:.1f} %")


CHECKS: Sequence[Any] = (
    zero_budget, batch_mates, repeats, precision, grey, unbounded, more_steps, more_restarts,
    black_box, noise, stability, active, copies, pinned, planes, expectation,
    another_implementation, rounding,
)  # fmt: skip
