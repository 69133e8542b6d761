"""PS-RED: counts, order of units, one writing a step, exact gradients, runs and materialising."""

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from redefense.attacks.gradient import PGD
from redefense.cli import app
from redefense.config import DataConfig, OptimConfig, Run, ThreatConfig, read_run
from redefense.defences import DEFENCES, Stage
from redefense.defences.base import Adversary
from redefense.defences.red import RED
from redefense.ensembles import (
    Hyper,
    Independent,
    evaluating,
    frozen_statistics,
    frozen_weights,
    kernels_kept,
)
from redefense.ensembles.configs import HyperConfig, IndependentConfig
from redefense.errors import ConfigError
from redefense.models import build, hyper
from redefense.models.hyper import TAPS, Grid, grids_of, kernels_from, tile
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.threat import Threat
from redefense.train import checkpoint
from redefense.train import experiment as training
from redefense.train.describe import count_parameters
from redefense.train.experiment import train
from redefense.train.loading import load, materialise, resolve
from redefense.types import Batch

SHAPE = (3, 8, 8)
SMALL = HyperConfig(model="resnet8", num_members=2, embedding=8, hidden=8, unit=16)


def small(kind: HyperConfig = SMALL) -> Hyper:
    ensemble = kind.build(num_classes=4, shape=SHAPE, seed=0)
    assert isinstance(ensemble, Hyper)
    return ensemble


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(size, *SHAPE, dtype=torch.float64, generator=stream(1, "x"))
    return x, torch.arange(size) % 4


# --- what is stored ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "stored", "saved"),
    [({}, 1_191_050, 0.8934), ({"hidden": 64}, 625_802, 0.9440)],
)
def test_a_member_stores_as_many_parameters_as_the_paper_says(
    settings: dict[str, int], stored: int, saved: float
) -> None:
    kind = HyperConfig(num_members=1, **settings)  # type: ignore[arg-type]  # int settings only
    sizes = count_parameters("cifar10-ps-red", recipe("cifar10-ps-red"), kind)
    assert sizes["units of a member"] == 340
    assert sizes["written"] == 11_157_504
    assert sizes["parameters of plain members"] == 11_173_962
    assert sizes["parameters"] == sizes["parameters of a member"] == stored
    assert round(sizes["saved"], 4) == saved
    parts = sizes["parts"]
    assert sum(part["stored"] for part in parts.values()) == stored
    assert parts["embeddings"]["stored"] == 340 * 128
    assert parts["convolutions"] == {"stored": 0, "written": 11_157_504}


def test_the_recipe_holds_eight_of_them_and_its_file_is_a_ninth() -> None:
    run, kind, _ = resolve(recipe("cifar10-ps-red"))
    assert (kind.num_members, run.ensemble["embedding"], run.ensemble["unit"]) == (8, 128, 64)
    sizes = count_parameters("cifar10-ps-red", run, replace(SMALL, num_members=1))
    assert sizes["parameters"] < sizes["parameters of plain members"]
    one = HyperConfig(num_members=1).build(num_classes=10, shape=(3, 32, 32), seed=0)
    plain = build("resnet18", num_classes=10, shape=(3, 32, 32), generator=stream(0))
    compact, full = (
        sum(t.numel() * t.element_size() for t in net.state_dict().values()) for net in (one, plain)
    )
    assert compact <= 0.11 * full


def test_a_shared_hypernetwork_is_stored_once() -> None:
    ensemble = small(replace(SMALL, shared=True))
    own = small()
    writer = sum(p.numel() for p in own.writers[0].parameters())
    total = [sum(p.numel() for p in e.parameters()) for e in (own, ensemble)]
    assert total[0] - total[1] == writer
    # each member's own embeddings make it differ
    kernels = [ensemble.member(m).get_parameter("blocks.0.conv1.weight") for m in range(2)]
    assert not torch.equal(*kernels)


def test_every_recipe_of_a_family_can_be_written() -> None:
    for name in ("digits-ps-red", "cifar10-mini-ps-red", "tiny-imagenet-ps-red"):
        run, kind, _ = resolve(recipe(name))
        assert isinstance(kind, HyperConfig)
        sizes = count_parameters(name, run, replace(kind, num_members=1))
        assert sizes["saved"] > 0.75, name


