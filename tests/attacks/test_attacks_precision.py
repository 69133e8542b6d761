"""Every attack on images and logits of every type and shape: inside ball and box, in their type."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import redefense
from redefense.attacks import APGDT, ATTACKS
from redefense.ensembles import Independent
from redefense.ensembles.precision import rounded
from redefense.errors import InputError
from redefense.evaluation.inputs.precision import computed_in
from redefense.rng import stream
from redefense.threat import Threat
from redefense.train.api import weights_digest

TYPES = {"half": torch.float16, "bf16": torch.bfloat16, "single": torch.float32,
         "double": torch.float64}  # fmt: skip
SHAPES = {"oblong": (3, 3, 5), "column": (1, 7, 1), "pixel": (1, 1, 1)}
TINY: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 4},
    "apgdt": {"steps": 3, "num_targets": 2},
    "arc": {"steps": 2},
    "autoattack": {"steps": 2, "queries": 5},
    "bim": {"steps": 3},
    "cw": {"searches": 2, "steps": 4},
    "deepfool": {"steps": 4},
    "di2fgsm": {"steps": 3},
    "eotpgd": {"steps": 3, "draws": 2},
    "fab": {"steps": 3, "num_targets": 2},
    "hinge": {"steps": 3},
    "meanprob_apgd": {"steps": 4},
    "meanprob_pgd": {"steps": 3},
    "mim": {"steps": 3},
    "onepixel": {"steps": 2, "popsize": 8},
    "pgd": {"steps": 3},
    "pixle": {"restarts": 2, "iterations": 2},
    "sparsefool": {"steps": 2, "inner_steps": 4},
    "square": {"queries": 10},
    "subset": {"steps": 3, "num_targets": 1, "mixed": 1},
    "transfer": {"attack": APGDT(steps=3, num_targets=2, loss="targeted_margin")},
}


class Answering(nn.Module):
    """A linear network in one type that answers in another."""

    def __init__(self, shape: tuple[int, ...], taken: torch.dtype, given: torch.dtype) -> None:
        super().__init__()
        weight = torch.randn(5, math.prod(shape), generator=stream(0, "net"))
        self.weight, self.given = nn.Parameter(weight.to(taken)), given

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight.t()).to(self.given)


def images(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.rand(4, *shape, generator=stream(0, "images"))
    x[0] = x[0].round()  # at the ends of the box
    return x.to(dtype)


def furthest(x_adv: Tensor, x: Tensor, norm: float) -> float:
    return float((x_adv.double() - x.double()).flatten(1).norm(p=norm, dim=1).max())


def slack(eps: float, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """What rounding of points in at least single precision adds to a radius."""
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return float(unit * (math.prod(shape) ** 0.5 + eps))


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize("logits", sorted(TYPES))
def test_points_have_the_type_of_the_images_and_lie_in_ball_and_box(name: str, logits: str) -> None:
    attack = ATTACKS[name](**TINY.get(name, {}))
    for (kind, shape), norm in itertools.product(SHAPES.items(), attack.norms):
        # half networks take half images, all others single ones with logits of each type
        for taken in {TYPES[logits], torch.float32} if kind == "oblong" else {TYPES[logits]}:
            x = images(shape, taken)
            net = Answering(shape, taken, TYPES[logits])
            y = net(x).argmax(1)
            threat = Threat(norm=norm, eps=0.05 if norm == math.inf else 0.3)
            x_adv = attack(net, x, y, threat, rng=stream(0, name))
            assert (x_adv.dtype, x_adv.shape) == (x.dtype, x.shape)
            assert float(x_adv.min()) >= 0.0
            assert float(x_adv.max()) <= 1.0
            if attack.bounded:
                assert furthest(x_adv, x, norm) <= threat.eps + slack(threat.eps, shape, taken)


PRESETS = sorted((n, p) for n, cls in ATTACKS.items() for p in cls.presets if n != "autoattack")


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_take_every_shape(name: str, preset: str) -> None:
    cls: Any = ATTACKS[name]
    attack = cls(preset=preset)
    for budget in ("queries", "steps"):  # shapes are the same at each
        if getattr(attack, budget, None):
            object.__setattr__(attack, budget, min(10, getattr(attack, budget)))
    for shape in SHAPES.values():
        x = images(shape, torch.float32)[:2]
        net = Answering(shape, torch.float32, torch.float64)
        x_adv = attack(net, x, net(x).argmax(1), Threat(eps=0.05), rng=stream(0, name))
        assert (x_adv.dtype, x_adv.shape) == (x.dtype, x.shape)
        assert 0.0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1.0


@pytest.mark.parametrize("dtype", ["half", "bf16"])
def test_rounding_keeps_points_in_the_ball_and_moves_no_others(dtype: str) -> None:
    x = torch.rand(8, 3, 9, 5, generator=stream(0, "x")).to(TYPES[dtype])
    x[0], x[1], x[2] = 0.0, 1.0, -0.0
    for norm, eps in ((math.inf, 0.03), (2.0, 0.3)):
        threat = Threat(norm=norm, eps=eps)
        noise = torch.randn(x.shape, generator=stream(1, "x"))
        points = threat.project(x.float() + noise, x.float())
        near = points.to(x.dtype)
        found = rounded(points, x, threat)
        assert furthest(found, x, norm) <= eps * (1 + 1e-6)
        # to one of the two numbers that a point lies between
        unit = torch.finfo(x.dtype).eps
        assert bool(((found.float() - points).abs() <= unit * points + 1e-7).all())
        pixels = (near.float() - x.float()).abs() <= eps
        if norm == math.inf:
            assert torch.equal(found[pixels], near[pixels])
        assert torch.equal(rounded(points, x, None), near)


def test_attacks_on_half_images_find_what_they_find_on_single_ones() -> None:
    shape = (1, 6, 6)
    x = images(shape, torch.float16)
    half, single = (Answering(shape, dtype, dtype) for dtype in (torch.float16, torch.float32))
    single.weight.data = half.weight.data.float()
    y, threat = half(x).argmax(1), Threat(eps=0.1)
    attack = ATTACKS["pgd"]()
    found = attack(half, x, y, threat, rng=stream(0, "pgd"))
    wanted = attack(single, x.float(), y, threat, rng=stream(0, "pgd"))
    # of a linear network every maximum stands in a corner of the ball
    assert float((found.float() - wanted).abs().max()) <= torch.finfo(torch.float16).eps
    assert torch.equal(half(found).argmax(1), single(wanted).argmax(1))


PAIRS = [("half", "half"), ("bf16", "bf16"), ("half", "single"), ("single", "bf16"),
         ("double", "single"), ("double", "double")]  # fmt: skip


@pytest.mark.parametrize(("images_of", "network_of"), PAIRS)
@pytest.mark.filterwarnings("ignore::redefense.RedCheckWarning")
def test_evaluations_take_images_and_networks_of_every_type(
    images_of: str, network_of: str
) -> None:
    shape = (1, 4, 4)
    x = images(shape, TYPES[images_of])
    nets = [Answering(shape, TYPES[network_of], TYPES[network_of]).eval() for _ in range(2)]
    plain = Independent([Answering(shape, torch.float32, torch.float32).eval() for _ in range(2)])
    y = plain.logits_of(0, x.float()).argmax(1)
    ensemble, at = computed_in(Independent(nets), x)
    assert at.dtype in (torch.float32, torch.float64)
    assert ensemble.logits_of(0, at).dtype == at.dtype
    # the same weights, up to rounding: no answer is near a boundary
    report = redefense.evaluate(nets, (x, y), suite="quick", threat=Threat(eps=0.01))
    assert report.data["clean"]["expected"] == 1.0
    assert [check["detail"] for check in report.data["checks"] if check["id"] in RED
            and check["passed"] is False] == []  # fmt: skip


RED = ("S06", "S07", "S22", "S41", "S42", "S43")
"""Checks that a sound network of any precision passes."""


def test_a_network_that_takes_no_type_is_told_of_in_one_line() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 5)).half().eval()
    with pytest.raises(InputError, match=r"cannot take images of \(1, 4, 4\)"):
        redefense.evaluate(net, (torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)))


@pytest.mark.parametrize("dtype", [*TYPES.values(), torch.int8, torch.bool, torch.complex64])
def test_weights_of_every_type_have_a_digest_of_their_own(dtype: torch.dtype) -> None:
    def net(value: float) -> nn.Module:
        made = nn.Module()
        made.register_buffer("scalar", torch.tensor(value).to(dtype))
        made.register_buffer("matrix", torch.full((2, 3), value).to(dtype))
        return made

    one, again, other = (weights_digest([net(value)]) for value in (1.0, 1.0, 0.0))
    assert one == again != other
