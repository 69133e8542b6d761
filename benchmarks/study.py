"""The study behind `docs/findings.md`: a queue of trainings and evaluations that can be stopped.

python benchmarks/study.py --data cifar10:PATH            do what is left, wave by wave
python benchmarks/study.py --list                         state and planned minutes of every job
python benchmarks/study.py --data ... --only red --only 'at-*/quick'

Runs live in `runs/study/NAME-SEED`. Started again, the queue goes on where it stopped: trainings
from their last checkpoint, evaluations from their last finished cell. Two queues may work side by
side on two cores; each leaves alone what the other one holds. Every job leaves one line in
`runs/study/log.jsonl` and what it said in `runs/study/NAME-SEED.log`.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Final

HERE: Final = Path(__file__).resolve().parent
OUT: Final = Path("runs") / "study"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation of a run, written to `DIR/evaluation/NAME.json`.

    Attributes:
        suite: a suite's name, or a file beside this script.
        images: the first so many of the published permutation of the test split; None takes all.
        wave: jobs of lower waves come first.
        minutes: planned, on one core, for three members.
    """

    suite: str
    images: int | None
    wave: int
    minutes: float


EVALUATIONS: Final = {
    "quick": Evaluation(suite="quick", images=None, wave=1, minutes=0.1),
    "aware": Evaluation(suite="aware", images=None, wave=2, minutes=2.0),
    "quick-500": Evaluation(suite="quick", images=500, wave=1, minutes=1.0),
    "aware-small-500": Evaluation(suite="aware-small.json", images=500, wave=1, minutes=9.0),
    "unaware-500": Evaluation(suite="unaware.json", images=500, wave=1, minutes=2.0),
    "quick-1000": Evaluation(suite="quick", images=1000, wave=3, minutes=2.0),
    "aware-small-1000": Evaluation(suite="aware-small.json", images=1000, wave=3, minutes=18.0),
    "unaware-1000": Evaluation(suite="unaware.json", images=1000, wave=3, minutes=4.0),
    "lean-500": Evaluation(suite="aware-lean.json", images=500, wave=2, minutes=3.0),
    "aware-500": Evaluation(suite="aware", images=500, wave=2, minutes=25.0),
    "paper-200": Evaluation(suite="paper", images=200, wave=4, minutes=30.0),
}

