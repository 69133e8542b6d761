"""What a training step of RED costs, as the authors write it and as the engine takes it.

Four ways to take the same `calibrated` step, half of the batch clean and half adversarial:

| way | what it is |
|---|---|
| joint | the authors': one graph of all members, torch's layers, PGD with weight gradients, fp32 |
| exact fp32 | the engine: one member's graph at a time, double backward |
| exact bf16 | the same with forward passes in half precision |
| finite bf16 | the engine with differences of losses in place of double backward |

In every round each way takes one step in turn, and ratios are taken within their round, so that a
drift of the machine's speed cancels. The floor is 24 forward passes a member, one forward pass
being measured in the same rounds and the same precision.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import nn

from redefense.bench.timing import machine, seconds
from redefense.config import OptimConfig
from redefense.defences.base import Adversary
from redefense.defences.red import RED
from redefense.ensembles import Members
from redefense.kinds import IndependentKind
from redefense.rng import stream
from redefense.threat import Threat
from redefense.train.optim import make_optimizer
from redefense.train.run import channels_last
from redefense.train.steps import take_steps
from redefense.types import Batch, Images, Labels

FLOOR_PASSES = 24
"""Forward passes a member that a step needs at least, by counting products of its layers."""

BATCH: Final[Mapping[str, int]] = MappingProxyType({"resnet18": 16, "resnet32": 64, "resnet56": 32})
"""Images of a step where 128 of them would take two cores more than minutes."""

OPTIM = OptimConfig(lr=0.01, weight_decay=5e-4)
Step = Callable[[], None]


def run(
    *,
    models: Sequence[str] = ("resnet8", "resnet20"),
    members: Sequence[int] = (3, 8),
    batch: int | None = None,
    steps: int = 10,
    rounds: int = 2,
    device: str = "cpu",
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the four ways on random images of 32 x 32 pixels.

    Args:
        models: names in `MODELS`.
        members: numbers of members.
        batch: images of a step; 128, or fewer for networks that are slow on a CPU.
        steps: of the training adversary.
        rounds: how often each way is timed, after one step that is not.
        device: where.
        seed: of weights and images.
        tell: told each finished case.

    Returns:
        `settings` and `cases`, one for each model and number of members: median seconds of one
        `forward` pass of a member and of each way, how many times faster than `joint` it is and
        how many times the floor.
    """
    cases = []
    for model in models:
        for num_members in members:
            size = batch or (BATCH.get(model, 128) if device == "cpu" else 128)
            case = _case(model, num_members, size, steps, rounds, device, seed)
            cases.append(case)
            for text in lines(case):
                tell(text)
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
    kind = IndependentKind(model=model, num_members=num_members)
    ensemble = kind.build(num_classes=10, shape=(3, 32, 32), seed=seed).to(device)
    rng = stream(seed, "bench", "images")
    x = torch.rand(size, 3, 32, 32, generator=rng).to(device)
    y = torch.randint(10, (size,), generator=rng).to(device)
    ways = _ways(ensemble, Batch(x, y, torch.arange(size)), Adversary(steps=steps), seed)
    timed = {**_forwards(ensemble, x), **ways}
    for take in timed.values():
        take()
    found = [
        {name: seconds(take, x.device, 1 if name in ways else 5) for name, take in timed.items()}
        for _ in range(rounds)
    ]
    median = {name: statistics.median(r[name] for r in found) for name in timed}
    shown: dict[str, Any] = {}
    for name in ways:
        unit = "forward bf16" if name.endswith("bf16") else "forward fp32"
        floor = [r[name] / (FLOOR_PASSES * num_members * r[unit]) for r in found]
        shown[name] = {
            "seconds": median[name],
            "times_faster_than_joint": statistics.median(r["joint"] / r[name] for r in found),
            "times_the_floor": statistics.median(floor),
        }
    return {
        "model": model,
        "members": num_members,
        "batch": size,
        "forward": {k: median[f"forward {k}"] for k in ("fp32", "bf16")},
        "ways": shown,
    }


