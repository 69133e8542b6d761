"""Compares many processes with one: the same run on every mesh of 1, 2 and 4 processes.

All processes run on this machine and communicate by gloo. Agreement and traffic are measured;
seconds are meaningful only if every process has its own core.
"""

import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from redefense.attacks import ATTACKS
from redefense.config import Run, override
from redefense.data import Split, load_dataset, train_validation
from redefense.data.loader import Loader
from redefense.defences import Stage
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError
from redefense.evaluation.cells import as_threat
from redefense.rng import stream
from redefense.runtime.device import computing
from redefense.runtime.mesh import Mesh, Tally, processes
from redefense.train.exchange import spread_over
from redefense.train.experiment import check_batch, train
from redefense.train.loading import Signature, load, loader_of, resolve
from redefense.train.loop import take_step
from redefense.train.optim import make_optimizer
from redefense.train.session import accuracy
from redefense.types import correct

IMAGES = 256
"""Number of validation images for the robust accuracies."""


def launch(count: int, work: Callable[..., None], *args: Any, timeout: float = 3600.0) -> list[int]:
    """Call `work(*args)` in `count` processes with the environment of `torchrun`.

    Each is forked from one that has imported torch and computed nothing; returns the exit codes.
    """
    with socket.socket() as free:
        # port 0: the system chooses a free one
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a fork of this process would lack the threads that torch has started here
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    started: list[ForkServerProcess] = []
    for rank in range(count):
        process = context.Process(target=_called, args=(rank, count, port, work, args))
        process.start()
        started.append(process)
    ends = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, ends - time.monotonic()))
        if process.exitcode is None:
            # a process that waits for one that has failed would wait forever
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in started]


def _called(rank: int, count: int, port: int, work: Callable[..., None], args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)  # as torchrun's are: rounding depends on it
    with computing():
        work(*args)


def meshes(counts: Sequence[int], most: int) -> list[str]:
    """All meshes of so many processes with at most `most` columns."""
    return [
        f"{rows}x{count // rows}"
        for count in counts
        for rows in range(count, 0, -1)
        if count % rows == 0 and count // rows <= most
    ]


