"""The training benchmark: its baseline is the definition, its ratios are those of its seconds."""

from collections.abc import Callable

import pytest
import torch

from redefense.bench import memory
from redefense.bench import train as bench
from redefense.bench.inference import run as run_inference
from redefense.bench.joint import joint_living, joint_step
from redefense.bench.memory import line
from redefense.bench.memory import run as run_memory
from redefense.bench.memory import table as memory_table
from redefense.bench.replayed import handed_over
from redefense.bench.train import run, table
from redefense.defences.base import Adversary
from redefense.defences.red import RED
from redefense.ensembles import Ensemble
from redefense.ensembles.configs import IndependentConfig
from redefense.errors import ConfigError
from redefense.rng import stream
from redefense.runtime.phases import PHASES, REPLAYED, phase
from redefense.types import Batch
from tape import TapeRecorder

CUDA = torch.cuda.is_available()
WAYS = ["joint", "exact fp32", "exact bf16", "finite bf16"]


def test_ratios_are_those_of_the_seconds_of_a_single_round() -> None:
    result = run(models=["digits-cnn"], members=[2], batch=4, steps=1, rounds=1)
    (case,) = result["cases"]
    assert (case["model"], case["members"], case["batch"]) == ("digits-cnn", 2, 4)
    assert list(case["ways"]) == WAYS
    joint = case["ways"]["joint"]["seconds"]
    for name, way in case["ways"].items():
        forward = case["forward"]["bf16" if "bf16" in name else "fp32"]
        assert way["times_faster_than_joint"] * way["seconds"] == pytest.approx(joint)
        assert way["times_the_floor"] * 24 * 2 * forward == pytest.approx(way["seconds"])
        assert f"{way['seconds']:.3f}" in table(result)
        assert ("predicted_seconds" in way) == (name != "joint")


def test_replayed_ways_stand_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "recorder_for", lambda device: TapeRecorder())
    result = run(models=["linear"], members=[2], batch=4, steps=1, rounds=1)
    (case,) = result["cases"]
    assert list(case["ways"]) == [*WAYS, *(f"{way}, replayed" for way in WAYS[1:])]
    assert case["skipped"] == {}
    for name in WAYS[1:]:
        plain, replayed = case["ways"][name], case["ways"][f"{name}, replayed"]
        assert replayed["host_share"] == 1 - replayed["graph_seconds"] / replayed["seconds"]
        # what is left is the optimizer, the copies of a batch and one launch
        assert 1 < replayed["operations"] < plain["operations"] / 2
        assert f"{replayed['graph_seconds']:.4f}" in table(result)


def test_what_a_host_hands_over_is_counted() -> None:
    x = torch.zeros(3)

    def take() -> None:
        (x + 1).view(3, 1).mul_(2)
        with phase(REPLAYED):
            x.exp().sin()

    assert handed_over(take) == 3


def test_finished_cases_are_told_at_once() -> None:
    said: list[str] = []
    result = run(models=["linear"], members=[1, 2], batch=2, steps=1, rounds=1, log=said.append)
    assert said == table(result).splitlines()[2:]


def test_the_joint_step_descends_the_definition_and_keeps_no_gradient_of_the_attack() -> None:
    members = _members()
    x, y = torch.rand(6, 3, 32, 32, generator=stream(0, "x")), torch.arange(6)
    red = RED(adversary=Adversary(eps=0.0, steps=2))  # the examples are the images themselves
    red.terms(members, x, y, x)["total"].backward()
    # clones: the attack adds to the gradients it finds
    expected = [p.grad.clone() for p in members.parameters() if p.grad is not None]
    optimizer = torch.optim.SGD(members.parameters(), lr=0.0)
    joint_step(members, red, x, y, optimizer, stream(0, "step"))
    for p, grad in zip(members.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_a_joint_graph_that_does_not_fit_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "free_memory", lambda device: 1000)
    result = run(models=["mlp"], members=[2], batch=2, steps=1, rounds=1)
    (case,) = result["cases"]
    assert list(case["ways"]) == WAYS[1:]
    assert all(way["times_faster_than_joint"] is None for way in case["ways"].values())
    assert case["skipped"]["joint"].endswith("GB are free")
    assert f"joint was not run: {case['skipped']['joint']}" in table(result)


def test_memory_of_the_engine_is_flat_where_that_of_the_joint_graph_grows() -> None:
    said: list[str] = []
    result = run_memory(members=[2, 5], batch=8, log=said.append)
    two, five = result["cases"]
    assert result["spread"] < 0.1
    assert five["joint"] > 2 * two["joint"] > 2 * two["engine"]
    assert {two["phase"], five["phase"]} <= set(PHASES)
    assert said == [line(case) for case in result["cases"]]
    assert memory_table(result).splitlines()[2:-1] == said


def test_memory_of_a_recording_stands_beside_that_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "recorder_for", lambda device: TapeRecorder())
    (case,) = run_memory(model="linear", members=[2], batch=4)["cases"]
    assert case["recorded"] == 0  # a tape knows no size
    assert line(case).split()[-4:-2] == ["0.00", "MB"]


def test_written_members_take_the_memory_of_plain_ones_beside_their_kernels() -> None:
    plain, written = (
        run_memory(members=[1, 2], ensemble=kind, batch=8) for kind in ("independent", "hyper")
    )
    assert [case["written"] for case in plain["cases"]] == [0, 0]
    one, two = written["cases"]
    assert two["written"] == 2 * one["written"] > 0
    for found, like in zip(written["cases"], plain["cases"], strict=True):
        assert found["engine"] == pytest.approx(like["engine"], rel=0.02)
        assert found["joint"] == pytest.approx(like["joint"], rel=0.02)


def test_memory_of_one_member_varies_by_nothing() -> None:
    assert run_memory(members=[1], batch=4, differentiate="finite")["spread"] is None


def test_counting_a_joint_graph_changes_nothing() -> None:
    members = _members()
    before = [p.detach().clone() for p in members.parameters()]
    x = torch.rand(4, 3, 32, 32, generator=stream(0, "x"))
    batch = Batch(x, torch.arange(4), torch.arange(4))
    assert joint_living(members, batch) > 0
    for p, value in zip(members.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is None


@pytest.mark.parametrize("bench", [run, run_memory, run_inference])
@pytest.mark.parametrize("device", ["warp", "meta", "hpu", *([] if CUDA else ["cuda"])])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    bench: Callable[..., object], device: str
) -> None:
    with pytest.raises(ConfigError, match=f"^cannot use device '{device}': [^\n]+$"):
        bench(device=device)


def _members() -> Ensemble:
    kind = IndependentConfig(model="mlp", num_members=2, width=8)
    return kind.build(num_classes=10, shape=(3, 32, 32), seed=0)
