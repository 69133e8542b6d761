"""The training loop over the stages of a defence, independent of the method, as events.

    for event in fit(ensemble, stages, loader, optim=optim):
        match event:
            case StepDone(): ...
            case EpochEnded(): ...
            case SaveDue(): ...

`fit` trains and yields events; the caller saves, logs and stops.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from redefense.config import OptimConfig
from redefense.defences import Stage
from redefense.ensembles import Ensemble, kernels_kept
from redefense.errors import ConfigError, Interrupted, TrainingError, first_of
from redefense.networks import differentiating
from redefense.rng import draw_seed, seeded, stream
from redefense.runtime.mesh import Mesh, Tally
from redefense.runtime.phases import DATA, MEMBER_STEPS, OPTIMIZER, each, phase
from redefense.runtime.recording import Recorder
from redefense.runtime.signals import handled
from redefense.train.exchange import spread_over
from redefense.train.optim import StageOptimizer, learning_rate
from redefense.train.replay import Compute, RecordedSteps
from redefense.types import Batch, Loss, Progress


@runtime_checkable
class Loader(Protocol):
    """Loader of batches that depend on (epoch, step) alone."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True, slots=True)
class Position:
    """Position of the training: the next step to take.

    Attributes:
        stage: index of the stage.
        epoch: epoch within the stage.
        step: step within the epoch.
        total: optimizer steps taken so far.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    total: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Start:
    """State to resume from: the contents of a checkpoint except the weights.

    Attributes:
        position: the next step to take.
        totals: running sums of the epoch at `position`.
        tensors: state of the stage's optimizer, see `StageOptimizer.tensors`.
    """

    position: Position = Position()
    totals: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base class of events; the weights are those at the time of the event.

    Attributes:
        position: the next step to take.
        totals: running sums over the steps of the epoch, of each term of the loss.
        optimizer: the stage's optimizer.
    """

    position: Position
    totals: Mapping[str, float]
    optimizer: StageOptimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """An optimizer step was taken.

    Attributes:
        terms: terms of its loss, and its learning rate `lr`.
    """

    terms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnded(Event):
    """An epoch has ended; `totals` are its means, and averaged weights, if any, are loaded.

    Attributes:
        stage: the epoch's stage.
    """

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDue(Event):
    """A checkpoint is due: long work was done since the last one, or follows.

    Attributes:
        before: description, for messages, of following long work without checkpoints; or empty.
    """

    before: str = ""


