"""The cost model: counts equal closed forms, and pretending to compute equals computing."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from redefense.cli import app
from redefense.config import OptimConfig, Run, override
from redefense.defences import DEFENCES, RED, Adversary
from redefense.ensembles import Ensemble
from redefense.ensembles.configs import HyperConfig, IndependentConfig
from redefense.errors import ConfigError
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.runtime.phases import EXAMPLES, INPUT_GRADIENTS, PHASES, RECORDED
from redefense.train.accelerators import ACCELERATORS, Accelerator, known
from redefense.train.cost import count, passes_per_image, predict, table
from redefense.train.loading import resolve
from redefense.train.op_counter import OpCounter
from redefense.train.steps import counted_step, forward_flops
from redefense.types import Batch

STEM = 2 * 3 * 16 * 9 * 32 * 32
"""FLOPs of ResNet-8's first convolution, whose input gradient plain training does not need."""

RESNET8 = 2 * (
    3 * 16 * 9 * 1024
    + 2 * 16 * 16 * 9 * 1024
    + (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) * 256
    + (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 64
    + 64 * 10
)
OPTIM = OptimConfig(lr=0.01)
PLANE = Accelerator(
    half=4.0, single=2.0, bandwidth=8.0, memory=1e9, link=1.0, reach=0.5, stream=0.25, launch=1.0,
    source="made up",
)  # fmt: skip


QUICK_RED = RED(adversary=Adversary(steps=2))


def members_and_batch(kind: IndependentConfig | HyperConfig, size: int) -> tuple[Ensemble, Batch]:
    x = torch.rand(size, 3, 16, 16, generator=stream(0, "x"))
    batch = Batch(x, torch.arange(size) % 10, torch.arange(size))
    return kind.build(num_classes=10, shape=(3, 16, 16), seed=0), batch


def mini(method: str, *changes: str) -> Run:
    epochs = 3 if method in ("mrboost", "barre") else 1
    return override(
        recipe(f"cifar10-mini-{method}"),
        ["data.images=16", "batch_size=8", f"epochs={epochs}", *changes],
    )


def count_cifar(run: Run) -> tuple[float, dict[str, float]]:
    cost = count(run, num_classes=10, shape=(3, 32, 32))
    return cost.passes(), {name: cost.passes(name) for name in PHASES}


# with more members ADP takes the logarithm of a small part of what was only pretended
@pytest.mark.parametrize(
    ("method", "members", "size"), [*((method, 2, 8) for method in DEFENCES), ("adp", 8, 40)]
)
def test_pretending_counts_what_computing_counts(method: str, members: int, size: int) -> None:
    run = mini(method)
    few = {"adversary": "defence.adversary.steps=2", "steps": "defence.steps=2"}
    changes = [text for key, text in few.items() if key in DEFENCES[method].__dataclass_fields__]
    run, _, defence = resolve(override(run, changes))
    stages = defence.stages(members, 2)
    found = []
    for dry in (False, True):
        ensemble, batch = members_and_batch(IndependentConfig(num_members=members, width=8), size)
        if (before := stages[-1].before) is not None:
            before(ensemble)
        found.append(
            counted_step(
                ensemble, stages, batch, optim=OPTIM, precision=run.precision,
                index=len(stages) - 1, dry=dry,
            )
        )  # fmt: skip
    computed, pretended = found
    assert {p: computed.flops(p) for p in PHASES} == {p: pretended.flops(p) for p in PHASES}
    assert pretended.peak == pytest.approx(computed.peak, rel=0.01)
    assert computed.flops() > 0


def test_members_that_hypernetworks_write_are_counted_with_their_writing() -> None:
    kind = HyperConfig(model="resnet8", num_members=2, unit=16, embedding=16, hidden=16)
    found = []
    for dry in (False, True):
        ensemble, batch = members_and_batch(kind, 2)
        stages = QUICK_RED.stages(2, 1)
        found.append(counted_step(ensemble, stages, batch, optim=OPTIM, precision="fp32", dry=dry))
    assert found[0].flops() == found[1].flops()
    plain, batch = members_and_batch(kind.plain(), 2)
    stages = QUICK_RED.stages(2, 1)
    assert (
        found[0].flops() > counted_step(plain, stages, batch, optim=OPTIM, precision="fp32").flops()
    )


def test_a_forward_pass_has_the_flops_of_its_layers() -> None:
    ensemble = IndependentConfig(model="resnet8", num_members=1).build(
        num_classes=10, shape=(3, 32, 32), seed=0
    )
    x = torch.rand(2, 3, 32, 32, generator=stream(0, "x"))
    assert forward_flops(ensemble, x) == 2 * RESNET8


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("vanilla", 3 - STEM / RESNET8),
        # five steps of two passes each, on all images
        ("at", 10 + 3 - STEM / RESNET8),
        # the adversary's on the second half; input gradients; and in the member's step the
        # cross-entropy's three passes and six of the penalty, the first convolution's included
        ("red", 5 + 2 + 9 - STEM / RESNET8),
        # input gradients, then three passes and their derivatives in one
        ("gal", 2 + 6),
        ("adp", 1 + 3 - STEM / RESNET8),
        # one member of three at a time, examples on all so far
        ("mrboost", (10 * (1 + 2 + 3) + 3 * (3 - STEM / RESNET8)) / 3 / 3),
    ],
)
def test_passes_are_those_of_the_method(method: str, expected: float) -> None:
    passes, phases = count_cifar(mini(method))
    assert passes == pytest.approx(expected, rel=5e-3)
    assert passes == pytest.approx(sum(phases.values()))
    if method == "red":
        assert phases[EXAMPLES] == pytest.approx(5.0)
        assert phases[INPUT_GRADIENTS] == pytest.approx(2.0)


