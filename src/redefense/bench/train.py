"""Time of a RED training step: of the authors' joint graph and of this engine.

Four ways to take the same `calibrated` step, half of the batch clean and half adversarial:

| way | what it is |
|---|---|
| joint | the authors': one graph of all members, torch's layers, fp32 |
| exact fp32 | the engine: one member's graph at a time, double backward |
| exact bf16 | the same with forward passes in half precision |
| finite bf16 | the engine with differences of losses in place of double backward |

On a CUDA device each way of the engine is also timed with its steps recorded and replayed
(`train.replay`), with the seconds of the recording alone and the share of a step outside the
recording: the host's work for the batch, the optimizer and reading the terms.

In every round each way takes one step in turn, and ratios are computed within their round, so that
a drift of the machine's speed cancels. The lower bound ("floor") is 24 forward passes per member,
measured in the same rounds and the same precision.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch

from redefense.bench.joint import (
    MARGIN,
    free_memory,
    joint_counted,
    joint_living,
    joint_step,
    torch_layers,
)
from redefense.bench.replayed import ReplayedStep, handed_over
from redefense.bench.timing import machine, seconds
from redefense.config import OptimConfig
from redefense.defences.base import Adversary
from redefense.defences.red import RED
from redefense.ensembles import Ensemble, channels_last
from redefense.ensembles.configs import IndependentConfig
from redefense.rng import stream
from redefense.runtime.device import check_device, computing
from redefense.runtime.recording import Recording, recorder_for
from redefense.train.accelerators import known
from redefense.train.cost import counted_seconds
from redefense.train.op_counter import OpCounter
from redefense.train.optim import make_optimizer
from redefense.train.steps import Precision, counted_step, take_steps
from redefense.types import Batch, Images

FLOOR_PASSES = 24
"""Minimum forward passes per member of a step, by counting products of its layers."""

BATCH: Final[Mapping[str, int]] = MappingProxyType({"resnet18": 16, "resnet32": 64, "resnet56": 32})
"""Images per step for networks on which 128 take minutes on two cores."""

ENGINE: Final[Mapping[str, tuple[str, Precision]]] = MappingProxyType(
    {
        "exact fp32": ("exact", "fp32"),
        "exact bf16": ("exact", "bf16"),
        "finite bf16": ("finite", "bf16"),
    }
)
REPLAYED: Final = ", replayed"
"""Suffix of the names of replayed ways."""

OPTIM = OptimConfig(lr=0.01, weight_decay=5e-4)
Step = Callable[[], None]


@computing()
def run(
    *,
    models: Sequence[str] = ("resnet8", "resnet20"),
    members: Sequence[int] = (3, 8),
    batch: int | None = None,
    steps: int = 10,
    rounds: int = 2,
    device: str = "cpu",
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the four ways on random images of 32 x 32 pixels.

    Args:
        models: names in `MODELS`.
        members: numbers of members.
        batch: images per step; 128, or fewer for networks that are slow on a CPU.
        steps: steps of the training adversary.
        rounds: number of timings of each way, after one warm-up step.
        device: torch device.
        seed: seed of weights and images.
        log: called with each finished case.

    Returns:
        `settings` and `cases`, one for each model and number of members: median seconds of one
        `forward` pass of a member and of each way, how many times faster than `joint` it is, how
        many times the floor, the `operations` that the host hands over, and on a device that the
        cost model knows what it predicts; of a replayed way `graph_seconds` of the recording alone,
        `host_share`, and the seconds that recording took. A joint graph larger than the free
        memory is `skipped`, with the reason, and so are steps that cannot be recorded.

    Raises:
        ConfigError: for an unknown network or device.
    """
    check_device(device)
    cases = []
    for model in models:
        for num_members in members:
            size = batch or (BATCH.get(model, 128) if device == "cpu" else 128)
            case = _case(model, num_members, size, steps, rounds, device, seed)
            cases.append(case)
            for text in lines(case):
                log(text)
    return {
        "settings": {
            "steps": steps,
            "rounds": rounds,
            "floor_passes": FLOOR_PASSES,
            **machine(device),
        },
        "cases": cases,
    }


