"""Claims: the figures of a run as one small JSON file with all that is needed to make them again.

python benchmarks/claims.py make RUN... --out claims        from evaluated run directories
python benchmarks/claims.py table [CLAIM...]                Markdown, one row a claim
python benchmarks/claims.py report [CLAIM...] --out PAGE    the report page over them
python benchmarks/claims.py recompute CLAIM --data SPEC     train, evaluate, compare; exit 1

`claim_files.py` says what such a file holds. Made again of the same weights, a claim keeps what it
held about other images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from claim_files import (
    Attacked,
    Claim,
    Evaluated,
    Figure,
    Plan,
    claim,
    least,
    read,
    unpacked,
    write,
)

from redefense.config import parse_run
from redefense.errors import ConfigError, DataError, RedefenseError
from redefense.evaluation.joined import TRIES, Result
from redefense.evaluation.records import (
    Accuracy,
    Budget,
    Cell,
    Check,
    Clean,
    Data,
    Evaluation,
    Scored,
    Stored,
)
from redefense.evaluation.report import write_pages
from redefense.evaluation.statistics import (
    Estimate,
    accuracy_interval,
    paired_difference,
    success_within,
)
from redefense.evaluation.tables import markdown_table, percent, with_interval

CLAIMS: Final = Path("claims")


def result(it: Claim) -> Result:
    """The headline of a claim as the report shows it, without what a claim does not hold.

    Which members an attack fooled, and what one member keeps of each image, are not held; nor are
    the self-checks that passed.
    """
    found = it.headline
    cells = tuple(_scored(cell, found) for cell in found.cells)
    unaware = min(
        (c for c in cells if c.cell.bounded and not c.cell.aware and c.q is not None),
        key=lambda c: c.cell.accuracy.expected or 0.0,
        default=None,
    )
    q = found.per_image()
    knowing = [c.q for c in cells if c.faced and c.q is not None]
    if knowing and found.untouched is not None:
        knowing.append(unpacked(found.untouched))
    return Result(
        name=it.name, norm=found.norm, eps=found.eps,
        suites=tuple(_evaluation(it, plan) for plan in found.suites), cells=cells,
        clean=_estimate(found.clean), clean_averaged=None, clean_members=found.clean_members,
        unaware=_estimate(found.unaware), unaware_label=None if unaware is None else unaware.label,
        aware=_estimate(found.aware), single=_estimate(found.best_single_member),
        single_index=None, chosen_on=None, averaged=_estimate(found.averaged),
        alone=tuple(figure.estimate for figure in found.alone),
        knowing=accuracy_interval(np.min(knowing, axis=0)) if knowing else None,
        over_single=_estimate(found.over_single), over_averaged=_estimate(found.over_averaged),
        over_alone=_estimate(found.over_alone), fooled=None,
        tries_aware=None if q is None else success_within(q, TRIES),
        tries_unaware=(
            None if unaware is None or unaware.q is None else success_within(unaware.q, TRIES)
        ),
        checks=tuple(Check(id=name, passed=False) for name in found.red_checks),
        notes=("From a claim: which members an attack fooled at once is not kept there.",),
    )  # fmt: skip


def _scored(cell: Attacked, found: Evaluated) -> Scored:
    low, high = cell.expected.low, cell.expected.high
    kept = Cell(
        id=cell.id, attack=cell.attack, view=cell.view, aware=cell.aware, bounded=cell.bounded,
        repr=cell.repr, accuracy=Accuracy(expected=cell.expected.value),
        threat=Budget(norm=found.norm, eps=found.eps) if cell.bounded else None,
        interval=None if low is None or high is None else (low, high),
    )  # fmt: skip
    q = None if cell.each is None else unpacked(cell.each)
    suite = " + ".join(map(suite_name, found.suites))
    return Scored(cell=kept, suite=suite, correct=None, q=q, faced=cell.faced)


def _evaluation(it: Claim, plan: Plan) -> Stored:
    evaluation = Evaluation(
        schema=1, suite=suite_name(plan), run={"name": it.name, **it.run},
        provenance=plan.provenance, data=Data(**it.headline.data), clean=Clean(),
    )  # fmt: skip
    return Stored(
        name=it.name, source=None, file=None, plan=None, evaluation=evaluation, index=None,
        clean=Scored(cell=Cell(id="clean", attack="clean"), suite="", correct=None, q=None),
        cells=(), single=None, averaged=None, alone=None,
    )  # fmt: skip


def suite_name(plan: Plan) -> str:
    return plan.suite if isinstance(plan.suite, str) else str(plan.suite["name"])


def _estimate(found: Figure | None) -> Estimate | None:
    return None if found is None else found.estimate


def report(paths: Sequence[Path], out: Path, images: int | None = None) -> list[Path]:
    """The report page over claims, and Markdown, CSV and JSON beside it.

    Args:
        paths: files of claims, one row each.
        out: the page.
        images: only what was measured on so many; claims without are left out.

    Raises:
        ConfigError: if none is left, or as `write_pages`.
    """
    shown = {path: it for path in paths if (it := _on(read(path), images)) is not None}
    if not shown:
        raise ConfigError(f"no claim was measured on --images {images}")
    commands = [f"python benchmarks/claims.py recompute {path} --data SPEC" for path in shown]
    return write_pages(list(map(result, shown.values())), commands, out, paths)


def _on(it: Claim, images: int | None) -> Claim | None:
    return it if images is None else it.on(images)


COLUMNS: Final = (
    "method", "images", "clean", "unaware", "aware", "same attacks", "best member", "averaged",
    "cost",
)  # fmt: skip


def table(claims: Sequence[Claim], against: str | None = None) -> str:
    """A Markdown table, percent with 95 % intervals, cost in forward passes per member and image.

    The best member is the one that is best on these images, where all were attacked. Under "same
    attacks" is what the ensemble keeps under those that this member and the average met, too.

    Args:
        claims: one row each, in this order.
        against: name of the claim from which paired differences of the aware figure are taken.
    """
    base = None if against is None else next(c for c in claims if c.name == against).headline
    rows = []
    for it in claims:
        found = it.headline
        shown = result(it)
        figures = [
            shown.clean, shown.unaware, shown.aware, shown.knowing, shown.best_alone, shown.averaged
        ]  # fmt: skip
        row = [it.name, str(found.data["num_images"])]
        row += [with_interval(figure) for figure in figures]
        row += [f"{it.training.passes:.1f}"]
        if base is not None:
            row.append(_paired(found, base))
        rows.append(row)
    heading = [*COLUMNS, *([] if against is None else [f"aware, against {against}"])]
    # the intervals' brackets need no escape where the page is Markdown and not a link
    return markdown_table(heading, rows).replace("\\[", "[").replace("\\]", "]")


def attacks_table(claims: Sequence[Claim], images: int | None = None) -> str:
    """A Markdown table, percent: one row an attack, one column a claim, and how sure they are.

    Where an attack was run with several settings or on several views, the one that left least. Then
    the least that one bounded attack left, as it would be quoted, and what is left of the same
    images by the worst for each, once attackers who know the ensemble are counted as well.
    Unbounded attacks come last, under their own words, for they are no part of a headline.

    Args:
        claims: one column each, in this order.
        images: only what was measured on so many; claims without are left out.
    """
    shown = {it.name: part.headline for it in claims if (part := _on(it, images)) is not None}
    left: dict[tuple[bool, str], dict[str, Estimate]] = {}
    for name, e in shown.items():
        for cell in sorted(e.cells, key=lambda cell: -cell.expected.value):
            left.setdefault((not cell.bounded, cell.attack), {})[name] = cell.expected.estimate
    knowing = {it.name: _knowing(it, shown[it.name]) for it in claims if it.name in shown}

    def row(head: str, figures: Mapping[str, Estimate | None]) -> list[str]:
        return [head, *(percent(figures.get(name)) for name in shown)]

    bounded = {attack: figures for (other, attack), figures in left.items() if not other}
    unbounded = {attack: figures for (other, attack), figures in left.items() if other}
    least = {
        name: min((f[name] for f in bounded.values() if name in f), default=None) for name in shown
    }
    rows = [
        ["views", *(", ".join(sorted({c.view for c in e.cells})) for e in shown.values())],
        row("clean", {name: _estimate(e.clean) for name, e in shown.items()}),
        *(row(attack, figures) for attack, figures in sorted(bounded.items())),
        row("least of these", least),
        row("with attackers who know", knowing),
        *(row(f"{attack} (unbounded)", figures) for attack, figures in sorted(unbounded.items())),
    ]
    quoted = [e for figures in left.values() for e in figures.values()]
    spread = max(
        max(e.value - e.low, e.high - e.value)
        for e in (*quoted, *knowing.values())
        if e is not None and e.low is not None and e.high is not None
    )
    note = f"95 % intervals reach at most {100 * spread:.1f} points to a side"
    return f"{markdown_table(['attack', *shown], rows)}\n\n{note}"


def _knowing(it: Claim, found: Evaluated) -> Estimate | None:
    """What the worst attack for each of these images leaves, those of larger evaluations too.

    None if no attacker who knows the ensemble met these images. Numbers of images are the first so
    many of one permutation.
    """
    n = found.data["num_images"]
    others = [
        e
        for e in it.evaluations
        if (e.norm, e.eps, e.data["split"]) == (found.norm, found.eps, found.data["split"])
        and e.data["num_images"] >= n
    ]
    if not any(e.aware is not None for e in others):
        return None
    return accuracy_interval(np.min([least(e, e.attacks())[:n] for e in others], axis=0))


def _paired(found: Evaluated, base: Evaluated) -> str:
    """Points gained over the base on the same images, over the attacks that both met."""
    one, other = found.per_image(), base.per_image()
    if found is base or one is None or other is None or found.data != base.data:
        return ""
    mine, theirs, note = found.attacks(), base.attacks(), ""
    if mine.keys() != theirs.keys():
        common = mine.keys() & theirs.keys()
        try:
            one, other = (least(e, common) for e in (found, base))
        except DataError:
            return "other attacks"
        note = f", {len(common)} attacks of both"
    gain = paired_difference(one, other)
    return (
        f"{100 * gain.value:+.1f}"
        + ("" if gain.low is None else f" [{100 * gain.low:+.1f}, {100 * (gain.high or 0):+.1f}]")
        + note
    )


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
        _redefense(
            "evaluate", str(again), "--data", data, "--suite", suite, *images,
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
    showing.add_argument("--attacks", action="store_true", help="one row an attack instead")
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
        shown = [part for it in every if (part := _on(it, given.images)) is not None]
        if given.against not in (None, *(it.name for it in shown)):
            raise ConfigError(f"--against {given.against} is none of the claims shown")
        if given.attacks and given.against is not None:
            raise ConfigError("--attacks takes no --against")
        if not shown:
            raise ConfigError(f"no claim was measured on --images {given.images}")
        text = attacks_table(every, given.images) if given.attacks else table(shown, given.against)
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
