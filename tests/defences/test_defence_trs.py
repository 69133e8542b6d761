"""TRS against slow loops from its definition, its search, schedule and stages."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from defence_tools import (
    assert_same,
    batch,
    engine_gradients,
    ensemble,
    gradients_of,
    identical,
    slow_gradients,
)
from redefense.defences.trs import TRS, roughness_gradient
from redefense.defences.vanilla import Vanilla
from redefense.errors import ConfigError
from redefense.rng import stream

MEMBERS = [2, 3, 8]
PRESETS = ["printed", "released"]


@pytest.mark.parametrize("size", [6, 5])
@pytest.mark.parametrize("num_members", MEMBERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_terms_are_the_definition(preset: str, num_members: int, size: int) -> None:
    members, data = ensemble(num_members), batch(size)
    rough = torch.rand(data.x.shape, dtype=torch.float64, generator=stream(2))
    ce = [F.cross_entropy(members.logits_of(m, data.x), data.y).item() for m in range(num_members)]
    g = slow_gradients(members, data.x, data.y)
    cosines = [
        abs(float(g[i][b] @ g[j][b]) / float(g[i][b].norm() * g[j][b].norm()))
        for i, j in itertools.combinations(range(num_members), 2)
        for b in range(size)
    ]
    expected = {"ce": sum(ce), "similarity": sum(cosines) / len(cosines)}
    if preset == "printed":
        expected["ce"] /= num_members
        norm = [[float(v.norm()) for v in row] for row in slow_gradients(members, rough, data.y)]
        pairs = list(itertools.combinations(range(num_members), 2))
        sums = [norm[i][b] + norm[j][b] for i, j in pairs for b in range(size)]
        expected["smoothness"] = sum(sums) / len(sums)
    else:
        mixed = torch.cat([data.x[: size // 2], rough[size // 2 :]])
        rows = slow_gradients(members, mixed, data.y)
        squares = [2 / size * sum(float((v / size).square().sum()) for v in row) for row in rows]
        expected["smoothness"] = sum(squares) / num_members
    expected["total"] = expected["ce"] + 40 * expected["similarity"] + 2.5 * expected["smoothness"]
    found = TRS(preset=preset).terms(members, data.x, data.y, rough)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("model", ["mlp", "digits-cnn"])
@pytest.mark.parametrize("num_members", [1, *MEMBERS])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_member_at_a_time_gives_the_gradient_of_the_joint_graph(
    preset: str, num_members: int, model: str
) -> None:
    members, data = ensemble(num_members, model).train(), batch()
    trs = TRS(preset=preset)
    rough = data.x.clone()
    first = 0 if preset == "printed" else 3
    rough[first:] = trs.search(members, data.x[first:], data.y[first:], 0.01, stream(0))
    # the search looks at batch norm's running moments, which both ways then move
    found, _ = engine_gradients(members, trs, data)
    expected = gradients_of(
        members, lambda: trs.terms(members, data.x, data.y, rough)["total"].backward()
    )
    assert_same(found, expected)


def test_weights_zero_are_the_plain_ensemble() -> None:
    members, data = ensemble(3), batch()
    found, _ = engine_gradients(members, TRS(similarity=0.0, smoothness=0.0), data)
    assert_same(found, engine_gradients(members, Vanilla(), data)[0])


def test_limits_identical_members_and_a_single_one() -> None:
    data = batch()
    same = TRS().terms(identical(3), data.x, data.y, data.x)
    assert same["similarity"].item() == pytest.approx(1)
    assert TRS().terms(ensemble(1), data.x, data.y, data.x)["similarity"].item() == 0


def test_the_search_climbs_the_squared_gradient_norms() -> None:
    members, data = ensemble(2), batch(2)

    def roughness(x: Tensor) -> float:
        rows = slow_gradients(members, x, data.y)
        return sum(float(v.square().sum()) for row in rows for v in row)

    gradient = roughness_gradient(members, data.x, data.y)
    step = 1e-6 * torch.randn(data.x.shape, dtype=torch.float64, generator=stream(3))
    slope = roughness(data.x + step) - roughness(data.x - step)
    assert slope == pytest.approx(2 * float((gradient * step).sum()), rel=1e-4)
    found = TRS().search(members, data.x, data.y, 0.1, stream(0))
    assert float((found - data.x).abs().max()) <= 0.1 + 1e-12
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert roughness(found) > roughness(data.x)


def test_the_search_finds_as_rough_points_in_half_precision() -> None:
    members = ensemble(2, "digits-cnn").float()
    data = batch(8)
    x, y = data.x.float(), data.y

    def reached(*, half: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = TRS().search(members, x, y, 0.1, stream(0))
        rows = slow_gradients(members.eval(), found, y)
        return sum(float(v.square().sum()) for row in rows for v in row)

    assert reached(half=True) == pytest.approx(reached(half=False), rel=0.02)


def test_the_radius_grows_linearly_over_the_epochs_of_the_stage() -> None:
    assert [TRS().eps(epoch, 4) for epoch in range(4)] == pytest.approx([0.01, 0.015, 0.02, 0.025])
    members, start, late = ensemble(2), batch(epoch=0, epochs=4), batch(epoch=3, epochs=4)
    logged = [engine_gradients(members, TRS(), data)[1] for data in (start, late)]
    assert logged[0]["similarity"] == pytest.approx(logged[1]["similarity"])
    assert logged[0]["smoothness"] < logged[1]["smoothness"]


def test_a_warm_start_is_a_stage_of_plain_members() -> None:
    plain, own = TRS(warm_start=0.25).stages(3, 8)
    assert (plain.name, plain.epochs, own.name, own.epochs) == ("plain", 2, "trs", 6)
    (only,) = TRS().stages(3, 8)
    assert (only.name, only.epochs) == ("trs", 8)
    (short,) = TRS(warm_start=0.9).stages(3, 1)
    assert short.epochs == 1


def test_published_constants() -> None:
    trs = TRS()
    assert (trs.similarity, trs.smoothness) == (40.0, 2.5)
    assert (trs.first_eps, trs.last_eps, trs.steps) == (0.01, 0.03, 6)
    assert trs.step_size == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "best"}, "preset must be printed or released"),
        ({"similarity": -1.0}, "similarity must be"),
        ({"smoothness": math.inf}, "smoothness must be"),
        ({"last_eps": 2.0}, "last_eps must lie"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warm_start": 1.0}, "warm_start must lie"),
        ({"differentiate": "fast"}, "exact or finite"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TRS(**settings)  # type: ignore[arg-type]  # what a user may try
