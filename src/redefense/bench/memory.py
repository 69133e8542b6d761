"""Peak memory of a RED step above weights, gradients and optimizer state, by number of members.

Live tensors are counted (`train.op_counter`) in the second of two steps of the training loop, so
that the optimizer's state exists. The parameters' new gradients are excluded. Kernels that
hypernetworks generate are excluded and reported separately, as members' weights. Workspace inside
an operation is not counted. On an accelerator the allocator's peak is reported, too, and the memory
of a recording of the step where steps are replayed. The joint graph of all members, as the authors
write it, is counted and not run, since it may not fit.

What still grows with the members is the cotangent of each member's input gradient, as large as the
batch of images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from redefense.bench.inference import named_kind
from redefense.bench.joint import joint_living
from redefense.bench.replayed import ReplayedStep
from redefense.bench.timing import machine
from redefense.config import OptimConfig
from redefense.defences.base import Adversary
from redefense.defences.red import RED
from redefense.ensembles import Ensemble, channels_last
from redefense.rng import stream
from redefense.runtime.device import check_device, computing
from redefense.runtime.phases import watched
from redefense.runtime.recording import recorder_for
from redefense.train.describe import num_written
from redefense.train.op_counter import OpCounter
from redefense.train.steps import Precision, gradients_stay, take_steps
from redefense.types import Batch

MEMBERS: Final = (1, 2, 3, 4, 6, 8, 10, 12)
SINGLE: Final = 4
"""Bytes of a single-precision number."""
OPTIM = OptimConfig(lr=0.01, weight_decay=5e-4)


@computing()
def run(
    *,
    model: str = "resnet8",
    members: Sequence[int] = MEMBERS,
    ensemble: str = "independent",
    batch: int = 64,
    differentiate: str = "exact",
    precision: Precision = "bf16",
    device: str = "cpu",
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure steps of RED (`calibrated`) on random images of 32 x 32 pixels.

    Args:
        model: a name in `MODELS`.
        members: numbers of members.
        ensemble: "independent", or "hyper" with the hypernetworks of a PS-RED recipe.
        batch: images per step.
        differentiate: "exact" or "finite".
        precision: precision of the engine's step; the joint graph is in single precision.
        device: torch device.
        seed: seed of weights and images.
        log: called with each finished case.

    Returns:
        `cases`, one for each number of members: bytes of `engine` and `joint`, of the kernels that
        are `written`, on an accelerator `allocator` and what is `recorded`, too (None where steps
        cannot be), and the `phase` in which the engine's peak is; `spread`, the largest over the
        smallest of the engine's from two members on, less 1; `settings`.

    Raises:
        ConfigError: for another ensemble or device, or a network that no units tile.
    """
    place = check_device(device)
    rng = stream(seed, "bench", "images")
    x = torch.rand(batch, 3, 32, 32, generator=rng)
    y = torch.randint(10, (batch,), generator=rng)
    # two steps suffice for the peak: the graph of a step is freed before the next one
    red = RED(adversary=Adversary(steps=2), differentiate=differentiate)
    cases = []
    for num_members in members:
        kind = named_kind(ensemble, model, num_members)
        built = kind.build(num_classes=10, shape=(3, 32, 32), seed=seed)
        written = SINGLE * sum(num_written(built, m) for m in range(num_members))
        case: dict[str, Any] = {"members": num_members, "written": written}
        # before the move to the device, since operations are counted on the CPU
        case["joint"] = joint_living(built, Batch(x, y, torch.arange(batch))) - written
        channels_last(built.to(place))
        here = Batch(x.to(place), y.to(place), torch.arange(batch))
        case |= _engine(built, red, here, precision)
        if (recorder := recorder_for(place)) is not None:
            step = ReplayedStep(
                built, red, here, optim=OPTIM, precision=precision, recorder=recorder, seed=seed
            )
            recording = step.prepared()
            case["recorded"] = None if recording is None else recording.nbytes
        case["engine"] -= written  # allocated from the first attack on, so included in the peak
        log(line(case))
        cases.append(case)
    # one member has no similarity term, so its step needs less
    several = [case["engine"] for case in cases if case["members"] > 1]
    return {
        "settings": {
            "ensemble": ensemble,
            "model": model,
            "batch": batch,
            "differentiate": differentiate,
            "precision": precision,
            **machine(device),
        },
        "cases": cases,
        "spread": max(several) / min(several) - 1 if several else None,
    }


def _engine(ensemble: Ensemble, red: RED, batch: Batch, precision: Precision) -> dict[str, Any]:
    counter, device, before = OpCounter(), batch.x.device, [0]
    # the first step only creates the optimizer's state
    counter.recording = False

    def second_step() -> None:
        if not counter.recording and device.type == "cuda":
            # called after the first step: the optimizer's state exists from here on
            torch.cuda.reset_peak_memory_stats(device)
            before[0] = torch.cuda.memory_allocated(device)
        counter.recording = True

    stages = red.stages(ensemble.num_members, 1)
    with gradients_stay(ensemble, counter), counter, watched(counter):
        take_steps(
            ensemble, stages, batch, optim=OPTIM, precision=precision, steps=2, on_step=second_step
        )
    found: dict[str, Any] = {"engine": counter.peak, "phase": counter.worst}
    if device.type == "cuda":
        found["allocator"] = torch.cuda.max_memory_allocated(device) - before[0]
    return found


HEAD: Final = (
    f"{'M':>3}{'engine':>14}{'joint graph':>16}{'written':>14}{'allocator':>14}{'recorded':>14}"
    "  engine's peak in"
)


def line(case: Mapping[str, Any]) -> str:
    """A case as text."""
    found = (case.get(name) for name in ("allocator", "recorded"))
    last = "".join(f"{'-' if n is None else f'{n / 1e6:.2f} MB':>14}" for n in found)
    return (
        f"{case['members']:>3}{case['engine'] / 1e6:>11.2f} MB{case['joint'] / 1e6:>13.2f} MB"
        f"{case['written'] / 1e6:>11.2f} MB{last}  {case['phase']}"
    )


def table(result: Mapping[str, Any]) -> str:
    """All cases as plain text, with the settings of the measurement."""
    it, spread = result["settings"], result["spread"]
    head = (
        f"Peak memory of a step of RED (calibrated) above weights, gradients and optimizer state: "
        f"{it['ensemble']} {it['model']}, {it['batch']} images, {it['differentiate']} "
        f"{it['precision']}, {it['device']}, torch {it['torch']}"
    )
    flat = [] if spread is None else [f"from two members on it varies by {100 * spread:.1f} %"]
    return "\n".join([head, HEAD, *map(line, result["cases"]), *flat])
