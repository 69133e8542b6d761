"""Prediction of the FLOPs, time and memory of a training, by counting its steps.

The training loop takes a step of each stage at full size under a dry `OpCounter`, so that any
method, ensemble and optimizer is counted. Passes are in *forward-pass equivalents*: FLOPs divided
by those of one forward pass of one member.

Time is predicted per operation, as the maximum of its arithmetic, memory traffic and launch on an
`Accelerator`. Validation, data loading, checkpoints and work at the end of a stage (the refit of
BARRE's mixture) are not included.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from redefense.config import Run
from redefense.data import published
from redefense.defences import Stage
from redefense.ensembles import Ensemble, channels_last
from redefense.errors import ConfigError, suggestion
from redefense.limits import at_least
from redefense.rng import stream
from redefense.runtime.phases import EXAMPLES, PHASES, RECORDED
from redefense.train.accelerators import ACCELERATORS, Accelerator
from redefense.train.describe import known_images
from redefense.train.loading import Signature, resolve
from redefense.train.op_counter import Entry, OpCounter
from redefense.train.steps import counted_step, forward_flops
from redefense.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """The steps of one stage.

    Attributes:
        name: name of the stage.
        steps: optimizer steps in all its epochs.
        entries: operations of one step, the mean over the counted epochs.
        living: peak bytes of a step beyond weights, gradients and optimizer state.
    """

    name: str
    steps: int
    entries: Mapping[Entry, float]
    living: int

    def flops(self, phase: str | None = None) -> float:
        """FLOPs of one step, or of one of its phases."""
        return math.fsum(e.flops * n for e, n in self.entries.items() if phase in (None, e.phase))

    def seconds(self, on: Accelerator, share: float = 1.0, *, replayed: bool = False) -> float:
        """Seconds of one step, or of a fraction of its images; replayed if possible."""
        return counted_seconds(self.entries, on, share, replayed=replayed)


def counted_seconds(
    entries: Mapping[Entry, float] | Mapping[Entry, int],
    on: Accelerator,
    share: float = 1.0,
    *,
    replayed: bool = False,
) -> float:
    """Seconds of consecutive operations, or of a fraction of the images in each.

    With `replayed`, a training step is replayed up to its gradients.
    """

    def seconds(e: Entry) -> float:
        # the launch of an operation does not become shorter with fewer images
        moved, recorded = share * e.moved, replayed and e.phase in RECORDED
        return on.seconds(half=e.half, flops=share * e.flops, moved=moved, replayed=recorded)

    return math.fsum(n * seconds(e) for e, n in entries.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of a run, independent of the device.

    Attributes:
        run: with every setting resolved.
        members: M.
        shape: channels, height and width of an image.
        images: training images per epoch.
        batch: images per step.
        forward: FLOPs of a forward pass of one image through one member.
        stages: cost of each stage.
        weights: bytes of parameters and buffers.
        gradients: bytes of gradients.
        optimizer: bytes of the optimizer state.
    """

    run: Run
    members: int
    shape: tuple[int, int, int]
    images: int
    batch: int
    forward: int
    stages: tuple[StageCost, ...]
    weights: int
    gradients: int
    optimizer: int

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def flops(self, phase: str | None = None) -> float:
        """FLOPs of the whole training, or of one phase of its steps."""
        return math.fsum(stage.steps * stage.flops(phase) for stage in self.stages)

    def passes(self, phase: str | None = None) -> float:
        """Forward-pass equivalents per member and training image."""
        return self.flops(phase) / (self.forward * self.members * self.steps * self.batch)

    @property
    def parameters(self) -> int:
        """Number of trainable parameters of all members."""
        return self.gradients // 4  # in single precision, whatever that of forward passes

    @property
    def memory(self) -> dict[str, int]:
        """Peak bytes on a device that trains all members."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            # stages follow each other, and each frees its activations
            "activations": max(stage.living for stage in self.stages),
        }
        return {**parts, "total": sum(parts.values())}


def count(
    run: Run, *, num_classes: int, shape: tuple[int, int, int], images: int | None = None
) -> Cost:
    """Count the steps of a run for data of given classes and shape.

    `images` is the number of training images, with those held out; None if it is not known.

    Where epochs of a stage differ (DVERGE draws a layer for each), the mean of up to eight is used.

    Raises:
        ConfigError: if the number of training images is not known.
    """
    run, kind, defence = resolve(run)
    images = _images(run, images)
    batch_size = min(run.batch_size, images)
    ensemble = kind.build(num_classes=num_classes, shape=shape, seed=run.seed)
    channels_last(ensemble)
    x = torch.rand(batch_size, *shape, generator=stream(run.seed, "cost"))
    batch = Batch(x, torch.arange(batch_size) % num_classes, torch.arange(batch_size))
    stages = defence.stages(kind.num_members, run.epochs)
    costs = []
    for index, stage in enumerate(stages):
        if stage.before is not None:
            stage.before(ensemble)
        counted = _counted(ensemble, stages, index, batch, run)
        entries: Counter[Entry] = Counter()
        for counter in counted:
            entries.update(counter.entries)
        costs.append(
            StageCost(
                name=stage.name,
                # the loader drops the last, incomplete batch of an epoch
                steps=stage.epochs * (images // batch_size),
                entries={e: n / len(counted) for e, n in entries.items()},
                living=max(counter.peak for counter in counted),
            )
        )
    parameters = sum(p.nbytes for p in ensemble.parameters())
    return Cost(
        run=run,
        members=kind.num_members,
        shape=shape,
        images=images,
        batch=batch_size,
        forward=forward_flops(ensemble, x[:1]),
        stages=tuple(costs),
        weights=parameters + sum(b.nbytes for b in ensemble.buffers()),
        gradients=parameters,
        # Adam stores two moments of each gradient, SGD a buffer if it has momentum
        optimizer=parameters * (2 if run.optim.name == "adam" else int(run.optim.momentum > 0))
        + (0 if run.optim.ema is None else parameters),
    )


def _images(run: Run, images: int | None) -> int:
    """Number of images of an epoch."""
    known = published(run.data.spec)
    if images is None and known is not None:
        images = known.images
    if images is not None:
        # as in `train_validation`
        total = images - round(run.data.validation * images)
        return min(total, run.data.images or total)
    if run.data.images is None:
        family = run.data.spec.partition(":")[0]
        raise ConfigError(f"the number of {family} images is not known: give --set data.images=N")
    return run.data.images


def _counted(
    ensemble: Ensemble, stages: Sequence[Stage], index: int, batch: Batch, run: Run
) -> list[OpCounter]:
    """A representative step of an epoch, or steps of several epochs if these differ."""

    def step(epoch: int) -> OpCounter:
        return counted_step(
            ensemble, stages, batch, optim=run.optim, precision=run.precision, seed=run.seed,
            index=index, epoch=epoch,
        )  # fmt: skip

    epochs = stages[index].epochs
    # two epochs tell whether the steps differ: counting costs seconds for each
    found = {epoch: step(epoch) for epoch in {0, epochs // 2}}
    if len({counter.flops() for counter in found.values()}) > 1:
        for epoch in range(0, epochs, max(1, epochs // 8)):
            found.setdefault(epoch, step(epoch))
    return list(found.values())


ASSUMPTIONS: Final = (
    "an operation takes the longest of its arithmetic, its traffic and its launch",
    "single-precision convolutions run in TF32 on devices that have it, the default of torch",
    "validation, data loading, checkpoints and a mixture's refit at the end of a stage not counted",
    "where one process attacks the average of many members in parts, processes that share the "
    "members take it in fewer: their time is an upper bound",
    "workspace inside operations and the allocator's rounding are not in the memory",
)


def passes_per_image(run: Run) -> float:
    """Forward-pass equivalents of a recipe per member and training image.

    Raises:
        ConfigError: for data of unknown shape or size.
    """
    return _cost_of(run.recipe, run).passes()


def predict_run(what: str, run: Run, accelerator: str, devices: int = 1) -> dict[str, Any]:
    """`predict` for a recipe, a record or a trained run directory `what`, resolved to `run`.

    Raises:
        ConfigError: for data of unknown shape or size, or an unknown accelerator.
    """
    _named(accelerator)  # before the steps are counted, which takes seconds
    return predict(_cost_of(what, run), accelerator, devices)


def _cost_of(what: str, run: Run) -> Cost:
    checkpoint, num_classes, shape = known_images(what, run)
    images = None if checkpoint is None else Signature.stored(checkpoint.state).images
    return count(run, num_classes=num_classes, shape=shape, images=images)


def _named(accelerator: str) -> Accelerator:
    if accelerator not in ACCELERATORS:
        near = suggestion(accelerator, list(ACCELERATORS))
        raise ConfigError(
            f"unknown accelerator {accelerator!r}{near}; there are {', '.join(ACCELERATORS)}"
        )
    return ACCELERATORS[accelerator]


def predict(cost: Cost, accelerator: str, devices: int = 1) -> dict[str, Any]:
    """JSON-ready cost of a run, and its time on a named accelerator.

    One device replays its steps where it can record them; the time without replay is reported, too.
    Several devices do not replay. They either split each batch and average gradients, or split the
    members and exchange input gradients once per step and once per gradient of an adversary.

    Raises:
        ConfigError: for an accelerator that is not in the table, or fewer than one device.
    """
    at_least(1, devices=devices)
    on, memory = _named(accelerator), cost.memory
    eager = _seconds(cost, lambda stage: stage.seconds(on))
    times, replays = {"one device": eager}, list[str]()
    if on.replayed is not None:
        replays.append(
            "on one device what a step computes up to its gradients is replayed, an operation in "
            f"{1e6 * on.replayed:g} us at least (fitted to two timings of parts of steps); a "
            "method that cannot be recorded there is not"
        )
        replayed = _seconds(cost, lambda stage: stage.seconds(on, replayed=True))
        times = {"one device": replayed, "one device, eager": eager}
    if devices > 1:
        others = (devices - 1) / devices
        # a ring all-reduce sends each gradient twice, less its own share
        averaging = 2 * others * cost.gradients / on.link
        times[f"{devices} devices, data"] = _seconds(
            cost, lambda stage: stage.seconds(on, 1 / devices) + averaging
        )
        # the device with the most members sets the pace
        fullest = -(-cost.members // devices) / cost.members
        times[f"{devices} devices, members"] = _seconds(
            cost,
            lambda stage: fullest * stage.seconds(on) + others * _exchanged(cost, stage) / on.link,
        )
    peak = on.half if cost.run.precision == "bf16" else on.single
    return {
        "recipe": cost.run.recipe,
        "method": cost.run.defence["name"],
        "members": cost.members,
        "model": cost.run.ensemble["model"],
        "image": list(cost.shape),
        "batch": cost.batch,
        "images": cost.images,
        "steps": cost.steps,
        "forward_flops": cost.forward,
        "flops_per_step": cost.flops() / cost.steps,
        "flops": cost.flops(),
        "passes_per_member_and_image": cost.passes(),
        "passes_by_phase": {name: cost.passes(name) for name in PHASES if cost.flops(name)},
        "memory": {**memory, "fits": memory["total"] <= on.memory},
        "accelerator": {"name": accelerator, **dataclasses.asdict(on)},
        "seconds_per_step": {name: s / cost.steps for name, s in times.items()},
        "hours": {name: s / 3600 for name, s in times.items()},
        "utilisation": cost.flops() / times["one device"] / peak,
        "assumptions": [
            *ASSUMPTIONS,
            f"convolutions reach {on.reach:.0%} of the peak, other operations {on.stream:.0%} of "
            f"the bandwidth, and each takes {1e6 * on.launch:g} us at least",
            *replays,
        ],
    }


def _seconds(cost: Cost, step: Callable[[StageCost], float]) -> float:
    return math.fsum(stage.steps * step(stage) for stage in cost.stages)


def _exchanged(cost: Cost, stage: StageCost) -> float:
    """Bytes of input gradients exchanged per step by processes that split the members."""
    image = 4 * math.prod(cost.shape)
    # an adversary's gradient is two passes of every member, each exchanged once
    crafted = stage.flops(EXAMPLES) / (2 * cost.members * cost.forward)
    return image * cost.members * (cost.batch + crafted)


def table(it: Mapping[str, Any]) -> str:
    """A prediction as plain text."""
    memory, on = it["memory"], it["accelerator"]
    parts = ", ".join(f"{memory[k] / 1e9:.2f} {k}" for k in list(memory)[:4])
    rows = [
        ("run", f"{it['recipe']}: {it['method']}, {it['members']} x {it['model']}"),
        ("images", f"{it['images']:,} of {'x'.join(map(str, it['image']))}, {it['batch']} a step"),
        ("steps", f"{it['steps']:,}"),
        ("forward pass", f"{it['forward_flops'] / 1e9:.4g} GFLOP an image and member"),
        ("a step", f"{it['flops_per_step'] / 1e12:.4g} TFLOP"),
        ("in all", f"{it['flops'] / 1e15:.4g} PFLOP"),
        ("passes", f"{it['passes_per_member_and_image']:.2f} forward passes a member and image"),
        *((f"  {name}", f"{n:.2f}") for name, n in it["passes_by_phase"].items()),
        ("memory", f"{memory['total'] / 1e9:.2f} GB ({parts})"),
        ("accelerator", f"{on['name']}: {on['source']}"),
        *(
            (name, f"{hours:.3g} h, {it['seconds_per_step'][name]:.3g} s a step")
            for name, hours in it["hours"].items()
        ),
        ("utilisation", f"{it['utilisation']:.1%} of the peak, on one device"),
        *(("assuming" if i == 0 else "", text) for i, text in enumerate(it["assumptions"])),
    ]
    if not memory["fits"]:
        rows.append(("warning", f"more than the {on['memory'] / 1e9:g} GB of one device"))
    return "\n".join(f"{name:<24}{text}" for name, text in rows)
