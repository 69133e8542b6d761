"""PS-RED against plain members in one process: a training step, the drawn member, the first draw.

    OMP_NUM_THREADS=1 python benchmarks/hyper.py cifar10-mini-ps-red --batch 128

prints medians of ratios of alternating measurements as JSON. Ratios, because seconds on a shared
machine mean little; `first_draw` is the first answer to one image, for which a member's kernels are
written, over a plain member's.

    OMP_NUM_THREADS=1 python benchmarks/hyper.py --options cifar10:PATH

trains each option that the paper leaves open once, for some plain steps of two members, and prints
what is stored and the validation accuracy: a first look, one seed each.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from redefense.config import Run, StartConfig, settings_of
from redefense.defences import Stage
from redefense.ensembles import Ensemble, Hyper
from redefense.ensembles.configs import ENSEMBLES, HyperConfig
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.runtime.device import computing
from redefense.train.describe import count_parameters
from redefense.train.experiment import train
from redefense.train.loading import resolve
from redefense.train.loop import take_step
from redefense.train.optim import make_optimizer
from redefense.types import Batch


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def stepper(ensemble: Ensemble, name: str, batch: Batch) -> Callable[[], object]:
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


@computing()
def measure(name: str, batch_size: int, members: int, repeats: int) -> dict[str, float]:
    """All ratios of a PS-RED recipe on random images."""
    _, kind, _ = resolve(recipe(name))
    assert isinstance(kind, HyperConfig)
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

    def answers(of: Ensemble) -> Callable[[], object]:
        return lambda: of.logits_of(0, one)

    with torch.no_grad():
        with compact.kernels_kept():
            found["cached_draw"] = ratios(answers(compact), answers(plain), 20 * repeats)
        found["first_draw"] = ratios(answers(compact), answers(plain), 5 * repeats)
    return found


OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "as the recipe": {},
    "one hypernetwork for all": {"shared": True},
    "1x1: max of taps": {"taps": "max"},
    "1x1: sum of taps": {"taps": "sum"},
    "hidden width 8": {"hidden": 8},
    "hidden width 32": {"hidden": 32},
    "embedding 8": {"embedding": 8},
    "embedding 32": {"embedding": 32},
    "both 32": {"embedding": 32, "hidden": 32},
}


def short(name: str, spec: str, steps: int) -> Run:
    """Plain training of two members of a PS-RED recipe for `steps` steps."""
    run = recipe(name)
    data = run.data.model_copy(update={"spec": spec, "images": steps * run.batch_size})
    return run.model_copy(
        update={
            "data": data,
            "defence": {"name": "vanilla"},
            "ensemble": {**run.ensemble, "num_members": 2},
            "epochs": 1,
        }
    )


def trained(run: Run, out: Path) -> dict[str, Any]:
    """Stored parameters, the share saved, and validation accuracy of a run that is made now."""
    train(run, out, quiet=True)
    resolved, kind, _ = resolve(run)
    sizes = count_parameters(str(out), resolved, kind)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    row = {k: sizes[k] for k in ("parameters", "saved")}
    return {**row, "validation_accuracy": last["validation_accuracy"]}


@computing()
def options(name: str, spec: str, steps: int) -> dict[str, dict[str, Any]]:
    """One row an option, one for plain members and one for the recipe started from those."""
    base = short(name, spec, steps)
    _, kind, _ = resolve(base)
    plain = base.model_copy(update={"ensemble": settings_of(ENSEMBLES, kind.plain())})
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "plain"
        rows["plain members"] = trained(plain, source)
        runs = {
            label: base.model_copy(update={"ensemble": {**base.ensemble, **changes}})
            for label, changes in OPTIONS.items()
        }
        start = StartConfig(path=str(source))
        runs["started from the plain members"] = base.model_copy(update={"start": start})
        for number, (label, run) in enumerate(runs.items()):
            out = Path(folder) / str(number)
            rows[label] = trained(run, out)
            if run.start is not None:
                told = json.loads((out / "start.json").read_text())
                rows[label]["kernel_error"] = told["kernel_error"]
                rows[label]["accuracy_before"] = told["validation_accuracy"]["start"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="cifar10-mini-ps-red")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--options", metavar="SPEC", help="data to train the options on")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    found: dict[str, Any] = {"recipe": args.recipe}
    if args.options is None:
        found["batch"] = args.batch
        found |= measure(args.recipe, args.batch, args.members, args.repeats)
    else:
        found["steps"] = args.steps
        found["options"] = options(args.recipe, args.options, args.steps)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
