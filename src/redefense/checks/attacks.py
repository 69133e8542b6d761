"""The S-checks that run further attacks on a sample of the images (`--checks full`).

This module has the checks of the pipeline and of the attacks' strength, and the list of all.
"""

import contextlib
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, cast

import torch
from torch import Tensor

from redefense.attacks import ATTACKS, Attack
from redefense.attacks.adaptive import Hinge, MeanProbAPGD
from redefense.attacks.apgd import APGD
from redefense.attacks.square import Square
from redefense.checks.check import Check
from redefense.checks.draws import copies, expectation, pinned, planes
from redefense.checks.gradients import active, climbed, stability
from redefense.checks.sample import PIXELS, Sample
from redefense.ensembles import Ensemble, Independent
from redefense.errors import RedefenseError
from redefense.networks import copied
from redefense.rng import CHUNK, generators_kept, stream

CORNERS: Final = 1000
ROUNDING: Final = 255


def _alone(check: Callable[[Sample], Check], sample: Sample) -> list[Check]:
    return [check(sample)]


def zero_budget(sample: Sample) -> Check:
    x_adv = sample.at(0.0).run(ATTACKS["meanprob_pgd"](), "S02")
    same = torch.equal(sample.q(x_adv), sample.q(sample.x))
    return Check("S02", same, f"eps = 0 {'gives the clean' if same else 'changes'} answers")


NO_DOUBLE: Final = "the model cannot be computed in double precision"


def _in_double(sample: Sample) -> Ensemble | None:
    """The ensemble in double precision; None if it keeps a precision of its own."""
    ensemble = cast(Ensemble, copied(sample.ensemble)).double()
    try:
        with torch.no_grad():
            found = ensemble.member_logits(sample.x[:1].double())
    except (RedefenseError, RuntimeError, TypeError):
        return None
    return ensemble if found.dtype == torch.float64 else None


def batch_mates(sample: Sample) -> Check:
    """S08, in double precision, where it must be exact."""
    ensemble = _in_double(sample)
    if ensemble is None:
        return Check("S08", None, NO_DOUBLE)
    x, y, attack = sample.x.double(), sample.y, ATTACKS["hinge"]()

    def run(rows: Tensor) -> Tensor:
        return attack(ensemble, x[rows], y[rows], sample.threat, rng=stream(sample.seed, "S08"))

    all_images = torch.arange(len(x), device=x.device)
    whole, turned = run(all_images), run(all_images.flip(0)).flip(0)
    single = torch.cat([run(row) for row in all_images[:4].split(1)])
    sample.count(whole.to(sample.x.dtype))
    gap = max(float((whole - turned).abs().max()), float((whole[:4] - single).abs().max()))
    return Check("S08", gap < 1e-6, f"another batch changes an attacked pixel by at most {gap:.1g}")


def repeats(sample: Sample) -> Check:
    # a deterministic view: on the sampled one fresh draws would differ
    average = sample.ensemble.averaged()
    first, second = (sample.run(ATTACKS["pgd"](), "S09", average) for _ in range(2))
    same = torch.equal(first, second)
    return Check("S09", same, "same seed, same bits" if same else "same seed, other bits")


def precision(sample: Sample) -> Check:
    """S10: accuracy on attacked images in the evaluation's precision and in double."""
    x_adv = sample.run(ATTACKS["hinge"](), "S10")
    exact = _in_double(sample)
    if exact is None:
        return Check("S10", None, NO_DOUBLE)
    gap = float((sample.q(x_adv) - sample.q(x_adv.double(), exact)).mean())
    return Check("S10", abs(gap) <= 0.002, f"double precision changes {100 * gap:+.1f} points")


def grey(sample: Sample) -> Check:
    """S12: within 0.5 any image can become uniform grey."""
    # in L-inf, whatever the run's norm: only there 0.5 brings every pixel to grey
    x_adv = sample.at(0.5, math.inf).run(ATTACKS["meanprob_pgd"](), "S12")
    accuracy = float(sample.q(x_adv).mean())
    with torch.no_grad():
        classes = sample.ensemble.logits_of(0, sample.x[:1]).shape[1]
    # uniform grey has one label: chance, and two standard errors of the sample
    allowed = 1 / classes + 2 * 0.5 / len(sample.x) ** 0.5
    return Check("S12", accuracy <= allowed, f"accuracy at eps 0.5 is {100 * accuracy:.1f} %")