def _case(
    model: str, num_members: int, size: int, steps: int, rounds: int, device: str, seed: int
) -> dict[str, Any]:
    kind = IndependentConfig(model=model, num_members=num_members)
    ensemble = kind.build(num_classes=10, shape=(3, 32, 32), seed=seed)
    rng, here = stream(seed, "bench", "images"), torch.device(device)
    x = torch.rand(size, 3, 32, 32, generator=rng)
    batch = Batch(x, torch.randint(10, (size,), generator=rng), torch.arange(size))
    adversary = Adversary(steps=steps)
    # before anything is moved to the device, whose free memory decides
    too_large = _too_large(ensemble, batch, here)
    at = known(here)
    counted = {name: _counted(ensemble, batch, way, adversary) for name, way in ENGINE.items()}
    operations = {name: counter.entries.total() for name, counter in counted.items()}
    operations["joint"] = joint_counted(ensemble, batch, steps).entries.total()
    ensemble.to(here)
    batch = Batch(batch.x.to(here), batch.y.to(here), batch.index)
    # copied before the change of the memory format: the released code uses the default one
    ways: dict[str, Step] = {} if too_large else {"joint": _joint(ensemble, batch, adversary, seed)}
    channels_last(ensemble)  # as training does
    for name, way in ENGINE.items():
        ways[name] = partial(_engine, ensemble, batch, way, adversary, seed)
    skipped = {"joint": too_large} if too_large else {}
    replayed: dict[str, Recording] = {}
    if (recorder := recorder_for(here)) is not None:
        for name, (differentiate, precision) in ENGINE.items():
            step = ReplayedStep(
                ensemble, RED(adversary=adversary, differentiate=differentiate), batch,
                optim=OPTIM, precision=precision, recorder=recorder, seed=seed,
            )  # fmt: skip
            own = name + REPLAYED
            if (recording := step.prepared()) is None:
                skipped[own] = "; ".join(step.why)
                continue
            ways[own], replayed[own], operations[own] = step, recording, handed_over(step)
    timed = {**_forwards(ensemble, batch.x), **ways}
    # once without a clock: the first call allocates memory and chooses kernels
    for take in timed.values():
        take()
    found = [
        # a forward pass is short, so it is timed over five calls
        {name: seconds(take, here, 1 if name in ways else 5) for name, take in timed.items()}
        for _ in range(rounds)
    ]
    median = {name: statistics.median(r[name] for r in found) for name in timed}
    shown: dict[str, Any] = {}
    for name in ways:
        plain = name.removesuffix(REPLAYED)
        unit = "forward bf16" if plain.endswith("bf16") else "forward fp32"
        # ratios within a round: the speed of a shared machine drifts between rounds
        floor = [r[name] / (FLOOR_PASSES * num_members * r[unit]) for r in found]
        faster = None if too_large else statistics.median(r["joint"] / r[name] for r in found)
        shown[name] = {
            "seconds": median[name],
            "times_faster_than_joint": faster,
            "times_the_floor": statistics.median(floor),
            "operations": operations[name],
        }
        if at and plain in counted:
            shown[name]["predicted_seconds"] = counted_seconds(
                counted[plain].entries, at, replayed=name in replayed
            )
        if name in replayed:
            # the recording without the host's work for batch, optimizer and logged terms
            alone = statistics.median(seconds(replayed[name].replay, here) for _ in range(rounds))
            shown[name] |= {
                "graph_seconds": alone,
                "host_share": 1 - alone / median[name],
                "recording_seconds": replayed[name].seconds,
            }
    return {
        "model": model,
        "members": num_members,
        "batch": size,
        "forward": {k: median[f"forward {k}"] for k in ("fp32", "bf16")},
        "ways": shown,
        "skipped": skipped,
    }