FIRST: Final = ("quick-500", "aware-small-500", "unaware-500")
LEAN: Final = ("quick-500", "lean-500")
TABLE: Final = ("quick-1000", "aware-small-1000", "unaware-1000")
METHOD: Final = (*FIRST, "aware-500", *TABLE)
WHOLE: Final = (*METHOD, "paper-200")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a table: a recipe with changed settings, its seeds and its evaluations.

    Attributes:
        changes: `--set` assignments.
        shipped: the recipe names data that everybody has, so `--data` is not for it.
        wave: of its training.
        minutes: of one training, planned, on one core.
    """

    name: str
    recipe: str
    changes: tuple[str, ...] = ()
    shipped: bool = False
    seeds: tuple[int, ...] = (0,)
    evaluations: tuple[str, ...] = (*FIRST, *TABLE)
    wave: int = 1
    minutes: float = 8.0


def _mini(name: str, minutes: float, evaluations: tuple[str, ...] = METHOD) -> Row:
    return Row(name=name, recipe=f"cifar10-mini-{name}", minutes=minutes, evaluations=evaluations)


def _digits(name: str) -> Row:
    return Row(
        name=f"digits-{name}", recipe=f"digits-{name}", shipped=True,
        evaluations=("quick", "aware"), minutes=1.5,
    )  # fmt: skip


def _ablation(
    name: str,
    *changes: str,
    recipe: str = "cifar10-mini-red",
    seeds: tuple[int, ...] = (0,),
    minutes: float = 8.0,
) -> Row:
    return Row(
        name=f"red-{name}", recipe=recipe, changes=changes, seeds=seeds, wave=2, minutes=minutes,
        evaluations=LEAN,
    )  # fmt: skip


def _again(row: Row, seed: int) -> Row:
    """The same with another seed."""
    return Row(
        name=row.name, recipe=row.recipe, changes=row.changes, seeds=(seed,), wave=2,
        minutes=row.minutes,
    )  # fmt: skip


def _long(name: str, *changes: str, recipe: str | None = None) -> Row:
    """All training images and nearly four times the arithmetic of `at`, the same for each.

    The cost is equal: epochs times members times the forward passes of an image, which are
    3 (vanilla), 13 (at) and 5 (swift).
    """
    return Row(
        name=f"long-{name}", recipe=recipe or f"cifar10-mini-{name}",
        changes=("data.images=null", *changes), wave=5, minutes=30.0,
        evaluations=(*FIRST, *TABLE, "aware-500", "paper-200"),
    )  # fmt: skip


VANILLA: Final = _mini("vanilla", 1.5, evaluations=WHOLE)
AT: Final = _mini("at", 5.5, evaluations=WHOLE)
RED: Final = _mini("red", 7.0, evaluations=WHOLE)
# the best other method: chosen on the validation split once all are trained
OTHER: Final = _mini("mrboost", 6.0, evaluations=WHOLE)

# the better recipe: adversarial training of equal cost with a cheaper adversary and more images
SWIFT: Final = Row(name="swift", recipe="swift-cifar10-mini", minutes=7.0, evaluations=WHOLE)
# what it costs to have members at all: one network that sees the images of all three
ALONE: Final = Row(
    name="swift-one", recipe="swift-cifar10-mini", wave=2, minutes=7.0,
    changes=("ensemble.num_members=1", "epochs=12"),
)  # fmt: skip

DIGITS: Final = (
    "vanilla", "at", "gal", "adp", "dverge", "trs", "red", "ps-red", "mrboost", "barre", "red-at",
)  # fmt: skip

# with the four above, every method
OTHERS: Final = (
    _mini("trs", 15.0), _mini("dverge", 12.0), _mini("ps-red", 9.0), _mini("barre", 8.0),
    _mini("gal", 6.0), _mini("adp", 3.0), _mini("red-at", 14.0),
)  # fmt: skip

ROWS: Final = (
    VANILLA, AT, RED, OTHER, *OTHERS,
    _ablation("no-similarity", "defence.similarity=0", seeds=(0, 1)),
    _ablation("no-lipschitz", "defence.lipschitz=0"),
    _ablation("neither", "defence.similarity=0", "defence.lipschitz=0"),
    _ablation("released", recipe="cifar10-mini-red-released"),
    _ablation("printed", recipe="cifar10-mini-red-printed"),
    _ablation("m5", "ensemble.num_members=5", minutes=13.0),
    _ablation("m8", "ensemble.num_members=8", minutes=20.0),
    SWIFT, ALONE, *(_again(row, 1) for row in (VANILLA, AT, RED, OTHER, *OTHERS, SWIFT, ALONE)),
    _long("vanilla", "epochs=22"), _long("at", "epochs=5"),
    _long("swift", "epochs=13", recipe="swift-cifar10-mini"),
    _long(
        "swift-one", "epochs=39", "ensemble.num_members=1", recipe="swift-cifar10-mini"
    ),
    *map(_digits, DIGITS),
)  # fmt: skip
"""The tables of `docs/findings.md`, what is still to come there, and every method on digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training or one evaluation.

    Attributes:
        run: its run directory.
        what: "train", or a name of the evaluations.
    """

    run: Path
    row: Row
    seed: int
    what: str
    wave: int
    minutes: float

    @property
    def name(self) -> str:
        return f"{self.run.name}/{self.what}"

    @property
    def done(self) -> Path:
        """The file that is there once the job is done."""
        trained = self.run / "final" / "manifest.json"
        return trained if self.what == "train" else self.run / "evaluation" / f"{self.what}.json"

    @property
    def state(self) -> str:
        """One of done, begun, waiting (for its training) and ready."""
        if self.done.is_file():
            return "done"
        if self.what == "train":
            return "begun" if (self.run / "run.json").is_file() else "ready"
        if not (self.run / "final" / "manifest.json").is_file():
            return "waiting"
        return "begun" if self.done.with_suffix("").is_dir() else "ready"

    def command(self, data: str | None, evaluations: "Evaluations") -> list[str]:
        """The words after `redefense`."""
        spec = [] if data is None or self.row.shipped else ["--data", data]
        if self.what == "train":
            changes = [word for change in self.row.changes for word in ("--set", change)]
            words = ["train", self.row.recipe, *spec, "--seed", str(self.seed), *changes]
            return [*words, "--out", str(self.run), "--resume"]
        evaluation = evaluations[self.what]
        suite = evaluation.suite
        if suite.endswith(".json"):
            suite = os.path.relpath(HERE / suite)
        words = ["evaluate", str(self.run), *spec, "--suite", suite]
        if evaluation.images is not None:
            words += ["--images", str(evaluation.images)]
        return [*words, "--out", str(self.done)]


Evaluations = dict[str, Evaluation]


def plan(rows: Sequence[Row], evaluations: Evaluations, out: Path) -> list[Job]:
    """Every job in the order in which they are done.

    By wave; in a wave all trainings first, then one evaluation after the other, the quick first.
    """
    order = ["train", *evaluations]
    jobs = []
    for row in rows:
        for seed in row.seeds:
            run = out / f"{row.name}-{seed}"
            jobs.append(
                Job(run=run, row=row, seed=seed, what="train", wave=row.wave, minutes=row.minutes)
            )
            jobs += [
                Job(
                    run=run, row=row, seed=seed, what=name,
                    wave=max(row.wave, evaluations[name].wave), minutes=evaluations[name].minutes,
                )
                for name in row.evaluations
            ]  # fmt: skip
    return sorted(jobs, key=lambda job: (job.wave, order.index(job.what)))


def chosen(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs that any of the words names: a row, a run, a job, or a pattern of jobs.

    Raises:
        SystemExit: for a word that names none.
    """
    named = {
        word: [j for j in jobs if word in (j.row.name, j.run.name) or fnmatch(j.name, word)]
        for word in only
    }
    for word, found in named.items():
        if not found:
            raise SystemExit(f"study: {word!r} names no job; see --list")
    names = {job.name for found in named.values() for job in found}
    return [job for job in jobs if not only or job.name in names]


