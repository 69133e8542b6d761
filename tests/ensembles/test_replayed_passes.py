"""Recorded passes of members, on the tape in place of CUDA graphs: attacks find the same points."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redefense.attacks import APGDT, ATTACKS, PGD, Attack
from redefense.ensembles import Ensemble, Hyper, Independent, kernels_kept, recorded
from redefense.ensembles.configs import HyperConfig
from redefense.ensembles.recorded_passes import RecordedPasses
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.rng import stream
from redefense.threat import Threat
from tape import TapeRecorder

SHAPE, COUNT = (3, 8, 8), 4
QUICK: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 8},
    "apgdt": {"steps": 4},
    "arc": {"restarts": 1, "steps": 4},
    "autoattack": {"steps": 4, "queries": 8},
    "cw": {"steps": 6, "searches": 2},
    "di2fgsm": {"steps": 6},
    "eotpgd": {"draws": 2, "steps": 6},
    "fab": {"steps": 4},
    "hinge": {"steps": 6, "restarts": 2},
    "meanprob_apgd": {"steps": 8, "restarts": 1},
    "meanprob_pgd": {"steps": 6},
    "onepixel": {"steps": 4, "popsize": 4},
    "pixle": {"restarts": 3, "iterations": 2},
    "sparsefool": {"steps": 2},
    "square": {"queries": 12},
    "subset": {"steps": 4, "num_targets": 2, "mixed": 1, "subsets": 1},
    "transfer": {"attack": APGDT(steps=4)},
}
STEADY = {"bim", "eotpgd", "meanprob_pgd", "mim", "pgd"}
"""Attacks that ask about all images again and again; others may ask too seldom to be recorded."""


def net(seed: int, classes: int = 5) -> nn.Module:
    rng = stream(seed, "net")
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, classes),
    )  # fmt: skip
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=rng) / max(1, p[0].numel()) ** 0.5
    return made.eval()


def members() -> Independent:
    ensemble = Independent([net(0), net(1)], [0.25, 0.75])
    return ensemble.eval()


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = 0.1 + 0.8 * torch.rand(COUNT, *SHAPE, generator=stream(seed, "images"))
    return x, torch.arange(COUNT) % 5


def replaying(ensemble: Ensemble, said: list[str] | None = None, **settings: Any) -> RecordedPasses:
    said = [] if said is None else said
    return RecordedPasses(ensemble, TapeRecorder(), said.append, settling=2, **settings)


def points(attack: Attack, ensemble: Ensemble, view: str) -> tuple[Tensor, int, int]:
    """What the attack finds, and the passes that were counted."""
    (x, y), meter = images(), Meter()
    counted = Metered(ensemble, meter)
    victim: nn.Module = counted
    if view != "members":
        sampled = counted.sampled(rng=stream(1, "draws"))
        victim = sampled if view == "sampled" else counted.averaged()
    found = attack(victim, x, y, Threat(eps=0.05), rng=stream(3))
    return found, meter.forwards, meter.backwards


CASES = [
    (name, view)
    for name in sorted(ATTACKS)
    for view in (("members",) if ATTACKS[name].adaptive else ("averaged", "sampled"))
]


@pytest.mark.parametrize(("name", "view"), CASES)
def test_every_attack_finds_the_same_points_at_the_same_cost(name: str, view: str) -> None:
    attack = ATTACKS[name](**QUICK.get(name, {}))
    passes = replaying(members())
    plain, mine = points(attack, members(), view), points(attack, passes, view)
    assert torch.equal(mine[0], plain[0])
    assert mine[1:] == plain[1:]
    assert passes.why is None
    assert name not in STEADY or passes.counts["replayed"] > 0


def test_written_kernels_are_those_of_the_evaluation() -> None:
    config = HyperConfig(model="digits-cnn", num_members=2, unit=16, embedding=3, hidden=3)
    ensemble = config.build(num_classes=10, shape=SHAPE, seed=0).eval()
    said: list[str] = []
    plain = points(PGD(steps=4), ensemble, "averaged")
    with recorded(ensemble, TapeRecorder(), said.append, settling=2) as passes:
        # the second attack replays what the first one has recorded
        found = [points(PGD(steps=4), passes, "averaged") for _ in range(2)]
        assert isinstance(passes, RecordedPasses)
        assert passes.counts["replayed"] > 0
    assert said == []
    assert all(torch.equal(one[0], plain[0]) for one in found)


def test_without_a_recorder_the_ensemble_is_asked_itself() -> None:
    ensemble = members()
    with recorded(ensemble, None, print) as passes:
        assert passes is ensemble


def settled(passes: RecordedPasses, *, grad: bool = True) -> RecordedPasses:
    """Until both members' passes are replayed."""
    for k in range(5):
        x = images(k)[0].requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            passes.member_logits(x)
    return passes


