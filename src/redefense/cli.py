"""The command line. Torch is imported by the commands that need it, never for `--help`."""

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import redefense
from redefense.errors import ConfigError, DataError, RedefenseError

if TYPE_CHECKING:  # what a command needs it imports itself, so that --help answers at once
    from redefense.config import Run

app = typer.Typer(
    help="Train, attack, measure and deploy robust classifier ensembles, above all random ones.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data before using it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(help="Measure speed, as ratios within one run.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, e.g. --set epochs=3."),
]
DataSpec = Annotated[
    str | None, typer.Option("--data", metavar="SPEC", help="e.g. digits or cifar10:PATH.")
]
Device = Annotated[str, typer.Option(help="Device to compute on, e.g. cpu or cuda.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]


def _version(value: bool) -> bool:
    if value:
        typer.echo(redefense.__version__)
        raise typer.Exit
    return value


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    what: Annotated[str, typer.Argument(metavar="RECIPE|RUN.json", help="What to train.")],
    changes: Set = None,
    data: DataSpec = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; runs/RECIPE unless given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every draw of the training.")] = None,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch missing data.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a recipe, or a run from its JSON record."""
    run = _run(what, changes, data, seed)
    target = out if out is not None else Path("runs") / run.recipe
    with _torch():
        from redefense.train.run import train as train_run

        train_run(run, target, resume=resume, device=device, quiet=quiet, download=download)
    _say(f"trained {target}; next: redefense evaluate {target}", quiet)


@app.command()
def evaluate(
    path: RunDir,
    suite: Annotated[str, typer.Option(help="A suite's name, or a .json file.")] = "quick",
    data: DataSpec = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="The first N of a fixed permutation of the test split."),
    ] = None,
    eps: Annotated[float | None, typer.Option(help="Radius of the threat; the run's own.")] = None,
    norm: Annotated[str | None, typer.Option(help="inf or 2.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw of the evaluation.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How often each attack is run.")] = 1,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Where to write the JSON.")] = None,
    checks: Annotated[str, typer.Option(help="quick, or full.")] = "quick",
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 on a red check.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack a trained run, and write DIR/evaluation/SUITE.json."""
    # of the processes that torchrun starts, one speaks
    first = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not first
    if checks not in ("quick", "full"):
        raise ConfigError(f"--checks must be quick or full, got {checks}")
    with _torch():
        from redefense.evaluation.api import evaluate_run

        report, target = evaluate_run(
            path,
            suite=suite,
            data=data,
            images=images,
            eps=eps,
            norm=norm,
            seed=seed,
            seeds=seeds,
            device=device,
            out=out,
            checks=checks,
            say=lambda line: _say(line, quiet),
        )
    red = [check for check in report.data["checks"] if check["passed"] is False]
    for check in red:
        _say(f"check {check['id']} failed: {check['detail']}", quiet)
    if as_json and first:
        typer.echo(report.to_json(), nl=False)
    elif not as_json:
        _say(f"wrote {target}; next: redefense report {path}", quiet)
    if strict and red:
        raise typer.Exit(1)


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Evaluated runs.")],
    out: Annotated[Path, typer.Option(help="The page; .md and .csv are put beside it.")] = Path(
        "report.html"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one offline page (and Markdown and CSV) over one or many evaluated runs."""
    from rich.console import Console

    from redefense.evaluation.report import write_report
    from redefense.evaluation.tables import format_table, summary_table

    written = write_report(paths, out)
    rows = summary_table(paths)
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in written]}))
    elif not quiet:
        # a pipe has no width of its own, and a wrapped table cannot be read
        width = None if sys.stdout.isatty() else 160
        Console(width=width).print(format_table(rows))
        typer.echo(f"report: {written[0]}")


