"""Claims: the figures of a run as one small JSON file with all that is needed to make them again.

python benchmarks/claims.py make RUN... --out claims        from evaluated run directories
python benchmarks/claims.py table [CLAIM...]                Markdown, one row a claim
python benchmarks/claims.py report [CLAIM...] --out PAGE    the report page over them
python benchmarks/claims.py recompute CLAIM --data SPEC     train, evaluate, compare; exit 1

`claim_files.py` says what such a file holds, `claim_pages.py` how it is shown. Made again of the
same weights, a claim keeps what it held about other images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from claim_files import Claim, Figure, claim, read, write
from claim_pages import attacks_table, draw_table, on_images, report, table

from redefense.config import parse_run
from redefense.errors import ConfigError, RedefenseError
from redefense.report.tables import with_interval

CLAIMS: Final = Path("claims")


def recompute(it: Claim, data: str, folder: Path) -> list[str]:
    """Train and evaluate anew in `folder`; every headline that does not agree, in words.

    Other machines give other bits, and other bits other weights. Figures agree if each lies in the
    95 % interval of the other.
    """
    run, again = parse_run(it.run, it.name), folder / it.name
    (folder / "run.json").write_text(json.dumps(run.model_dump(mode="json")))
    _redefense("train", str(folder / "run.json"), "--data", data, "--out", str(again), "--resume")
    for plan in {p.file: p for e in it.evaluations for p in e.suites}.values():
        suite = plan.suite
        if isinstance(suite, Mapping):
            (folder / "suite.json").write_text(json.dumps(suite))
            suite = str(folder / "suite.json")
        images = [] if plan.images is None else ["--images", str(plan.images)]
        cascade = [] if plan.cascade is not False else ["--no-cascade"]
        _redefense(
            "evaluate", str(again), "--data", data, "--suite", suite, *images, *cascade,
            "--eps", repr(plan.eps), "--norm", plan.norm, "--seed", str(plan.seed),
            "--seeds", str(plan.seeds), "--checks", plan.checks,
            "--out", str(again / "evaluation" / f"{plan.file}.json"),
        )  # fmt: skip
    return differences(it, claim(again))


def differences(one: Claim, other: Claim) -> list[str]:
    """Headlines of two claims about the same run that lie outside each other's intervals."""
    found = []
    pairs = (sorted(it.evaluations, key=lambda e: e.subject) for it in (one, other))
    for mine, theirs in zip(*pairs, strict=True):
        for key in ("clean", "unaware", "aware", "best_single_member", "averaged"):
            a, b = getattr(mine, key), getattr(theirs, key)
            if (a is None) != (b is None) or (a is not None and not _agree(a, b)):
                shown = [with_interval(None if f is None else f.estimate) for f in (a, b)]
                images = mine.data["num_images"]
                found.append(f"{one.name}, {images} images, {key}: {shown[0]}, now {shown[1]}")
    return found


def _agree(a: Figure, b: Figure) -> bool:
    def inside(value: float, of: Figure) -> bool:
        low, high = (of.value if v is None else v for v in (of.low, of.high))
        return low <= value <= high

    return inside(a.value, b) and inside(b.value, a)


def _redefense(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "redefense", *words, "--quiet"], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the claims of evaluated runs")
    making.add_argument("runs", nargs="+", type=Path)
    making.add_argument("--out", type=Path, default=CLAIMS)
    showing = commands.add_parser("table", help="print a Markdown table")
    showing.add_argument("claims", nargs="*", type=Path)
    showing.add_argument("--against", help="name of a claim: add paired differences from it")
    paging = commands.add_parser("report", help="write the report page over claims")
    paging.add_argument("claims", nargs="*", type=Path)
    paging.add_argument("--out", type=Path, required=True)
    instead = showing.add_mutually_exclusive_group()
    instead.add_argument("--attacks", action="store_true", help="one row an attack instead")
    instead.add_argument("--draw", action="store_true", help="what drawing is worth instead")
    for parts in (showing, paging):
        parts.add_argument("--images", type=int, help="only what was measured on so many images")
    checking = commands.add_parser("recompute", help="train, evaluate and compare; exit 1")
    checking.add_argument("claim", type=Path)
    checking.add_argument("--data", required=True, help="e.g. digits or cifar10:PATH")
    checking.add_argument("--out", type=Path, help="keep the run here, and go on with it")
    given = parser.parse_args(arguments)
    try:
        return _perform(given)
    except RedefenseError as error:
        sys.stderr.write(f"claims: {error}\n")
        return error.code


def _perform(given: argparse.Namespace) -> int:
    if given.command == "make":
        for run in given.runs:
            made = claim(run)
            before = given.out / f"{made.name}.json"
            if before.is_file():
                made = made.keeping(read(before))
            for plan in (p for e in made.evaluations for p in e.suites):
                commit = str(plan.provenance.get("commit", ""))
                if not commit or commit.endswith("-dirty"):
                    warning = f"claims: {made.name}: {plan.file} was made by code of no commit"
                    sys.stderr.write(f"{warning} ({commit or 'unknown'})\n")
            sys.stdout.write(f"{write(made, given.out)}\n")
        return 0
    if given.command == "table":
        every = list(map(read, _stored(given)))
        shown = [part for it in every if (part := on_images(it, given.images)) is not None]
        if given.against not in (None, *(it.name for it in shown)):
            raise ConfigError(f"--against {given.against} is none of the claims shown")
        if not shown:
            raise ConfigError(f"no claim was measured on --images {given.images}")
        if given.draw and given.against is not None:
            raise ConfigError(
                "--draw compares each claim with its own members: it takes no --against"
            )
        if given.draw:
            text = draw_table(shown)
        elif given.attacks:
            text = attacks_table(every, given.images, given.against)
        else:
            text = table(shown, given.against)
        sys.stdout.write(f"{text}\n")
        return 0
    if given.command == "report":
        for path in report(_stored(given), given.out, given.images):
            sys.stdout.write(f"{path}\n")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = recompute(read(given.claim), given.data, folder)
    for line in found:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{given.claim}: {'does not hold' if found else 'holds'}\n")
    return int(bool(found))


def _stored(given: argparse.Namespace) -> list[Path]:
    return given.claims or sorted(CLAIMS.glob("*.json"))


if __name__ == "__main__":
    raise SystemExit(main())