def measured(out: Path) -> dict[str, float]:
    """Minutes that every job took so far, over all its beginnings."""
    log = out / "log.jsonl"
    minutes: dict[str, float] = {}
    for line in log.read_text().splitlines() if log.is_file() else []:
        entry = json.loads(line)
        minutes[entry["job"]] = minutes.get(entry["job"], 0.0) + entry["seconds"] / 60
    return minutes


def listing(jobs: Sequence[Job], took: dict[str, float]) -> str:
    """State, planned and measured minutes of every job, and what is left in all."""
    width = max(len(job.name) for job in jobs)
    lines = [f"{'wave':>4}  {'job':<{width}}  {'state':<8}{'planned':>8}{'took':>8} min"]
    lines += [
        f"{job.wave:>4}  {job.name:<{width}}  {job.state:<8}{job.minutes:>8.1f}"
        + (f"{took[job.name]:>8.1f}" if job.name in took else f"{'':>8}")
        for job in jobs
    ]
    left = [job for job in jobs if job.state != "done"]
    lines.append(
        f"{len(jobs) - len(left)} of {len(jobs)} jobs done; "
        f"{sum(job.minutes for job in left) / 60:.1f} core hours planned for the others"
    )
    return "\n".join(lines)


@contextmanager
def held(path: Path) -> Iterator[int | None]:
    """The descriptor of a lock on the run, or None while another queue or its job holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def perform(words: Sequence[str], output: IO[str], lock: int, threads: int) -> int:
    """Run one `redefense` command to its end; a signal that ends this queue ends it first.

    The job inherits the lock, so that even the job of a killed queue is not started twice.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    child = subprocess.Popen(
        [sys.executable, "-m", "redefense", *words],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=(lock,),
        start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
    )

    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise SystemExit(128 + received[0])
    return code


def work(
    jobs: Sequence[Job], evaluations: Evaluations, *, data: str | None, out: Path, threads: int
) -> int:
    """Do what is left of the jobs, in order.

    Returns:
        How many failed; a failed one is tried again by the next queue, not by this one.
    """
    failures = 0
    for job in jobs:
        with held(out / f".{job.run.name}.lock") as lock:
            if lock is None or job.state in ("done", "waiting"):
                continue
            words = job.command(data, evaluations)
            started, code = time.monotonic(), -1
            with (out / f"{job.run.name}.log").open("a") as output:
                output.write(f"$ redefense {shlex.join(words)}\n")
                output.flush()
                try:
                    code = perform(words, output, lock, threads)
                except SystemExit as stopped:
                    code = int(stopped.code or 0)
                    raise
                finally:
                    _log(out, job, code, time.monotonic() - started, threads)
            failures += code != 0
    return failures


def _log(out: Path, job: Job, code: int, seconds: float, threads: int) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"date": now, "job": job.name, "exit": code, "seconds": round(seconds, 1)}
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps({**entry, "threads": threads}) + "\n")
    word = "done" if code == 0 else f"exit {code}, see {out / job.run.name}.log"
    say(f"{now} {job.name}: {word}, {seconds / 60:.1f} min")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="where CIFAR-10 lies, e.g. cifar10:PATH")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs")
    parser.add_argument("--only", action="append", default=[], help="a row, run, job or pattern")
    parser.add_argument("--wave", type=int, help="the last wave to do")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every job")
    parser.add_argument("--list", action="store_true", help="show the jobs and do nothing")
    given = parser.parse_args(arguments)
    jobs = chosen(plan(ROWS, EVALUATIONS, given.out), given.only)
    jobs = [job for job in jobs if given.wave is None or job.wave <= given.wave]
    if given.list:
        say(listing(jobs, measured(given.out)))
        return 0
    if given.data is None and not all(job.row.shipped for job in jobs):
        parser.error("--data is needed to do the jobs, e.g. --data cifar10:PATH")
    failures = work(jobs, EVALUATIONS, data=given.data, out=given.out, threads=given.threads)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
