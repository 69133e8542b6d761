"""Classes masked by -inf count as those masked by -1e4 do, to every attack and in every figure."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import redefense
from redefense.attacks import APGDT, ATTACKS
from redefense.checks.derivative import derivatives_agree
from redefense.ensembles import Independent
from redefense.evaluation.suite import suite_named
from redefense.networks import MASKED, as_logits
from redefense.rng import stream
from redefense.threat import Threat
from redefense.types import correct

QUICK: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 10},
    "apgdt": {"steps": 5},
    "autoattack": {"steps": 5, "queries": 20},
    "arc": {"steps": 5},
    "cw": {"searches": 2, "steps": 10},
    "eotpgd": {"draws": 2},
    "fab": {"steps": 5},
    "hinge": {"steps": 5},
    "meanprob_apgd": {"steps": 10},
    "meanprob_pgd": {"steps": 5},
    "onepixel": {"steps": 4, "popsize": 20},
    "pgd": {"steps": 5},
    "pixle": {"restarts": 3, "iterations": 5},
    "square": {"queries": 50},
    "subset": {"steps": 5},
}
WITHIN = {"transfer": {"attack": APGDT(steps=5, loss="targeted_margin")}}
"""Settings that are attacks themselves."""
BOTH = {"same": (3, 3), "other": (3, 1)}


class Masking(nn.Module):
    """A small network that gives one class a fixed logit."""

    def __init__(self, seed: int, masked: int, value: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))
        rng = stream(seed, "net")
        for p in self.body.parameters():
            p.data = torch.randn(p.shape, generator=rng) / p[0].numel() ** 0.5
        self.masked, self.value = masked, value

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(5) == self.masked
        return torch.where(mask, self.value, 3 * self.body(x))


def members(value: float, which: str) -> Independent:
    return Independent([Masking(m, k, value).eval() for m, k in enumerate(BOTH[which])])


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 6, 6, generator=stream(0, "images"))
    y = Masking(0, 3, MASKED)(x).argmax(1)
    y[0] = 3  # a label that is masked
    return x, y


@pytest.mark.parametrize("which", sorted(BOTH))
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_every_attack_finds_the_same_points(name: str, which: str) -> None:
    x, y = images()
    # the first member is the same one in both
    for view in ("members", "averaged", *(("one",) if which == "same" else ())):
        found = []
        for value in (-math.inf, -1e4):
            ensemble = members(value, which)
            victim: nn.Module = ensemble
            if view == "one":
                victim = ensemble.member(0)
            elif view == "averaged":
                victim = ensemble.averaged()
            elif not ATTACKS[name].adaptive:
                victim = ensemble.sampled(rng=stream(0, "draws"))
            attack = ATTACKS[name](**QUICK.get(name, {}), **WITHIN.get(name, {}))
            found.append(attack(victim, x, y, Threat(eps=0.1), rng=stream(0, name)))
        assert found[0].isfinite().all()
        assert torch.equal(*found)


def short(name: str, folder: Path) -> str:
    """A suite with fewer steps, as a file."""
    suite = suite_named(name).model_dump(mode="json")
    for spec in (*suite["cells"], *suite["baseline_attacks"]):
        spec["settings"] = {**(spec["settings"] or {}), **QUICK.get(spec["attack"], {})}
    path = folder / f"short-{name}.json"
    path.write_text(json.dumps(suite | {"name": path.stem, "measures": name == "quick"}))
    return str(path)


@pytest.mark.parametrize(("suite", "which"), [("quick", "other"), ("aware", "same")])
@pytest.mark.filterwarnings("ignore::redefense.RedCheckWarning")
def test_evaluations_have_the_same_figures(suite: str, which: str, tmp_path: Path) -> None:
    x, y = images()
    data = []
    for value in (-math.inf, -1e4):
        report = redefense.evaluate(
            members(value, which), (x, y), suite=short(suite, tmp_path), threat=Threat(eps=0.1)
        )
        # a masked label is wrong
        assert not report.cells["clean"].correct[:, 0][np.array(BOTH[which]) == 3].any()
        data.append(copy.deepcopy(report.data))
        for entry in data[-1]["cells"]:
            entry.pop("seconds")
        data[-1].pop("provenance")
        # the value of the mask is an attribute of the model
        data[-1]["plan"].pop("attributes")
    assert json.dumps(data[0]) == json.dumps(data[1])


def test_rows_without_any_class_stay_wrong_for_every_label() -> None:
    x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    nothing, nan = torch.full((4, 3), -math.inf), torch.full((4, 3), math.nan)
    assert not correct(as_logits(nothing, x), y).any()
    assert not correct(as_logits(nan, x), y).any()
    one = torch.tensor([[1.0, -math.inf, 0.5]]).expand(4, 3)
    assert correct(as_logits(one, x), y).tolist() == [True, False, False, True]
    assert as_logits(one, x).argmin(1).tolist() == [1] * 4


def test_logits_below_the_mask_stay_above_it() -> None:
    x = torch.rand(1, 1, 2, 2)
    z = torch.tensor([[-3e4, -math.inf, -2e4]])
    assert as_logits(z, x).argsort(1).tolist() == [[1, 0, 2]]
    assert as_logits(z, x).isfinite().all()


def test_double_logits_keep_their_differences_beside_a_large_offset() -> None:
    x, z = torch.rand(1, 1, 2, 2), torch.tensor([[1e9 + 0.5, 1e9, 1e9 - 0.25]], dtype=torch.float64)
    found = as_logits(z, x)
    assert found.dtype == torch.float32
    assert found.diff(dim=1).tolist() == [[-0.5, -0.25]]


def test_masked_classes_do_not_hide_what_gradients_say() -> None:
    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return -grads[0]

    class Lying(Masking):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Reversed.apply(x))  # type: ignore[no-untyped-call]  # untyped in torch

    x, y = images(16)
    for value in (-math.inf, -1e4):
        assert derivatives_agree(Independent([Masking(0, 3, value)]), x, y).passed is True
        assert derivatives_agree(Independent([Lying(0, 3, value)]), x, y).passed is False