def gradient(ensemble: Ensemble, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(ensemble.logits_of(0, x).square().sum(), x)
    return found


def frozen(ensemble: Ensemble) -> Ensemble:
    return ensemble.requires_grad_(False)


def test_gradients_may_be_asked_for_late_often_and_after_other_images() -> None:
    ensemble = frozen(members())
    passes, pull = settled(replaying(ensemble)), torch.randn(2, COUNT, 5, generator=stream(2))
    (first, _), (second, _) = images(7), images(8)
    leaves = [x.clone().requires_grad_() for x in (first, second)]
    logits = [passes.logits_of(0, leaf) for leaf in leaves]
    for way in (pull, -pull, pull.mT.contiguous().mT):
        for leaf, answer, by in zip(leaves, logits, way, strict=True):
            (found,) = torch.autograd.grad(answer, leaf, by, retain_graph=True)
            own = leaf.detach().requires_grad_()
            (expected,) = torch.autograd.grad(ensemble.logits_of(0, own), own, by)
            assert torch.equal(found, expected)
    assert passes.counts["replayed"] >= 2


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    passes = settled(replaying(frozen(members())))
    x = images()[0].requires_grad_()
    (grad,) = torch.autograd.grad(passes.logits_of(0, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(grad.sum(), x)


def test_weights_that_ask_for_gradients_get_them() -> None:
    ensemble = members()
    passes = settled(replaying(ensemble))
    assert passes.counts["replayed"] == 0
    passes.logits_of(0, images()[0]).sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters_of(0))


def test_what_changes_in_place_is_followed() -> None:
    ensemble = frozen(members())
    passes = settled(replaying(ensemble))
    with torch.no_grad():
        for p in ensemble.parameters():
            p.mul_(0.5)
    before = passes.counts["replayed"]
    assert torch.equal(gradient(passes, images()[0]), gradient(ensemble, images()[0]))
    assert passes.counts["replayed"] == before + 1


def test_the_oldest_recording_is_given_up_and_then_must_wait_longer() -> None:
    ensemble = frozen(members())
    passes = replaying(ensemble, most=1)
    counts = []
    for _ in range(3):
        for m in (0, 1):
            for k in range(9):
                x, _ = images(k)
                assert torch.equal(passes.logits_of(m, x), ensemble.logits_of(m, x))
            counts.append(passes.counts["replayed"])
    # 9 passes less 2 that settle, one that records, one that proves; then 4, 8 that settle
    assert counts == [5, 10, 13, 16, 16, 16]


def test_recordings_that_outgrow_their_room_are_given_up() -> None:
    ensemble = frozen(members())

    class Large(TapeRecorder):
        def record(self, *given: Any, **named: Any) -> Any:
            made = super().record(*given, **named)
            return type(made)(made.outputs, made.replay, made.reads, 0.0, 100)

    passes = RecordedPasses(ensemble, Large(), list[str]().append, settling=2, room=150)
    for k in range(5):
        x, _ = images(k)
        assert torch.equal(passes.member_logits(x), ensemble.member_logits(x))
    assert passes.counts["replayed"] < 4


# --- mistakes on purpose ----------------------------------------------------------------------


class Mistaken(nn.Module):
    def __init__(self, mistake: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.inner, self.mistake, self.calls = net(0), mistake, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.mistake(self.inner(x), self.calls)


MISTAKES: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "reads a number": (lambda z, n: z * (2.0 if z.sum().item() > 0 else 1.0), "reads numbers"),
    "takes by a mask": (lambda z, n: z + z.detach()[z.detach() > 0].mean(), "reads numbers"),
    "draws": (lambda z, n: z + torch.rand((), generator=stream(3)), "draws random"),
    "makes a constant": (lambda z, n: z * torch.tensor(1.5), "undeclared"),
    "changes with each call": (lambda z, n: z * (1 + n / 100), "was not bit-identical"),
    "has no gradient": (lambda z, n: z.detach(), "no gradient"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_member_that_cannot_be_recorded_is_asked_itself(mistake: str) -> None:
    wrong, why = MISTAKES[mistake]
    said: list[str] = []
    plain, mine = (frozen(Independent([Mistaken(wrong)]).eval()) for _ in range(2))
    passes = replaying(mine, said)
    for k in range(6):
        x = images(k)[0].requires_grad_()
        found = passes.logits_of(0, x)
        if "call" not in mistake:
            assert torch.equal(found, plain.logits_of(0, x))
    (line,) = said
    assert line.startswith("members' passes are not replayed: ")
    assert why in line
    assert passes.counts["replayed"] == 0


def test_members_in_training_mode_are_not_recorded() -> None:
    said: list[str] = []
    passes = replaying(frozen(members().train()), said)
    settled(passes, grad=False)
    assert said == ["members' passes are not replayed: members are in training mode"]


def test_a_nan_in_both_is_no_difference() -> None:
    said: list[str] = []
    passes = replaying(frozen(members()), said)
    for _ in range(5):
        z = passes.logits_of(0, torch.full((COUNT, *SHAPE), math.nan))
    assert z.isnan().all()
    assert (said, passes.counts["replayed"]) == ([], 1)


def test_kernels_stay_written_as_long_as_recordings_read_them() -> None:
    config = HyperConfig(model="digits-cnn", num_members=1, unit=16, embedding=3, hidden=3)
    ensemble = config.build(num_classes=10, shape=SHAPE, seed=0).eval()
    assert isinstance(ensemble, Hyper)
    assert ensemble.written() == []
    with kernels_kept(ensemble):
        ensemble.logits_of(0, images()[0])
        assert len(ensemble.written()) > 0