# --- how kernels are made ---------------------------------------------------------------------


def test_units_tile_a_kernel_in_the_order_of_reading() -> None:
    # a hypernetwork that returns its unit's index
    units = torch.arange(6.0)[:, None, None, None, None].expand(6, 16, 16, 3, 3)
    kernel = tile(units, rows=3, columns=2)
    assert kernel.shape == (48, 32, 3, 3)
    for row in range(3):
        for column in range(2):
            block = kernel[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
            assert bool((block == 2 * row + column).all())


def test_kernels_take_their_units_in_the_order_of_the_network() -> None:
    grids = grids_of(build("resnet8", num_classes=4, shape=SHAPE, generator=stream(0)), 16)
    assert [g.name for g in grids][:4] == [
        "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2",
    ]  # fmt: skip
    count = sum(g.num_units for g in grids)
    assert count == 42
    units = torch.arange(1.0, count + 1)[:, None, None, None, None].expand(count, 16, 16, 3, 3)
    first = 1
    for grid, kernel in zip(grids, kernels_from(units, grids, "mean"), strict=True):
        places = torch.arange(first, first + grid.num_units).view(grid.rows, grid.columns)
        found = kernel[::16, ::16, 0, 0]
        torch.testing.assert_close(found / found[0, 0], places / first)
        first += grid.num_units


def test_a_slice_is_an_output_channel_of_two_linear_layers() -> None:
    n, d, e = 16, 5, 4
    g = stream(0, "slow")
    z, first, first_bias = (
        torch.randn(*s, dtype=torch.float64, generator=g) for s in ((3, e), (n * d, e), (n * d,))
    )
    second, second_bias = (
        torch.randn(*s, dtype=torch.float64, generator=g) for s in ((9 * n, d), (9 * n,))
    )
    units = hyper.write_units(z, first, first_bias, second, second_bias)
    for u in range(3):
        for s in (0, 7, 15):
            rows = slice(s * d, (s + 1) * d)
            inner = first[rows] @ z[u] + first_bias[rows]
            expected = (second @ inner + second_bias).view(n, 3, 3)
            torch.testing.assert_close(units[u, s], expected)


@pytest.mark.parametrize("taps", sorted(TAPS))
def test_a_1x1_kernel_reduces_the_taps(taps: str) -> None:
    units = torch.randn(2, 16, 16, 3, 3, generator=stream(0))
    grid = Grid(name="shortcut", rows=2, columns=1, size=1)
    (kernel,) = kernels_from(units, [grid], taps)
    whole = torch.cat([units[0], units[1]])
    reduced = {"mean": whole.mean((2, 3)), "max": whole.amax((2, 3)), "sum": whole.sum((2, 3))}
    ratio = kernel[:, :, 0, 0] / reduced[taps]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    assert ratio[0, 0].item() == pytest.approx(math.sqrt(2 / 16 / TAPS[taps].mean_square))


@pytest.mark.parametrize("taps", sorted(TAPS))
def test_every_kernel_starts_with_hes_variance(taps: Literal["mean", "max", "sum"]) -> None:
    ensemble = small(replace(SMALL, embedding=64, hidden=64, num_members=1, taps=taps))
    plain = ensemble.member(0)
    for grid in ensemble.grids[0]:
        kernel = plain.get_parameter(f"{grid.name}.weight")
        he = 2 / (grid.size**2 * kernel.shape[1])
        assert 0.75 < kernel.square().mean().item() / he < 1.3, grid.name


def test_building_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    a, b = small().state_dict(), small().state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "resnet8", "unit": 64}, "units of 64 do not tile"),
        ({"model": "resnet8", "unit": 8}, "unit must be one of 16, 32, 64"),
        ({"model": "mlp"}, "needs a convolution"),
        ({"model": "resnet8", "unit": 16, "embedding": 0}, "embedding must be at least 1"),
        ({"model": "resnet8", "unit": 16, "num_members": 0}, "num_members"),
    ],
)
def test_what_cannot_be_written_is_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        HyperConfig(**settings).build(num_classes=4, shape=SHAPE, seed=0)  # type: ignore[arg-type]  # what a user may try


def test_unknown_taps_are_refused() -> None:
    net = build("digits-cnn", num_classes=4, shape=SHAPE, generator=stream(0))
    with pytest.raises(ConfigError, match="taps must be mean, max or sum"):
        Hyper([net], unit=16, taps="min", rng=stream(0))


