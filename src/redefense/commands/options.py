"""What the commands share: options, how a run is named, how a command speaks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # what a command needs it imports itself, so that --help answers at once
    from redefense.config import Run

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


def resolve_run(what: str, changes: list[str] | None, data: str | None, seed: int | None) -> "Run":
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


def say(line: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(line, err=True)