def test_passes_do_not_depend_on_the_number_of_images() -> None:
    small, large = (count_cifar(mini("gal", f"batch_size={size}"))[0] for size in (4, 16))
    assert small == pytest.approx(large, rel=1e-6)


def test_a_stage_whose_epochs_differ_is_the_mean_of_several() -> None:
    run = mini("dverge", "epochs=6", "ensemble.num_members=2", "ensemble.width=4")
    many = count(run, num_classes=10, shape=(3, 16, 16))
    plain, own = many.stages
    assert (plain.steps, own.steps) == (2 * 2, 2 * 4)
    # five steps of two passes through a part of the network, and the targets' features
    assert 0 < own.flops(EXAMPLES) / (many.forward * 2 * 8) < 5 * 2 + 1
    # a mean of several counts is no count
    assert any(n != int(n) for n in own.entries.values())
    assert all(n == int(n) for n in plain.entries.values())


def test_living_memory_is_exact() -> None:
    ledger = OpCounter()
    with ledger:
        kept = torch.zeros(1000, dtype=torch.float64)
        assert (ledger.live, ledger.peak) == (8000, 8000)
        passing = kept + 1
        view = passing[:10]
        assert ledger.live == 16000
        del passing
        assert ledger.live == 16000  # the view holds it
        del view
        assert (ledger.live, ledger.peak) == (8000, 16000)
        ledger.forget_storage(kept)
        assert ledger.live == 0
        del kept
    assert (ledger.live, ledger.peak) == (0, 16000)


def test_nothing_is_left_behind() -> None:
    ensemble, batch = members_and_batch(IndependentConfig(model="mlp", num_members=2, width=8), 4)
    state = torch.random.get_rng_state()
    counted_step(ensemble, QUICK_RED.stages(2, 1), batch, optim=OPTIM, precision="fp32", dry=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in ensemble.parameters())


def test_an_operation_takes_the_longest_of_its_three_times() -> None:
    assert PLANE.seconds(half=True, flops=20.0, moved=1.0) == 10.0
    assert PLANE.seconds(half=False, flops=20.0, moved=1.0) == 20.0
    assert PLANE.seconds(half=True, flops=0.0, moved=8.0) == 4.0
    assert PLANE.seconds(half=True, flops=0.0, moved=0.0) == 1.0


def test_a_prediction_adds_up() -> None:
    cost = count(mini("red"), num_classes=10, shape=(3, 32, 32))
    found = predict(cost, "h100-sxm", devices=3)
    memory = found["memory"]
    parameters = 4 * sum(p.numel() for p in _fresh().parameters())
    assert memory["gradients"] == memory["optimizer"] == parameters
    assert memory["total"] == sum(
        memory[k] for k in ("weights", "gradients", "optimizer", "activations")
    )
    assert found["steps"] == 2
    for name, hours in found["hours"].items():
        assert hours * 3600 == pytest.approx(found["seconds_per_step"][name] * found["steps"])
    one, plain, data, members = found["hours"].values()
    # three devices share three members: a third of the work, and some exchange
    assert plain / 3 < members < plain
    assert data > plain / 3
    # replayed, operations start at once; those of the optimizer are not replayed
    step = cost.stages[0].entries
    start = [sum(n for e, n in step.items() if (e.phase in RECORDED) is it) for it in (True, False)]
    h100 = ACCELERATORS["h100-sxm"]
    free = replace(h100, launch=0.0, replayed=0.0)
    least = cost.stages[0].seconds(free, replayed=True)
    assert max(least, start[1] * h100.launch) < one * 1800 < plain * 1800
    assert cost.stages[0].seconds(replace(h100, replayed=None), replayed=True) == plain * 1800
    assert found["flops"] == found["flops_per_step"] * found["steps"]
    assert 0 < found["utilisation"] < ACCELERATORS["h100-sxm"].reach
    assert all(name in table(found) for name in found["hours"])


def _fresh() -> nn.Module:
    kind = IndependentConfig(model="resnet8", num_members=3)
    return kind.build(num_classes=10, shape=(3, 32, 32), seed=0)


def test_what_cannot_be_predicted_is_refused() -> None:
    cost = count(mini("vanilla"), num_classes=10, shape=(3, 32, 32))
    with pytest.raises(ConfigError, match="did you mean h100-sxm"):
        predict(cost, "h100")
    with pytest.raises(ConfigError, match="devices must be at least 1, got 0"):
        predict(cost, "h100-sxm", devices=0)
    unknown = override(recipe("cifar10-mini-vanilla"), ["data.spec=folder:x", "data.images=null"])
    with pytest.raises(ConfigError, match="number of folder images is not known"):
        count(unknown, num_classes=10, shape=(3, 32, 32))


def test_a_recipe_says_what_an_image_costs() -> None:
    assert passes_per_image(mini("vanilla")) == pytest.approx(3 - STEM / RESNET8)


def test_the_command_shows_what_the_library_predicts() -> None:
    words = ["show", "cifar10-mini-vanilla", "--set", "data.images=128", "--cost", "--devices", "2"]
    shown = CliRunner().invoke(app, [*words, "--json"])
    run = override(recipe("cifar10-mini-vanilla"), ["data.images=128"])
    expected = predict(count(run, num_classes=10, shape=(3, 32, 32)), "h100-sxm", devices=2)
    assert json.loads(shown.stdout) == expected
    assert CliRunner().invoke(app, words).stdout == table(expected) + "\n"


def test_a_device_is_known_by_what_torch_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ACCELERATORS["cpu-2-cores-avx512"]
    here = known(torch.device("cpu"))
    assert here is not None
    assert here.half == two.half * torch.get_num_threads() / 2
    for name, at in {"NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA T4": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert known(torch.device("cuda")) is (None if at is None else ACCELERATORS[at])