# --- an ensemble like any other ---------------------------------------------------------------


def written_out(ensemble: Hyper) -> Independent:
    return Independent([ensemble.member(m) for m in range(ensemble.num_members)])


def test_members_written_out_compute_the_same_under_every_view() -> None:
    ensemble = small().double().eval()
    plain, (x, _) = written_out(ensemble), batch()
    torch.testing.assert_close(ensemble.member_logits(x), plain.member_logits(x))
    torch.testing.assert_close(ensemble.averaged()(x), plain.averaged()(x))
    for per in ("call", "image"):
        views = [e.sampled(rng=stream(3), per=per)(x) for e in (ensemble, plain)]
        torch.testing.assert_close(*views)
    reference = build("resnet8", num_classes=4, shape=SHAPE, generator=stream(0))
    reference.load_state_dict(ensemble.member(0).state_dict())
    assert sum(p.numel() for p in plain.member(0).parameters()) == sum(
        p.numel() for p in reference.parameters()
    )


def test_kernels_are_neither_parameters_nor_saved() -> None:
    ensemble = small()
    ensemble.member_logits(batch()[0].float())
    for names in (ensemble.state_dict(), dict(ensemble.named_parameters())):
        assert not any(".conv1." in name or ".conv2." in name for name in names)
    again = small(replace(SMALL, embedding=8))
    again.load_state_dict(ensemble.state_dict())


def fresh_logits(ensemble: Hyper, x: Tensor, kind: HyperConfig = SMALL) -> Tensor:
    """What another ensemble of the same numbers answers, which has written no kernels before."""
    fresh = small(kind).to(x.dtype).eval()
    fresh.load_state_dict(ensemble.state_dict())
    with torch.no_grad():
        return fresh.member_logits(x)


def change_in_another_process(ensemble: Hyper, folder: Path) -> None:
    """Put the embeddings of member 0 into a file that two processes map, and let the other edit."""
    z, file = ensemble.embeddings[0], folder / "embeddings"
    file.write_bytes(z.detach().numpy().tobytes())
    z.data = torch.from_file(str(file), shared=True, size=z.numel()).view_as(z)
    edit = "import numpy, sys; a = numpy.memmap(sys.argv[1], 'f4', 'r+'); a *= 1.5; a.flush()"
    subprocess.run([sys.executable, "-c", edit, str(file)], check=True)


def edit_in_place(ensemble: Hyper, folder: Path) -> None:
    with torch.no_grad():
        ensemble.embeddings[0].mul_(1.5).add_(0.1)


def edit_data(ensemble: Hyper, folder: Path) -> None:
    data = ensemble.embeddings[0].data
    data.copy_(data * 1.5 + 0.1)


def replace_data(ensemble: Hyper, folder: Path) -> None:
    ensemble.embeddings[0].data = ensemble.embeddings[0].data * 1.5 + 0.1


def from_a_vector(ensemble: Hyper, folder: Path) -> None:
    vector = nn.utils.parameters_to_vector(ensemble.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.1, ensemble.parameters())


def load_another(ensemble: Hyper, folder: Path) -> None:
    other = SMALL.build(num_classes=4, shape=SHAPE, seed=1)
    ensemble.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        edit_in_place, edit_data, replace_data, from_a_vector, load_another,
        change_in_another_process,
    ],
)  # fmt: skip
def test_kernels_follow_what_they_are_written_from(
    change: Callable[[Hyper, Path], None], tmp_path: Path
) -> None:
    ensemble, x = small().eval(), batch()[0].float()
    with torch.no_grad():
        before = ensemble.member_logits(x)
        change(ensemble, tmp_path)
        after = ensemble.member_logits(x)
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(after, fresh_logits(ensemble, x))


OPTIMIZERS = sorted(
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type)
    and issubclass(found, torch.optim.Optimizer)
    and found is not torch.optim.Optimizer
)
FORMS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True},
}  # fmt: skip


def optimizer_of(params: list[nn.Parameter], name: str, form: str) -> torch.optim.Optimizer | None:
    """None where torch has no such form, or refuses these parameters."""
    made = getattr(torch.optim, name)
    settings = FORMS[form]
    if not settings.keys() <= inspect.signature(made).parameters.keys():
        if form != "plain":
            return None
        settings = {}
    try:
        found: torch.optim.Optimizer = made(params, lr=0.05, **settings)
    except (ValueError, RuntimeError):
        return None
    return found


