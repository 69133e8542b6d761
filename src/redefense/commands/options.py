"""Shared by the commands: options, names of runs, and messages."""

import functools
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from redefense.runtime.folders import RUN

if TYPE_CHECKING:  # commands import these when they run, so that --help is fast
    from redefense.config import Run

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, e.g. --set epochs=3."),
]
DataSpec = Annotated[
    str | None, typer.Option("--data", metavar="SPEC", help="e.g. digits or cifar10:PATH.")
]
Device = Annotated[str, typer.Option(help="Device to compute on, e.g. cpu or cuda.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Results = Annotated[bool, typer.Option("--quiet", help="Print only results, without progress.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Replay = Annotated[
    str,
    typer.Option(
        metavar="auto|off",
        help="Record the work on a CUDA device and replay it, with bit-identical results.",
    ),
]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")]

Plugins = Annotated[
    list[Path] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py",
        help="Run a Python file that registers names; may be repeated.",
    ),
]


def with_plugins(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option --plugin to a command; its files are run before the command."""

    @functools.wraps(command)
    def run(*args: Any, plugin: list[Path] | None = None, **options: Any) -> None:
        from redefense.plugins import load_file

        for path in plugin or ():
            load_file(path)
        command(*args, **options)

    # `wraps` shows the signature of the command, which lacks the option
    own = inspect.signature(command)
    option = inspect.Parameter(
        "plugin", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Plugins
    )
    # typer reads both
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), option])  # type: ignore[attr-defined]  # functions take attributes
    run.__annotations__ = {**command.__annotations__, "plugin": Plugins}
    return run


def resolve_run(what: str, changes: list[str] | None, data: str | None, seed: int | None) -> "Run":
    """The run of a recipe, a record or a run directory, with changed settings.

    Raises:
        ConfigError: for an unknown recipe or setting, or a damaged record.
        DataError: for a folder that is no run.
    """
    from redefense.config import override, read_run
    from redefense.errors import DataError
    from redefense.recipes import RECIPES, recipe

    path = Path(what)
    if (path / RUN).is_file():
        run = read_run(path / RUN)
    elif path.suffix == ".json":
        run = read_run(path)
    # a path was meant, so the known recipes would be no help
    elif what not in RECIPES and (path.is_dir() or len(path.parts) > 1):
        raise DataError(f"there is no run at {path}: it has no run.json")
    else:
        run = recipe(what)
    # the last assignment wins: --data and --seed over --set
    assignments = list(changes or [])
    if data is not None:
        assignments.append(f"data.spec={data}")
    if seed is not None:
        assignments.append(f"seed={seed}")
    return override(run, assignments)


def echo(line: str, quiet: bool) -> None:
    """Print a line for people on stderr."""
    if not quiet:
        typer.echo(line, err=True)


def show(document: object, text: str = "", *, as_json: bool, quiet: bool = False) -> None:
    """Print a result on stdout: with --json the document, else the text unless --quiet."""
    if as_json:
        typer.echo(json.dumps(document, indent=1))
    elif text and not quiet:
        typer.echo(text)


def check_lines(checks: Iterable[tuple[str, bool | None, str]], width: int) -> str:
    """Checks (name, passed, detail) as text, one per line."""
    return "\n".join(
        f"{'ok  ' if passed else 'FAIL'}  {name:<{width}}  {detail}"
        for name, passed, detail in checks
    )