@app.command()
def audit(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="An evaluation, a run, or a CSV of claims.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List which claims cannot be believed, and why; exit 1 if one does not hold."""
    from redefense.evaluation.audit import audit as findings_of
    from redefense.evaluation.audit import exit_code

    findings = findings_of(path)
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        shown = {"holds": not errors, "findings": [dataclasses.asdict(f) for f in findings]}
        typer.echo(json.dumps(shown, indent=1))
    else:
        for finding in findings:
            rows = f" [{', '.join(finding.rows)}]" if finding.rows else ""
            typer.echo(f"{finding.severity} {finding.id}: {finding.subject}{rows}: {finding.why}")
        _say(f"{path}: {errors} claims do not hold, {len(findings) - errors} notes", quiet)
    raise typer.Exit(exit_code(findings))


@app.command()
def landscape(
    paths: Annotated[
        list[Path], typer.Argument(metavar="DIR [DIR2]", help="Runs, drawn below each other.")
    ],
    out: Annotated[Path, typer.Option(help="An .svg or .png file.")] = Path("landscape.svg"),
    image: Annotated[
        int | None, typer.Option(help="Of the test split; the first that both members know.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Draw the loss surfaces of two members over the plane of their gradients."""
    with _torch():
        from redefense.evaluation.landscape import write_landscape

        written = write_landscape(paths, out, image=image)
    _say(f"wrote {written}", quiet)


@app.command()
def card(
    path: RunDir,
    out: Annotated[Path | None, typer.Option(help="Where it goes; DIR/README.md.")] = None,
    license_name: Annotated[str, typer.Option("--license", help="SPDX identifier.")] = "mit",
    quiet: Quiet = False,
) -> None:
    """Write the model card of an evaluated run."""
    from redefense.evaluation.card import write_card

    written = write_card(path, out, license_name=license_name)
    _say(f"wrote {written}", quiet)


@app.command("list")
def list_names(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="attacks|defences|models|data|recipes|suites")
    ],
    as_json: Json = False,
) -> None:
    """List what can be named, one line each."""
    entries = _entries(kind)
    if as_json:
        typer.echo(json.dumps([{"name": n, "summary": s} for n, s in entries], indent=1))
        return
    width = max(len(name) for name, _ in entries)
    for name, summary in entries:
        typer.echo(f"{name:<{width}}  {summary}".rstrip())


@app.command()
def show(
    what: Annotated[str, typer.Argument(metavar="RECIPE|DIR", help="What to show.")],
    changes: Set = None,
    data: DataSpec = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="Count parameters per member.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a recipe or a run with every setting resolved."""
    run = _run(what, changes, data, None)
    from redefense.train.run import resolve

    resolved, kind, _ = resolve(run)
    shown: dict[str, Any] = resolved.model_dump(mode="json")
    if parameters:
        from redefense.train.describe import count_parameters

        shown = count_parameters(what, resolved, kind)
    if as_json or not parameters:
        typer.echo(json.dumps(shown, indent=1))
    else:
        parts = shown.pop("parts")
        for key, value in shown.items():
            typer.echo(f"{key:<38} {value:>14,}")
        for name, sizes in parts.items():
            counts = ", ".join(f"{value:,} {key}" for key, value in sizes.items())
            typer.echo(f"  {name:<16} {counts}")


@app.command()
def materialise(
    path: RunDir,
    out: Annotated[Path, typer.Option(help="Directory of the new run.")],
    quiet: Quiet = False,
) -> None:
    """Write the members of a PS-RED run out as plain networks."""
    from redefense.train.materialise import materialise as write_out

    write_out(path, out)
    _say(f"wrote {out}; next: redefense evaluate {out}", quiet)


@bench_app.command("attacks")
def bench_attacks(
    images: Annotated[int, typer.Option(min=1, help="How many test images.")] = 256,
    model: Annotated[
        str, typer.Option(help="A network's name; one that fits by default.")
    ] = "auto",
    data: DataSpec = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    attack: Annotated[
        list[str] | None, typer.Option(help="Only this attack; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ours beside TorchAttacks: accuracy, passes, seconds; and what the draw hides."""
    with _torch():
        from redefense.bench.attacks import run, tables

        result = run(images=images, model=model, data=data, seed=seed, json=as_json, names=attack)
    typer.echo(json.dumps(result, indent=1) if as_json else tables(result))


@bench_app.command("inference")
def bench_inference(
    model: Annotated[str, typer.Option(help="Architecture of the members.")] = "resnet18",
    members: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Latency of the drawn member and of the average, over that of one plain member."""
    with _torch():
        from redefense.bench.inference import run, table

        result = run(model=model, num_members=members, rounds=rounds, device=device)
    typer.echo(json.dumps(result, indent=1) if as_json else table(result))


@data_app.command("check")
def data_check(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="e.g. cifar10:PATH.")],
    as_json: Json = False,
) -> None:
    """Count, hash and judge a data set; exit 3 if it cannot be used."""
    from redefense.data.check import check_dataset

    found = check_dataset(spec)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    else:
        for line in found.lines():
            typer.echo(line)
    if found.problems:
        count = len(found.problems)
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise DataError(f"{spec} cannot be used: {found.problems[0]}{more}")


def main() -> None:
    """Entry point: errors of the user's are one line, errors of ours keep their traceback."""
    try:
        code = app(standalone_mode=False)
    except RedefenseError as error:
        _fail(str(error), error.code)
    except typer.TyperException as error:
        _fail(" ".join(error.format_message().split()), 2)
    except typer.Abort:
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # the reader has gone; what it did not read is not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        # a place that cannot be read or written is the user's to mend
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    except Exception:  # noqa: BLE001 - the last line of defence: say whose fault it is
        traceback.print_exc()
        typer.echo(
            "redefense: this is a defect of ours; please report it with the text above", err=True
        )
        raise SystemExit(70) from None
    raise SystemExit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"redefense: {message}", err=True)
    raise SystemExit(code) from None


def _run(what: str, changes: list[str] | None, data: str | None, seed: int | None) -> "Run":
    from redefense.config import override, read_run
    from redefense.recipes import recipe

    path = Path(what)
    if (path / "run.json").is_file():
        run = read_run(path / "run.json")
    elif path.suffix == ".json":
        run = read_run(path)
    else:
        run = recipe(what)
    assignments = list(changes or [])
    if data is not None:
        assignments.append(f"data.spec={data}")
    if seed is not None:
        assignments.append(f"seed={seed}")
    return override(run, assignments)


def _entries(kind: str) -> list[tuple[str, str]]:
    if kind == "recipes":
        from redefense.recipes import RECIPES, recipe

        return [(name, _first_line(recipe(name))) for name in RECIPES]
    if kind == "suites":
        from redefense.evaluation.suite import SUITES

        return [(name, suite.summary) for name, suite in SUITES.items()]
    if kind == "attacks":
        from redefense.attacks import ATTACKS

        return [(name, attack.summary) for name, attack in ATTACKS.items()]
    if kind == "defences":
        from redefense.defences import DEFENCES

        return [(name, defence.summary) for name, defence in DEFENCES.items()]
    if kind == "models":
        from redefense.models import MODELS

        return [(name, model.summary) for name, model in MODELS.items()]
    if kind == "data":
        from redefense.data import DATASETS

        return [(name, source.summary) for name, source in DATASETS.items()]
    raise ConfigError(
        f"cannot list {kind!r}; there are attacks, defences, models, data, recipes, suites"
    )


def _first_line(run: "Run") -> str:
    ensemble = run.ensemble
    return (
        f"{run.defence['name']}, {ensemble['num_members']} x {ensemble['model']}, "
        f"{run.epochs} epochs on {run.data.spec.partition(':')[0]}, eps {run.threat.eps:g}"
    )


@contextmanager
def _torch() -> Iterator[None]:
    """What every computing command sets: denormal numbers cost tens of times the time on a CPU."""
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(line, err=True)