def few(ensemble: Hyper, name: str) -> list[nn.Parameter]:
    """Parameters that the optimizer takes: Muon knows matrices alone."""
    found = [p for m in range(2) for p in ensemble.parameters_of(m)]
    return [p for p in found if p.ndim == 2 or name != "Muon"]


OF_TWO_LAYERS = HyperConfig(model="digits-cnn", num_members=2, embedding=3, hidden=3, unit=16)
FOUND = small(OF_TWO_LAYERS)


@pytest.mark.parametrize(
    ("name", "form"),
    [(n, f) for n in OPTIMIZERS for f in FORMS if optimizer_of(few(FOUND, n), n, f) is not None],
)
def test_kernels_follow_every_optimizer_of_torch(name: str, form: str) -> None:
    """A user's own loop, which asks for logits without gradients between the steps."""
    ensemble, (x, y) = small(OF_TWO_LAYERS), batch()
    x = x.float()
    params = few(ensemble, name)
    optimizer = optimizer_of(params, name, form)
    assert optimizer is not None

    def closure() -> float:
        optimizer.zero_grad()
        if name == "SparseAdam":  # takes sparse gradients alone
            for p in params:
                p.grad = torch.ones_like(p).to_sparse()
            return 0.0
        loss = F.cross_entropy(ensemble.logits_of(0, x), y)
        loss.backward()
        return float(loss.detach())

    for _ in range(2):
        with torch.no_grad():
            before = ensemble.eval().logits_of(0, x)
        ensemble.train()
        closure()
        optimizer.step(closure)
        with torch.no_grad():
            after = ensemble.eval().member_logits(x)
        assert not torch.equal(before, after[0])
        assert torch.equal(after, fresh_logits(ensemble, x, OF_TWO_LAYERS))


def test_an_average_of_weights_writes_the_kernels_of_the_average() -> None:
    ensemble, x = small().eval(), batch()[0].float()
    averaged = torch.optim.swa_utils.AveragedModel(ensemble, use_buffers=True)
    average = cast(Hyper, averaged.module)
    with torch.no_grad():
        for _ in range(2):
            averaged.update_parameters(ensemble)
            ensemble.member_logits(x)
            average.member_logits(x)
            ensemble.embeddings[0].add_(0.5)
        averaged.update_parameters(ensemble)
        found = average.eval().member_logits(x)
    assert not torch.equal(found, fresh_logits(ensemble, x))
    assert torch.equal(found, fresh_logits(average, x))


def test_kernels_follow_another_type_also_where_they_are_kept() -> None:
    ensemble, (x, _) = small().eval(), batch()
    with torch.no_grad(), kernels_kept(ensemble):
        before = ensemble.logits_of(0, x.float())
        after = ensemble.double().logits_of(0, x)
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_keeps_no_kernels(copied: Callable[[Hyper], Hyper]) -> None:
    ensemble, x = small(), batch()[0].float()
    with kernels_kept(ensemble):
        before = ensemble.logits_of(0, x)  # with a graph, which cannot be copied
        other = copied(ensemble)
        with torch.no_grad():
            assert torch.equal(other.logits_of(0, x), before)
            other.embeddings[0].mul_(1.5)
            after = other.member_logits(x)
    assert not torch.allclose(after[0], before)
    other.eval()
    with torch.no_grad():
        assert torch.equal(other.member_logits(x), fresh_logits(other, x))


def test_kernels_are_kept_within_a_block_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, x = small().eval(), batch()[0].float()
    write, written = hyper.write, list[int]()

    def counting(*args: Any) -> Any:
        written.append(1)
        return write(*args)

    monkeypatch.setattr(hyper, "write", counting)

    def counted(times: int) -> int:
        written.clear()
        with torch.no_grad():
            for _ in range(times):
                ensemble.member_logits(x)
        return len(written)

    assert counted(3) == 6
    with kernels_kept(nn.Sequential(ensemble)):
        assert counted(3) == 2
        with kernels_kept(ensemble):
            assert counted(3) == 0
        assert counted(1) == 0  # the outer block goes on
    assert counted(1) == 2
    written.clear()
    PGD(steps=5)(ensemble.averaged(), x, torch.zeros(6).long(), Threat(eps=0.05), rng=stream(0))
    assert len(written) == 2  # an attack keeps them