def fit(
    ensemble: Ensemble,
    stages: Sequence[Stage],
    loader: Loader,
    *,
    optim: OptimConfig,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    start: Start | None = None,
    mesh: Mesh | None = None,
    recorder: Recorder | None = None,
) -> Generator[StepDone | EpochEnded | SaveDue, None, None]:
    """Train through all stages from `start`, and yield events.

    Random streams are derived from (seed, total step), so a run resumed at any step is
    bit-identical. The device is synchronised once per step, where the terms of the loss are read
    and checked. The processes of `mesh` train together: the loader gives each its part of every
    batch, and all yield the same events; weights of members on other processes are then out of
    date.

    With a `recorder` steps are recorded and replayed, see `train.replay`. It is for one process.

    Raises:
        TrainingError: for a non-finite loss, before the optimizer step; or if, on the first step of
            a stage, a trainable parameter got no finite gradient.
        Interrupted: on SIGINT or SIGTERM during a stage's work before its first or after its last
            step; the caller handles signals at other times.
        ConfigError: if FSDP2 has sharded the weights.
    """
    start, mesh = start or Start(), mesh or Mesh()
    position, totals = start.position, dict(start.totals)
    with spread_over(mesh, ensemble):
        for index in range(position.stage, len(stages)):
            stage = stages[index]
            # in a resumed stage this work is in the weights already
            resumed = position.epoch + position.step > 0
            if not resumed and stage.before is not None:
                with (
                    interrupted_at_once(f"before stage {stage.name!r}", mesh),
                    drawing(seed, mesh, "before", stage.name),
                ):
                    stage.before(ensemble)
            optimizer, tally = StageOptimizer(ensemble, stage.members, optim), Tally(mesh)
            if resumed:
                done = position.epoch * len(loader) + position.step
                optimizer.restore(start.tensors, updates=done)
            params, num_steps = optimizer.params, max(1, stage.epochs * len(loader))
            compute: Compute = partial(gradients, ensemble, stage, params, precision)
            if recorder is not None:
                compute = RecordedSteps(recorder, ensemble, params, compute, stage.name)
            for epoch in range(position.epoch, stage.epochs):
                number, last = epoch_number(stages, index, epoch), epoch + 1 == stage.epochs
                progress = Progress(epoch, stage.epochs, draw_seed(stream(seed, "epoch", number)))
                batches = each(DATA, loader.epoch(number, position.step))
                for step, batch in enumerate(batches, position.step):
                    done = epoch * len(loader) + step
                    lr = learning_rate(optim, done, num_steps, stage.schedule)
                    with drawing(seed, mesh, "step", position.total):
                        terms = take_step(
                            ensemble, stage, replace(batch, progress=progress),
                            optimizer.optimizer, params, lr=lr, clip=optim.clip,
                            precision=precision, total=position.total,
                            rng=stream(seed, "step", position.total),
                            first=epoch == step == 0, tally=tally, compute=compute,
                        )  # fmt: skip
                    position = Position(index, epoch, step + 1, position.total + 1)
                    for name, value in terms.items():
                        # divided at once, as a checkpoint within the epoch stores them
                        totals[name] = totals.get(name, 0.0) + value / len(loader)
                    yield StepDone(
                        position=position, totals=totals, optimizer=optimizer,
                        terms={**terms, "lr": lr},
                    )  # fmt: skip
                if last and stage.after is not None:
                    # it may take long: an interrupted process resumes here
                    work = f"after stage {stage.name!r}"
                    yield SaveDue(
                        position=position, totals=totals, optimizer=optimizer, before=work
                    )
                    optimizer.put_averages()
                    with interrupted_at_once(work, mesh), drawing(seed, mesh, "after", stage.name):
                        whole = mesh.joined(loader.epoch(0))
                        stage.after(ensemble, whole, stream(seed, "after", stage.name))
                    # rounding of a refit may differ between processes: all continue with the same
                    # mixture
                    mesh.broadcast(ensemble.mixture, 0)
                elif last:
                    optimizer.put_averages()
                position = Position(index, epoch + 1, 0, position.total)
                # validated with the weights that the stage would end with; at its end they are in
                # place
                with nullcontext() if last else optimizer.averages_in_place():
                    yield EpochEnded(
                        position=position, totals=totals, optimizer=optimizer, stage=stage
                    )
                totals = {}
                if not last:
                    yield SaveDue(position=position, totals={}, optimizer=optimizer)
            position = Position(index + 1, 0, 0, position.total)
            yield SaveDue(position=position, totals={}, optimizer=optimizer)


def drawing(seed: int, mesh: Mesh, *path: int | str) -> AbstractContextManager[None]:
    """The block in which layers that draw, as dropout and noise do, draw from a named stream.

    They draw from the global generators, which are given back as they were; each process draws
    other numbers.
    """
    named = stream(seed, "layers", *path, mesh.row, mesh.column)
    return seeded(draw_seed(named), mesh.device)