def _too_large(ensemble: Ensemble, batch: Batch, device: torch.device) -> str | None:
    """Reason to skip the joint graph if it exceeds the free memory."""
    free = free_memory(device)
    if free is None:
        return None
    # its own copy of the weights, their gradients and the optimizer's state
    wanted = joint_living(ensemble, batch) + 3 * sum(p.nbytes for p in ensemble.parameters())
    if wanted <= MARGIN * free:
        return None
    return f"it takes {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _joint(ensemble: Ensemble, batch: Batch, adversary: Adversary, seed: int) -> Step:
    theirs = torch_layers(copy.deepcopy(ensemble))
    optimizer = make_optimizer(list(theirs.parameters()), OPTIM)

    def step() -> None:
        red, rng = RED(adversary=adversary), stream(seed, "bench", "joint")
        joint_step(theirs, red, batch.x, batch.y, optimizer, rng)

    return step


def _engine(
    ensemble: Ensemble, batch: Batch, way: tuple[str, Precision], adversary: Adversary, seed: int
) -> None:
    """All ways of the engine train the same ensemble, since time does not depend on weights."""
    stages = RED(adversary=adversary, differentiate=way[0]).stages(ensemble.num_members, 1)
    take_steps(ensemble, stages, batch, optim=OPTIM, precision=way[1], seed=seed)


def _counted(
    ensemble: Ensemble, batch: Batch, way: tuple[str, Precision], adversary: Adversary
) -> OpCounter:
    """The operations of a step, counted on the CPU without running them."""
    stages = RED(adversary=adversary, differentiate=way[0]).stages(ensemble.num_members, 1)
    theirs = channels_last(copy.deepcopy(ensemble))
    return counted_step(theirs, stages, batch, optim=OPTIM, precision=way[1])


def _forwards(ensemble: Ensemble, x: Images) -> dict[str, Step]:
    """One forward pass of a member, for each precision as it runs fastest."""
    plain = copy.deepcopy(ensemble.member(0)).eval()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    x_last = x.contiguous(memory_format=torch.channels_last)

    def fp32() -> None:
        with torch.no_grad():
            plain(x)

    def bf16() -> None:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
            last(x_last)

    return {"forward fp32": fp32, "forward bf16": bf16}


HEAD: Final = (
    f"{'network':<12}{'M':>3}{'batch':>6}  {'way':<22}{'seconds':>9}{'faster than joint':>19}"
    f"{'times the floor':>17}{'operations':>12}{'predicted s':>13}{'error':>8}"
    f"{'graph alone':>13}{'host':>7}"
)


def lines(case: Mapping[str, Any]) -> list[str]:
    """A case as text, one line a way."""
    where = f"{case['model']:<12}{case['members']:>3}{case['batch']:>6}"
    text = [f"{where}  {name} was not run: {why}" for name, why in case["skipped"].items()]
    for name, way in case["ways"].items():
        faster, predicted = way["times_faster_than_joint"], way.get("predicted_seconds")
        cells = f"{'-':>19}" if faster is None else f"{faster:>18.2f}x"
        cells += f"{way['times_the_floor']:>16.2f}x{way['operations']:>12,}"
        if predicted is not None:
            cells += f"{predicted:>13.3f}{100 * (predicted / way['seconds'] - 1):>+7.0f}%"
        if "graph_seconds" in way:
            cells += "" if predicted is not None else f"{'-':>13}{'-':>8}"
            cells += f"{way['graph_seconds']:>13.4f}{100 * way['host_share']:>6.0f}%"
        text.append(f"{where}  {name:<22}{way['seconds']:>9.3f}{cells}")
    return text


def table(result: Mapping[str, Any]) -> str:
    """All cases as plain text, with the settings of the measurement."""
    it = result["settings"]
    head = (
        f"A step of RED (calibrated, PGD-{it['steps']} on half the batch), {it['device']}, "
        f"{it['threads']} thread(s), torch {it['torch']}, median of {it['rounds']} round(s); "
        f"floor: {it['floor_passes']} forward passes a member"
    )
    return "\n".join([head, HEAD, *(text for case in result["cases"] for text in lines(case))])