@computing()
def run(
    *,
    settings: Run,
    counts: Sequence[int] = (1, 2, 4),
    steps: int = 3,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train on every mesh and compare with one process.

    Args:
        settings: settings of the run.
        counts: numbers of processes; 1 is always measured first.
        steps: number of timed steps.
        log: called with progress.

    Returns:
        `meshes`: for each mesh its `gradient` difference (largest of one step in single precision
        with given examples, as a share of the largest entry of each tensor), `weights` (largest
        difference of the final ones), `clean` and `robust` accuracy of the ensemble, `bytes` that
        one process hands over in a step (largest of all, by what they are), `seconds` a step.

    Raises:
        ConfigError: if a mesh cannot be trained, or could not; messages of its processes are then
            on stderr.
        DataError: if the data cannot be read.
    """
    _, kind, defence = resolve(settings)
    num_members = kind.num_members
    most = num_members if defence.spreads else 1
    # first, since all others are compared with it
    wanted = ["1x1", *(m for m in meshes(counts, most) if m != "1x1")]
    # checked here, where an error is one line
    load_dataset(settings.data.spec)
    for mesh in wanted:
        check_batch(int(mesh.partition("x")[0]), settings.batch_size)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for mesh in wanted:
            rows, columns = map(int, mesh.split("x"))
            folder = Path(scratch) / mesh
            folder.mkdir()
            codes = launch(rows * columns, measure, settings, mesh, folder, steps)
            if any(codes):
                raise ConfigError(f"processes of mesh {mesh} ended with {codes}")
            row = found[mesh] = _compared(settings, folder, Path(scratch) / "1x1")
            log(f"mesh {mesh}: weights differ by {row['weights']:.1e} from one process's")
    return {
        "recipe": settings.recipe,
        "num_members": num_members,
        "batch_size": settings.batch_size,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "meshes": found,
    }


def measure(settings: Run, mesh: str, folder: Path, steps: int) -> None:
    """Work of each process: one step to compare, a few to time, and the whole run."""
    run, kind, defence = resolve(settings)
    dataset = load_dataset(run.data.spec)
    split = train_validation(dataset, run.data.validation)[0]
    with processes(mesh, "cpu") as team:
        signature = Signature.of(dataset)
        ensemble = kind.build(
            num_classes=len(signature.classes), shape=signature.shape, seed=run.seed
        )
        loader = loader_of(run, split, "cpu", rank=team.row, world_size=team.shape[0])
        own = team.own(kind.num_members)
        names = {p: n for n, p in ensemble.named_parameters()}
        params = [p for m in own for p in ensemble.parameters_of(m)]
        # given examples: the images themselves
        given = resolve(override(run, _unattacked(run)))[2]
        with spread_over(team, ensemble):
            _steps(
                run,
                given.stages(kind.num_members, run.epochs)[-1],
                ensemble,
                loader,
                team,
                params,
                1,
            )
            grads = team.collect({names[p]: p.grad for p in params if p.grad is not None})
            # traffic is reported for the timed steps only
            team.traffic.clear()
            stage = defence.stages(kind.num_members, run.epochs)[-1]
            seconds = _steps(run, stage, ensemble, loader, team, params, steps)
        sent = {what: total // steps for what, total in team.traffic.items()}
        record = team.gathered({"seconds": seconds, "bytes": sent})
        if team.first:
            save_file(grads, folder / "gradients.safetensors")
            _write(folder, record)
        train(run, folder / "run", mesh=mesh, quiet=True)


def _unattacked(run: Run) -> list[str]:
    """Settings with which the adversary returns the images themselves."""
    radii = ["smallest_eps"] if "smallest_eps" in run.defence else []
    radii += ["adversary.eps"] if "adversary" in run.defence else []
    return [f"defence.{name}=0.0" for name in radii]


def _write(folder: Path, record: list[dict[str, Any]]) -> None:
    kinds = sorted({what for one in record for what in one["bytes"]})
    merged = {
        "seconds": max(one["seconds"] for one in record),
        "bytes": {what: max(one["bytes"].get(what, 0) for one in record) for what in kinds},
    }
    (folder / "record.json").write_text(json.dumps(merged))


def _steps(
    run: Run,
    stage: Stage,
    ensemble: Ensemble,
    loader: Loader,
    team: Mesh,
    params: list[torch.nn.Parameter],
    count: int,
) -> float:
    """Median seconds of steps that do not change the weights."""
    optimizer, tally, seconds = make_optimizer(params, run.optim), Tally(team), []
    # not strict: an epoch may have fewer steps
    for step, batch in zip(range(count), loader.epoch(0), strict=False):
        begun = time.perf_counter()
        take_step(
            # rate 0: each timed step starts from the same weights
            ensemble, stage, batch, optimizer, params, lr=0.0, clip=None, precision="fp32",
            total=step, rng=stream(run.seed, "step", step), first=step == 0, tally=tally,
        )  # fmt: skip
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _compared(settings: Run, folder: Path, alone: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    found, one = load(folder / "run"), load(alone / "run")
    grads = [load_file(at / "gradients.safetensors") for at in (folder, alone)]
    validation = train_validation(load_dataset(settings.data.spec), settings.data.validation)[1]
    return {
        "gradient": max(_apart(grads[0][k], grads[1][k], relative=True) for k in grads[1]),
        "weights": max(
            _apart(a, b) for a, b in zip(found.parameters(), one.parameters(), strict=True)
        ),
        "clean": accuracy(found, validation, 256),
        "robust": _robust(found, validation, settings),
        **record,
    }


def _apart(a: Tensor, b: Tensor, *, relative: bool = False) -> float:
    largest = b.abs().max().clamp_min(1e-30) if relative else 1.0
    return float(((a - b).abs().max() / largest).detach())


def _robust(ensemble: Ensemble, split: Split, settings: Run) -> float:
    """Accuracy of the averaged ensemble under PGD with 10 steps, at the run's threat."""
    index = torch.arange(min(len(split), IMAGES))
    x, y = split.float(index), split.labels[index].long()
    attack = ATTACKS["pgd"](steps=10)  # type: ignore[call-arg]  # the mapping knows attacks alone
    victim = ensemble.averaged()
    moved = attack(victim, x, y, as_threat(settings.threat), rng=stream(0))
    with torch.no_grad():
        return float(correct(victim(moved), y).double().mean())


def table(result: dict[str, Any]) -> str:
    """One line a mesh."""
    lines = [
        f"{result['recipe']}, {result['num_members']} members, batch {result['batch_size']}, gloo, "
        f"{result['cores']} cores, torch {result['torch']}",
        "",
        f"{'mesh':>6} {'gradient':>10} {'weights':>10} {'clean':>7} {'robust':>7} "
        f"{'s/step':>8}  bytes a step and process",
    ]
    for mesh, row in result["meshes"].items():
        sent = ", ".join(f"{what} {total:,}" for what, total in row["bytes"].items()) or "none"
        lines.append(
            f"{mesh:>6} {row['gradient']:10.1e} {row['weights']:10.1e} {100 * row['clean']:6.1f}% "
            f"{100 * row['robust']:6.1f}% {row['seconds']:8.3f}  {sent}"
        )
    return "\n".join(lines)