def test_threads_that_ask_one_member_do_not_disturb_each_other() -> None:
    ensemble, x = small().eval(), batch()[0].float()
    with torch.no_grad():
        expected = ensemble.logits_of(0, x)

    def ask(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(ensemble.logits_of(0, x), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(32)))


def test_kernels_written_under_inference_mode_serve_training() -> None:
    ensemble, (x, y) = small(), batch()
    with torch.inference_mode():
        ensemble.logits_of(0, x.float())
    F.cross_entropy(ensemble.logits_of(0, x.float()), y).backward()
    assert all(p.grad is not None for p in ensemble.parameters_of(0))


def test_members_keep_batch_norm_statistics_and_modes_of_their_own() -> None:
    ensemble, (x, _) = small().double().train(), batch()
    ensemble.train_members([1])
    assert [net.training for net in ensemble.members] == [False, True]
    start = [b.clone() for b in ensemble.members[0].buffers()]
    ensemble.member_logits(x)
    assert all(map(torch.equal, start, ensemble.members[0].buffers()))
    means = [net.get_buffer("stem_bn.running_mean") for net in ensemble.members]
    assert not torch.equal(*means)
    frozen = [b.clone() for b in ensemble.buffers()]
    with frozen_statistics(ensemble):
        ensemble.member_logits(x)
    with evaluating(ensemble):
        ensemble.member_logits(x)
    assert all(map(torch.equal, frozen, ensemble.buffers()))
    assert [net.training for net in ensemble.members] == [False, True]


def test_an_attack_finds_the_same_examples_as_on_plain_members() -> None:
    ensemble, (x, y) = small().double().eval(), batch()
    plain, threat = written_out(ensemble).eval(), Threat(eps=0.05)
    found = [
        PGD(steps=5)(e.averaged(), x, y, threat, rng=stream(0, "attack")) for e in (ensemble, plain)
    ]
    torch.testing.assert_close(*found)
    assert all(p.grad is None and p.requires_grad for p in ensemble.parameters())


# --- gradients --------------------------------------------------------------------------------


class GivenAdversary(Adversary):
    """Hands out examples made beforehand, after asking the ensemble as an attack would."""

    def craft(
        self, victim: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, **more: object
    ) -> Tensor:
        with evaluating(victim), frozen_weights(victim):
            for _ in range(3):
                assert victim(x).grad_fn is None
        return (x * 0.8 + 0.1).detach()


