"""What recorded steps and passes do on one GPU, in at most nine minutes; most telling first.

Sections: the machine; a first step; bits of every method and setting; seconds of a RED step as the
joint graph, eager, replayed, and of its recording alone; memory by number of members; attacks with
recorded passes; then small recipes of all methods trained and evaluated while time lasts. Each
section is independent: an error is printed, and the next section begins. Lines go to stdout,
figures to `$OUT/device.json` or the file given by `--out`.

    python benchmarks/device.py --device cuda --seconds 540 --data cifar10:PATH

With `--device cpu` it is rehearsed: recordings are tapes (tests/tools/tape.py), networks are tiny,
and its seconds mean nothing.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from redefense.attacks import ATTACKS
from redefense.bench import memory, timing
from redefense.bench import train as bench
from redefense.config import Run, override
from redefense.ensembles import channels_last, recorded
from redefense.ensembles.configs import IndependentConfig
from redefense.ensembles.recorded_passes import RecordedPasses
from redefense.evaluation.api import evaluate_run
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.runtime.device import check_device, computing
from redefense.runtime.recording import Recorder, recorder_for
from redefense.threat import Threat
from redefense.train.experiment import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tools"))
from replay_tools import EPOCHS_DIFFER, SETTINGS, Training
from tape import TapeRecorder

METHODS = ["red", "ps-red", "vanilla", "at", "gal", "adp", "dverge", "trs", "mrboost", "barre"]
ATTACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "pgd": ("averaged", {"steps": 20}),
    "meanprob_apgd": ("members", {"steps": 20, "restarts": 1}),
    "hinge": ("members", {"steps": 20, "restarts": 1}),
    "arc": ("members", {"steps": 4, "restarts": 1}),
    "square": ("averaged", {"queries": 100}),
    "eotpgd": ("sampled", {"steps": 10, "draws": 4}),
}


def show(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a script prints its results


class Check:
    """The device, the time that is left, and what was found.

    Args:
        device: cuda, or cpu for a rehearsal.
        seconds: in all.
        out: the file of figures; written after each line.
        data: of the small recipes; those of the digits without.
    """

    def __init__(self, device: str, seconds: float, out: Path | None, data: str | None) -> None:
        self.device, self.seconds, self.out, self.data = check_device(device), seconds, out, data
        self.small = self.device.type == "cpu"
        self.found: dict[str, list[Any]] = {}
        self.begun = time.monotonic()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def recorder(self) -> Recorder:
        return recorder_for(self.device) or TapeRecorder()

    def tell(self, section: str, line: str, **figures: Any) -> None:
        self.found.setdefault(section, []).append(figures or line)
        show(f"[{time.monotonic() - self.begun:4.0f} s] {section}: {line}")
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, indent=1, default=str))

    def section(self, name: str, work: Callable[[str], None], needs: float) -> None:
        """Do a section if that many seconds are left; an error ends it and nothing else."""
        if self.left < needs:
            self.tell(name, f"left out: {self.left:.0f} s are left")
            return
        try:
            work(name)
        except Exception as error:  # noqa: BLE001 - an error must not end the other sections
            first = (str(error).splitlines() or [""])[0]
            self.tell(name, f"FAILED: {type(error).__name__}: {first[:300]}")
            traceback.print_exc(limit=8)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def machine(self, name: str) -> None:
        facts = timing.machine(str(self.device))
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            cudnn = torch.backends.cudnn.version()
            facts |= {"cuda": torch.version.cuda, "cudnn": cudnn, "free": free, "total": total}
        self.tell(name, ", ".join(f"{key} {value}" for key, value in facts.items()), **facts)

    def bits(self, name: str, settings: list[str], reserve: float) -> None:
        """Weights, statistics, optimizer and terms of plain and of replayed steps."""
        recorder = self.recorder()
        for label in settings:
            if self.left < reserve:
                self.tell(name, f"stopped before {label}: {self.left:.0f} s are left")
                return
            self.section(name, lambda own: self._bits(own, label, recorder), 0.0)  # noqa: B023 - called at once

    def _bits(self, name: str, label: str, recorder: Recorder) -> None:
        steps, place = 11 if label in EPOCHS_DIFFER else 7, str(self.device)
        plain = Training(SETTINGS[label], recorded=False, device=place).steps(0, steps)
        mine = Training(SETTINGS[label], recorded=True, device=place, recorder=recorder)
        mine.steps(0, steps)
        expected, found = plain.state(), mine.state()
        differ = [key for key in expected if not torch.equal(expected[key], found[key])]
        counts = dict(mine.recorded.counts)
        same = not differ and mine.terms == plain.terms
        note = "; ".join(mine.said) or f"{counts.get('replayed', 0)} of {steps} steps replayed"
        self.tell(
            name, f"{label}: {'same bits' if same else f'{len(differ)} tensors DIFFER'}, {note}",
            setting=label, same=same, differ=differ[:5], counts=counts, said=mine.said,
        )  # fmt: skip

    def steps(self, name: str, model: str, members: list[int], batch: int) -> None:
        """Seconds of joint, eager and replayed steps, and of the recordings alone."""
        with mock.patch.object(bench, "recorder_for", return_value=self.recorder()):
            result = bench.run(
                models=[model], members=members, batch=batch, steps=1 if self.small else 10,
                rounds=1 if self.small else 3, device=str(self.device),
                log=show,
            )  # fmt: skip
        for case in result["cases"]:
            self.tell(name, f"{model}, M = {case['members']}, batch {batch}", **case)

    def memory(self, name: str) -> None:
        """Of a step and of its recording, by number of members."""
        with mock.patch.object(memory, "recorder_for", return_value=self.recorder()):
            result = memory.run(
                model="linear" if self.small else "resnet18",
                members=(2, 3) if self.small else (2, 4, 8), batch=4 if self.small else 64,
                device=str(self.device), log=show,
            )  # fmt: skip
        allocators = [case.get("allocator", case["engine"]) for case in result["cases"]]
        spread = max(allocators) / min(allocators) - 1
        self.tell(name, f"from M = 2 on it varies by {100 * spread:.1f} %", **result, flat=spread)

    def attacks(self, name: str) -> None:
        """Points, counted passes and seconds, with recorded passes and without."""
        members, count, side = (3, 8, 8) if self.small else (8, 100, 32)
        kind = IndependentConfig(
            model="resnet8", num_members=members, width=4 if self.small else None
        )
        built = kind.build(num_classes=10, shape=(3, side, side), seed=0).to(self.device)
        ensemble = channels_last(built).eval()
        x = torch.rand(count, 3, side, side, generator=stream(1)).to(self.device)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            y = ensemble.member_logits(x).mean(0).argmax(1)
        said: list[str] = []
        with recorded(ensemble, self.recorder(), said.append) as passes:
            assert isinstance(passes, RecordedPasses)
            for label, (view, settings) in ATTACKED.items():
                rows = {}
                # the second of each kind is timed: the first one prepares and records
                for how, asked in [("plain", ensemble), ("replayed", passes)] * 2:
                    meter = Meter()
                    victim: Any = Metered(asked, meter)
                    if view == "averaged":
                        victim = victim.averaged()
                    elif view == "sampled":
                        victim = victim.sampled(rng=stream(1, "draws"))
                    out: list[Any] = []
                    attack = ATTACKS[label](**settings)

                    def work(victim: Any = victim, attack: Any = attack, out: Any = out) -> None:
                        out.append(attack(victim, x, y, Threat(eps=0.01), rng=stream(3)))

                    taken = timing.seconds(work, self.device)
                    rows[how] = (out[0], (meter.forwards, meter.backwards), taken)
                (one, cost, slow), (other, own, quick) = rows["plain"], rows["replayed"]
                same, counted = torch.equal(one, other), cost == own
                self.tell(
                    name,
                    f"{label} on {view}, M = {members}, {count} images: "
                    f"{'same points' if same else 'points DIFFER'}, passes {cost}"
                    f"{'' if counted else f' and {own}: they DIFFER'}, {slow:.3f} s, replayed "
                    f"{quick:.3f} s, {slow / quick:.1f} times as fast; {dict(passes.counts)}",
                    attack=label, view=view, same=same, counted=counted, plain=slow,
                    replayed=quick, counts=dict(passes.counts), said=list(said),
                )  # fmt: skip

    def recipes(self, name: str) -> None:
        """Train and evaluate every method, as long as there is time."""
        with tempfile.TemporaryDirectory() as folder:
            for method in METHODS:
                if self.left < 45:
                    self.tell(name, f"stopped before {method}: {self.left:.0f} s are left")
                    return
                self.section(name, lambda own: self._recipe(own, method, Path(folder)), 0.0)  # noqa: B023 - called at once

    def _recipe(self, name: str, method: str, folder: Path) -> None:
        run, begun = self._run(method), time.monotonic()
        ensemble = train(run, folder / method, quiet=True, device=str(self.device))
        trained = time.monotonic()
        report, _ = evaluate_run(
            folder / method, suite="quick" if self.small else "aware",
            images=4 if self.small else 100, device=str(self.device),
        )  # fmt: skip
        done = time.monotonic()
        clean, headline = report.data["clean"]["expected"], report.data["headline"]
        accuracy = "none" if headline is None else f"{100 * headline['aware']:.1f} %"
        self.tell(
            name,
            f"{run.recipe}, M = {ensemble.num_members}: trained in {trained - begun:.0f} s, "
            f"evaluated in {done - trained:.0f} s; clean {100 * clean:.1f} %, aware {accuracy}",
            recipe=run.recipe, train=trained - begun, evaluate=done - trained, clean=clean,
            headline=headline,
        )  # fmt: skip

    def _run(self, method: str) -> Run:
        if self.data is not None:
            run = override(recipe(f"cifar10-mini-{method}"), [f"data.spec={self.data}"])
        else:
            run = recipe(f"digits-{method}")
        few = ["epochs=3", "data.images=16", "batch_size=8", "ensemble.num_members=2"]
        return override(run, few) if self.small else run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--seconds", type=float, default=540.0, help="in all")
    parser.add_argument("--data", help="cifar10:PATH; the digits without")
    parser.add_argument("--out", type=Path, help="file of figures; $OUT/device.json if OUT is set")
    options = parser.parse_args()
    folder = os.environ.get("OUT")
    out = options.out or (Path(folder) / "device.json" if folder else None)
    if out is not None and out.is_dir():
        parser.error(f"--out must name a file, and {out} is a folder")
    with computing():
        check = Check(options.device, options.seconds, out, options.data)
        small = check.small
        check.section("machine", check.machine, 0)
        first = ["red bf16", "ps-red"]
        check.section("first steps", lambda name: check.bits(name, first, 30), 0)
        if small:
            check.section("steps", lambda name: check.steps(name, "linear", [2], 4), 0)
        else:
            check.section("steps", lambda name: check.steps(name, "resnet8", [3, 8], 128), 60)
            check.section("steps", lambda name: check.steps(name, "resnet18", [8], 128), 90)
        check.section("attacks", check.attacks, 60)
        rest = [label for label in SETTINGS if label not in first]
        check.section("bits", lambda name: check.bits(name, rest, 60), 60)
        check.section("memory", check.memory, 40)
        check.section("recipes", check.recipes, 60)
        check.tell("done", f"{time.monotonic() - check.begun:.0f} s")


if __name__ == "__main__":
    main()