def take_step(
    ensemble: Ensemble,
    stage: Stage,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    params: Sequence[nn.Parameter],
    *,
    lr: float,
    clip: float | None,
    precision: Literal["fp32", "bf16"],
    total: int,
    rng: torch.Generator,
    first: bool,
    tally: Tally | None = None,
    compute: Compute | None = None,
) -> dict[str, float]:
    """Take one optimizer step; return the terms of the loss, summed over processes.

    `compute` accumulates the gradients in the parameters, as `gradients` does.
    """
    tally = tally or Tally(Mesh())
    mesh = tally.mesh
    compute = compute or partial(gradients, ensemble, stage, params, precision)
    summed = compute(batch, rng)
    mesh.average(params)
    # the only synchronisation of a step, before the optimizer can spread what is not finite; one
    # step later it would gain about one percent, but needs guards on the device, see docs/gpus.md
    terms = tally(summed)
    where = f"in stage {stage.name!r} at step {total + 1}"
    # value - value is 0 for every finite number, NaN for all others
    bad = [f"{name} = {value}" for name, value in terms.items() if value - value != 0]
    if bad:
        message = f"non-finite loss {where}: {', '.join(bad)}; lower optim.lr, or set optim.clip"
        raise mesh.mark_reported(TrainingError(message))
    if first:
        with mesh.agreed():
            check_gradients(ensemble, params, where)
    with phase(OPTIMIZER):
        if clip is not None:
            mesh.clip(params, clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return terms


def gradients(
    ensemble: Ensemble,
    stage: Stage,
    params: Sequence[nn.Parameter],
    precision: Literal["fp32", "bf16"],
    batch: Batch,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """The first half of a step: gradients of the parameters, without device synchronisation.

    It can be recorded, since it reads no value back and draws through `rng.drawn`.

    Returns:
        The summed terms of the loss, detached scalars.
    """
    ensemble.train_members(stage.members)
    for parameter in params:
        parameter.grad = None
    summed: dict[str, Tensor] = {}
    # no cache: weights cast without a graph must not be reused by passes that need gradients
    autocast = torch.autocast(batch.x.device.type, torch.bfloat16, cache_enabled=False)
    with (
        autocast if precision == "bf16" else nullcontext(),
        kernels_kept(ensemble),
        phase(MEMBER_STEPS),
    ):
        for part in _parts(stage, ensemble, batch, rng):
            with differentiating():
                part.total.backward()
            for name, value in part.terms.items():
                summed[name] = summed[name] + value if name in summed else value
    return summed


def _parts(stage: Stage, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
    """The parts of the loss.

    Raises:
        ConfigError: if a user's defence returns or yields something else.
    """
    found: Any = stage.loss(ensemble, batch, rng)
    rule = f"the loss of stage {stage.name!r} must yield objects of redefense.types.Loss, got "
    if isinstance(found, Tensor) or not isinstance(found, Iterable):
        raise ConfigError(f"{rule}a {type(found).__name__}: use yield, not return")
    for part in found:
        if not isinstance(part, Loss):
            raise ConfigError(f"{rule}a {type(part).__name__}")
        yield part


def check_gradients(ensemble: nn.Module, params: Sequence[nn.Parameter], where: str) -> None:
    """Check that every trainable parameter got a finite gradient.

    Raises:
        TrainingError: naming the parameters.
    """
    names = {p: name for name, p in ensemble.named_parameters()}
    missing = [names.get(p, "?") for p in params if p.grad is None]
    if missing:
        raise TrainingError(
            f"no gradient {where} for {first_of(missing, 5)}: use these parameters in the forward "
            "pass, or freeze them with requires_grad_(False)"
        )
    broken = [names.get(p, "?") for p in params if not bool(p.grad.isfinite().all())]  # type: ignore[union-attr]  # checked above
    if broken:
        raise TrainingError(
            f"non-finite gradient {where} for {first_of(broken, 5)}; lower optim.lr, or set "
            "optim.clip"
        )


def epoch_number(stages: Sequence[Stage], index: int, epoch: int) -> int:
    """Loader whose epochs are numbered over all stages, so that no order of images repeats."""
    return sum(stage.epochs for stage in stages[:index]) + epoch


@contextmanager
def interrupted_at_once(where: str, mesh: Mesh) -> Iterator[None]:
    """Raise at once on SIGINT or SIGTERM, for long work that a resume repeats.

    Raises:
        Interrupted: with the stage.
    """

    def handle(number: int) -> None:
        raise mesh.mark_reported(Interrupted(f"stopped {where}; continue with --resume", number))

    with handled(handle):
        yield
