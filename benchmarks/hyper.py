"""PS-RED against plain members in one process: a training step, the drawn member, the first draw.

    OMP_NUM_THREADS=1 python benchmarks/hyper.py cifar10-mini-ps-red --batch 128

prints medians of ratios of alternating measurements as JSON. Ratios, because seconds on a shared
machine mean little; `first_draw` is the writing of one member's kernels over one image's pass.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from redefense.defences import Stage
from redefense.ensembles import Hyper, Members
from redefense.kinds import HyperKind
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.train.fit import take_step
from redefense.train.optim import make_optimizer
from redefense.train.run import resolve
from redefense.types import Batch


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def stepper(ensemble: Members, name: str, batch: Batch) -> Callable[[], object]:
    """One optimizer step of the recipe's defence on this ensemble."""
    run, _, defence = resolve(recipe(name))
    stage: Stage = defence.stages(ensemble.num_members, 1)[0]
    params = list(ensemble.parameters())
    optimizer = make_optimizer(params, run.optim)

    def step() -> object:
        return take_step(
            ensemble, stage, batch, optimizer, params, lr=1e-3, clip=None,
            precision=run.precision, total=0, rng=stream(0, "step"), first=False,
        )  # fmt: skip

    return step


def ratios(above: Callable[[], object], below: Callable[[], object], count: int) -> float:
    """Median ratio of times measured in turn, after one warm-up of each."""
    above(), below()
    return statistics.median(seconds(above) / seconds(below) for _ in range(count))


def measure(name: str, batch_size: int, members: int, repeats: int) -> dict[str, float]:
    """All ratios of a PS-RED recipe on random images."""
    torch.set_flush_denormal(True)
    _, kind, _ = resolve(recipe(name))
    assert isinstance(kind, HyperKind)
    kind = replace(kind, num_members=members)
    compact, plain = (
        k.build(num_classes=10, shape=(3, 32, 32), seed=0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        for k in (kind, kind.plain())
    )
    assert isinstance(compact, Hyper)
    index = torch.arange(batch_size)
    batch = Batch(torch.rand(batch_size, 3, 32, 32, generator=stream(0)), index % 10, index)
    found = {"step": ratios(stepper(compact, name, batch), stepper(plain, name, batch), repeats)}
    compact.eval(), plain.eval()
    one = batch.x[:1]

    def rewritten() -> object:
        compact._forget()
        return compact.logits_of(0, one)

    with torch.no_grad():
        found["cached_draw"] = ratios(
            lambda: compact.logits_of(0, one), lambda: plain.logits_of(0, one), 20 * repeats
        )
        found["first_draw"] = ratios(rewritten, lambda: plain.logits_of(0, one), 5 * repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="cifar10-mini-ps-red")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    found = measure(args.recipe, args.batch, args.members, args.repeats)
    sys.stdout.write(json.dumps({"recipe": args.recipe, "batch": args.batch, **found}) + "\n")


if __name__ == "__main__":
    main()