def unbounded(sample: Sample) -> Check:
    accuracy = float(sample.q(sample.at(1.0, math.inf).run(ATTACKS["hinge"](), "S13")).mean())
    return Check("S13", accuracy == 0, f"accuracy at eps 1 is {100 * accuracy:.1f} %")


def _gain(sample: Sample, less: Attack, more: Attack, name: str, allowed: float) -> Check:
    """Check that a larger attack budget lowers the accuracy by at most `allowed`."""
    short, long = sample.q(sample.run(less, name)), sample.q(sample.run(more, name))
    # the larger budget is given both results, as it includes the smaller one
    drop = float((short - torch.minimum(short, long)).mean())
    # one image of the sample may be fooled by chance
    passed = drop <= max(allowed, 1 / len(sample.x))
    message = f"accuracy is {100 * drop:.1f} points lower under {more!r} than under {less!r}"
    return Check(name, passed, message)


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
    # several corners of each image in one pass, which costs more than small images do
    together = max(1, min(CHUNK // len(sample.x), PIXELS // sample.x.numel()))
    for rounds in torch.arange(CORNERS).split(together):
        x = sample.x.repeat(len(rounds), 1, 1, 1)
        sign = torch.randint(0, 2, x.shape, generator=rng).to(x) * 2 - 1
        hits = sample.counted(sample.threat.project(x + sample.threat.eps * sign, x))
        lowest = torch.minimum(lowest, hits.view(len(rounds), -1).amin(0))
    only = int((lowest < sample.found - 1e-9).sum())
    return Check("S19", only == 0, f"{only} images fooled more often by {CORNERS} random corners")


def black_box(sample: Sample) -> Check:
    """S17b: S17 with a short Square attack, for suites without one."""
    if sample.found is None:
        return Check("S17b", None, "no white-box attack to compare with")
    # on the sampled view the best of many scores would be that of a favourable draw
    x_adv = sample.run(Square(queries=200), "S17", sample.ensemble.averaged())
    only = int((sample.q(x_adv) < sample.found - 1e-9).sum())
    return Check("S17b", only == 0, f"{only} images fooled more often by Square-200 alone")


def rounding(sample: Sample) -> Check:
    """S40: attacked images stored as 8-bit files, at an eps that is a whole number of levels."""
    whole = sample.at(max(1, round(sample.threat.eps * ROUNDING)) / ROUNDING)
    x_adv = whole.run(ATTACKS["hinge"](), "S40")
    rounded = (x_adv * ROUNDING).round() / ROUNDING
    gap = float((sample.q(rounded) - sample.q(x_adv)).mean())
    # a single image of the sample is more than one percentage point
    passed = abs(gap) <= max(0.01, 1 / len(sample.x))
    return Check("S40", passed, f"rounding to 8 bits changes {100 * gap:+.1f} points")


def another_implementation(sample: Sample) -> Check:
    """S39: the published preset of APGD compared with TorchAttacks' APGD, on member 0."""
    if importlib.util.find_spec("torchattacks") is None or sample.threat.norm != math.inf:
        return Check("S39", None, "torchattacks is not installed, or the norm is not linf")
    import torchattacks

    # a copy, since the library changes the mode of the model
    member = copied(sample.ensemble.member(0))
    alone = Independent([member])
    ours = sample.run(APGD(preset="torchattacks-3.5.1"), "S39", member)
    # torchattacks prints to stdout, which is reserved for machine-readable output
    silence = contextlib.redirect_stdout(io.StringIO())
    with generators_kept(), silence, torch.enable_grad():
        theirs = torchattacks.APGD(member, eps=sample.threat.eps)(sample.x, sample.y)
    sample.count(theirs.detach())
    a, b = (float(sample.q(x, alone).mean()) for x in (ours, theirs))
    passed = abs(a - b) <= max(0.005, 1 / len(sample.x))
    return Check("S39", passed, f"APGD on member 0: {100 * a:.1f} %, TorchAttacks {100 * b:.1f} %")


CHECKS: Final[Sequence[Callable[[Sample], Check]]] = (
    zero_budget, batch_mates, repeats, precision, grey, unbounded, more_steps, more_restarts,
    black_box, noise, stability, active, copies, pinned, planes, expectation,
    another_implementation, rounding,
)  # fmt: skip

JOBS: Final[Sequence[Callable[[Sample], list[Check]]]] = (
    *(partial(_alone, check) for check in CHECKS),
    climbed,
)