def gradients_of(ensemble: nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    ensemble.zero_grad()
    run()
    return {n: p.grad.clone() for n, p in ensemble.named_parameters() if p.grad is not None}


def naive_logits(ensemble: Hyper, m: int, x: Tensor) -> Tensor:
    """Kernels written for this very pass, by plain autograd."""
    kernels = hyper.write(ensemble.grids[m], ensemble.taps, ensemble._sources(m))
    named: dict[str, Tensor] = dict(ensemble.members[m].named_parameters())
    named |= {f"{g.name}.weight": k for g, k in zip(ensemble.grids[m], kernels, strict=True)}
    net = build("resnet8", num_classes=4, shape=SHAPE, generator=stream(0)).double().train()
    return torch.func.functional_call(net, named, (x,))  # type: ignore[no-any-return]  # torch's stub


@pytest.mark.parametrize("taps", sorted(TAPS))
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_writing_anew_for_every_pass(
    shared: bool, taps: Literal["mean", "max", "sum"]
) -> None:
    kind = replace(SMALL, shared=shared, taps=taps)
    ensemble, (x, y) = small(kind).double().train(), batch()

    def penalised(logits_of: Callable[[int, Tensor], Tensor]) -> None:
        total = []
        for m in range(2):
            leaf = x.clone().requires_grad_()
            loss = F.cross_entropy(logits_of(m, leaf), y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            total += [loss, grad.square().sum(), F.cross_entropy(logits_of(m, 0.5 * x), y)]
        torch.stack(total).sum().backward()

    expected = gradients_of(ensemble, lambda: penalised(lambda m, x: naive_logits(ensemble, m, x)))
    found = gradients_of(ensemble, lambda: penalised(ensemble.logits_of))
    assert found.keys() == expected.keys() == dict(ensemble.named_parameters()).keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("preset", ["printed", "released", "calibrated"])
def test_red_one_member_at_a_time_gives_the_gradient_of_the_joint_graph(preset: str) -> None:
    ensemble, (x, y) = small().double().train(), batch()
    red = RED(preset=preset, adversary=GivenAdversary())
    made = red.adversary.craft(ensemble.averaged(), x, y, stream(0))

    def engine() -> None:
        for part in red.loss(ensemble, Batch(x, y, torch.arange(len(x))), stream(0)):
            part.total.backward()

    def joint() -> None:
        red.terms(ensemble, x, y, made)["total"].backward()

    found, expected = gradients_of(ensemble, engine), gradients_of(ensemble, joint)
    assert found.keys() == expected.keys() == dict(ensemble.named_parameters()).keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("name", DEFENCES)
def test_every_method_reaches_all_sources_of_its_stage_and_no_others(name: str) -> None:
    kind = HyperConfig(model="digits-cnn", num_members=2, embedding=3, hidden=3, unit=16)
    defence = DEFENCES[name]()
    for stage in defence.stages(2, 4):
        ensemble = small(replace(kind, activation="leaky")).double()
        if stage.before is not None:
            stage.before(ensemble)
        ensemble.train_members(stage.members)
        x, y = batch()
        data = Batch(x, y, torch.arange(len(x)))
        found = gradients_of(ensemble, lambda s=stage, e=ensemble, d=data: backward(s, e, d))  # type: ignore[misc]  # bound now
        wanted = {p for m in stage.members for p in ensemble.parameters_of(m)}
        assert found.keys() == {n for n, p in ensemble.named_parameters() if p in wanted}
        assert all(bool(grad.isfinite().all()) for grad in found.values())
        assert all(bool(grad.any()) for n, grad in found.items() if n.startswith("embeddings"))
        before = [e.clone() for e in ensemble.embeddings]
        torch.optim.SGD(list(wanted), lr=0.1).step()
        moved = [not torch.equal(a, b) for a, b in zip(before, ensemble.embeddings, strict=True)]
        assert moved == [m in stage.members for m in range(2)]


def backward(stage: Stage, ensemble: Hyper, data: Batch) -> None:
    for part in stage.loss(ensemble, data, stream(0)):
        part.total.backward()


@pytest.mark.parametrize("name", ["vanilla", "dverge", "gal", "adp", "trs"])
def test_a_method_pulls_sources_as_plain_autograd_through_the_writing_would(name: str) -> None:
    """One step on plain members gives the kernels' gradients; the writing's transpose the rest."""
    kind = HyperConfig(model="digits-cnn", num_members=2, embedding=3, hidden=3, unit=16)
    ensemble = small(replace(kind, activation="leaky")).double().train()
    plain = written_out(ensemble).train()
    stage = DEFENCES[name]().stages(2, 4)[-1]
    x, y = batch()
    data = Batch(x, y, torch.arange(len(x)))
    found = gradients_of(ensemble, lambda: backward(stage, ensemble, data))
    for part in stage.loss(plain, data, stream(0)):
        part.total.backward()
    for m in range(2):
        sources = ensemble._sources(m)
        kernels = hyper.write(ensemble.grids[m], ensemble.taps, sources)
        pulls = [plain.member(m).get_parameter(f"{g.name}.weight").grad for g in ensemble.grids[m]]
        expected = torch.autograd.grad(kernels, sources, pulls)
        names = {id(p): n for n, p in ensemble.named_parameters()}
        for source, grad in zip(sources, expected, strict=True):
            torch.testing.assert_close(found[names[id(source)]], grad, rtol=1e-8, atol=1e-10)


def test_a_step_writes_each_member_once_and_differentiates_the_writing_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ensemble, (x, y) = small().double().train(), batch()
    made: list[bool] = []
    write = hyper.write

    def counted(grids: object, taps: str, sources: list[Tensor]) -> object:
        made.append(torch.is_grad_enabled())
        return write(grids, taps, sources)  # type: ignore[arg-type]  # handed through

    monkeypatch.setattr(hyper, "write", counted)
    red = RED(adversary=GivenAdversary())
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1)
    for _ in range(2):
        made.clear()
        optimizer.zero_grad()
        with kernels_kept(ensemble):
            for part in red.loss(ensemble, Batch(x, y, torch.arange(len(x))), stream(0)):
                part.total.backward()
        optimizer.step()
        # per member: one writing without a graph for all passes, one within the backward pass
        assert sorted(made) == [False, False, True, True]


def test_a_graph_from_before_a_step_is_refused() -> None:
    ensemble, (x, y) = small().double(), batch()
    loss = F.cross_entropy(ensemble.logits_of(0, x), y)
    with torch.no_grad():
        ensemble.embeddings[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unused_graphs_keep_no_kernels_alive() -> None:
    ensemble, (x, _) = small().double(), batch()
    with kernels_kept(ensemble):
        ensemble.logits_of(0, x)  # with a graph that no backward pass will use
        assert ensemble._kept is not None
        kept = ensemble._kept[0]
        assert kept.linked is not None
        old = weakref.ref(kept)
        del kept
    assert old() is None


# --- runs -------------------------------------------------------------------------------------

TINY = Run(
    data=DataConfig(spec="digits", images=64),
    ensemble={
        "name": "hyper", "model": "digits-cnn", "num_members": 2, "unit": 16, "embedding": 4,
        "hidden": 4,
    },
    defence={
        "name": "red", "similarity": 0.1, "lipschitz": 0.01,
        "adversary": {"eps": 0.1, "steps": 2, "step_size": 0.5},
    },
    threat=ThreatConfig(eps=0.2),
    optim=OptimConfig(name="adam", lr=3e-3, weight_decay=0.0),
    epochs=2,
    batch_size=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hyper") / "run"
    train(TINY, out, quiet=True)
    return out


def test_a_stopped_run_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save
    saved: list[Path] = []

    def stop_after_the_first(target: Path, **rest: object) -> None:
        real(target, **rest)  # type: ignore[arg-type]  # handed through
        saved.append(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save", stop_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "run", quiet=True)
    assert len(saved) == 1
    train(TINY, tmp_path / "run", quiet=True, resume=True)
    a, b = (load(path).state_dict() for path in (finished, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_moves_every_parameter(finished: Path) -> None:
    start = resolve(TINY)[1].build(num_classes=10, shape=(1, 8, 8), seed=0)
    end = dict(load(finished).named_parameters())
    assert all(not torch.equal(p, end[name]) for name, p in start.named_parameters())


def test_a_materialised_run_loads_and_computes_the_same(finished: Path, tmp_path: Path) -> None:
    materialise(finished, tmp_path / "plain")
    plain, compact = load(tmp_path / "plain"), load(finished)
    assert isinstance(plain, Independent)
    assert isinstance(compact, Hyper)
    x = torch.rand(5, 1, 8, 8, generator=stream(0))
    torch.testing.assert_close(plain.member_logits(x), compact.member_logits(x))
    _, kind, _ = resolve(read_run(tmp_path / "plain" / "run.json"))
    assert kind == IndependentConfig(model="digits-cnn", num_members=2)
    with safe_open(tmp_path / "plain/final/weights.safetensors", "pt") as file:
        assert "members.1.layers.2.1.weight" in file.keys()  # noqa: SIM118 - not a mapping
    with pytest.raises(ConfigError, match="plain networks already"):
        materialise(tmp_path / "plain", tmp_path / "again")
    with pytest.raises(ConfigError, match="choose another --out"):
        materialise(finished, tmp_path / "plain")


def test_the_commands_show_sizes_and_materialise(finished: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["show", str(finished), "--parameters", "--json"])
    assert shown.exit_code == 0, shown.exception
    sizes = json.loads(shown.stdout)
    assert sizes["bytes on disk"] == (finished / "final/weights.safetensors").stat().st_size
    assert sizes["written for a member"] == 16 * 32 * 9 + 32 * 32 * 9
    text = CliRunner().invoke(app, ["show", "digits-ps-red", "--parameters"]).stdout
    assert "hypernetwork" in text
    done = CliRunner().invoke(app, ["materialise", str(finished), "--out", str(tmp_path / "p")])
    assert done.exit_code == 0
    assert load(tmp_path / "p").num_members == 2