def _ways(ensemble: Members, batch: Batch, adversary: Adversary, seed: int) -> dict[str, Step]:
    """One step of each way; the engine's train one ensemble: time does not depend on weights."""
    theirs = torch_layers(copy.deepcopy(ensemble))
    optimizer = make_optimizer(list(theirs.parameters()), OPTIM)
    channels_last(ensemble)  # as training does

    def joint() -> None:
        red, rng = RED(adversary=adversary), stream(seed, "bench", "joint")
        joint_step(theirs, red, batch.x, batch.y, optimizer, rng)

    def engine(differentiate: str, precision: Literal["fp32", "bf16"]) -> None:
        red = RED(adversary=adversary, differentiate=differentiate)
        stages = red.stages(ensemble.num_members, 1)
        take_steps(ensemble, stages, batch, optim=OPTIM, precision=precision, seed=seed)

    return {
        "joint": joint,
        "exact fp32": partial(engine, "exact", "fp32"),
        "exact bf16": partial(engine, "exact", "bf16"),
        "finite bf16": partial(engine, "finite", "bf16"),
    }


def torch_layers(ensemble: Members) -> Members:
    """The same ensemble with layers as torch makes them, whatever ours have learnt since."""
    for module in ensemble.modules():
        for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
            if isinstance(module, kind):
                module.__class__ = kind
    return ensemble


def joint_step(
    ensemble: Members,
    red: RED,
    x: Images,
    y: Labels,
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
) -> None:
    """One step as the released code is organised: all members in one graph, single precision."""
    ensemble.train()
    half = len(x) // 2
    x_adv = x.clone()
    x_adv[half:] = _wasteful_pgd(ensemble.averaged(), x[half:], y[half:], red.adversary, rng)
    optimizer.zero_grad(set_to_none=True)
    red.terms(ensemble, x, y, x_adv)["total"].backward()
    optimizer.step()


def _wasteful_pgd(
    victim: nn.Module, x: Images, y: Labels, adversary: Adversary, rng: torch.Generator
) -> Images:
    """PGD that computes the gradient of every weight at every step, and throws it away."""
    threat = Threat(eps=adversary.eps)
    noise = torch.rand(x.shape, generator=rng).to(x)
    point = threat.project(x + threat.eps * (2 * noise - 1), x)
    for _ in range(adversary.steps):
        point = point.detach().requires_grad_()
        F.nll_loss(victim(point), y).backward()
        assert point.grad is not None
        ascent = adversary.step_size * threat.eps * point.grad.sign()
        point = threat.project(point.detach() + ascent, x)
    return point


def _forwards(ensemble: Members, x: Images) -> dict[str, Step]:
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
    f"{'network':<12}{'M':>3}{'batch':>6}  {'way':<12}{'seconds':>9}{'faster than joint':>19}"
    f"{'times the floor':>17}"
)


def lines(case: Mapping[str, Any]) -> list[str]:
    """A case as text, one line a way."""
    where = f"{case['model']:<12}{case['members']:>3}{case['batch']:>6}"
    return [
        f"{where}  {name:<12}{way['seconds']:>9.3f}{way['times_faster_than_joint']:>18.2f}x"
        f"{way['times_the_floor']:>16.2f}x"
        for name, way in case["ways"].items()
    ]


def table(result: Mapping[str, Any]) -> str:
    """All cases as plain text, with what they were measured on."""
    it = result["settings"]
    head = (
        f"A step of RED (calibrated, PGD-{it['steps']} on half the batch), {it['device']}, "
        f"{it['threads']} thread(s), torch {it['torch']}, median of {it['rounds']} round(s); "
        f"floor: {it['floor_passes']} forward passes a member"
    )
    return "\n".join([head, HEAD, *(text for case in result["cases"] for text in lines(case))])
