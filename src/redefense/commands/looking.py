"""Information: list, show, data check."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from redefense.commands.options import (
    DataSpec,
    Json,
    Quiet,
    Set,
    check_lines,
    echo,
    resolve_run,
    show,
)
from redefense.errors import ConfigError, DataError


def list_names(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="attacks|defences|models|data|recipes|suites")
    ],
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print names only.")] = False,
) -> None:
    """List attacks, defences, models, data, recipes or suites."""
    entries = _entries(kind)
    width = max(len(name) for name, _ in entries)
    lines = [name if quiet else f"{name:<{width}}  {text}".rstrip() for name, text in entries]
    show([{"name": name, "summary": text} for name, text in entries], "\n".join(lines),
         as_json=as_json)  # fmt: skip


def show_run(
    what: Annotated[str, typer.Argument(metavar="RECIPE|DIR", help="What to show.")],
    changes: Set = None,
    data: DataSpec = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="Count parameters per member.")
    ] = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="Estimate the training: FLOPs, memory, hours.")
    ] = False,
    accelerator: Annotated[
        str, typer.Option(help="The accelerator to assume for --cost.")
    ] = "h100-sxm",
    devices: Annotated[
        int, typer.Option(min=1, help="The number of accelerators to assume for --cost.")
    ] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a recipe or a run with every setting resolved."""
    if cost and parameters:
        raise ConfigError("--parameters and --cost print different tables: use one of them")
    run = resolve_run(what, changes, data, None)
    from redefense.train.loading import resolve

    resolved, kind, _ = resolve(run)
    shown: dict[str, Any] = resolved.model_dump(mode="json")
    if cost:
        from redefense.train.cost import predict_run, table

        predicted = predict_run(what, resolved, accelerator, devices)
        show(predicted, table(predicted), as_json=as_json, quiet=quiet)
        return
    if parameters:
        from redefense.train.describe import count_parameters

        shown = count_parameters(what, resolved, kind)
    if as_json or not parameters:
        if as_json or not quiet:  # a run is JSON in either case
            show(shown, as_json=True)
        return
    parts = shown.pop("parts")
    lines = [f"{key:<38} {value:>14,}" for key, value in shown.items()]
    for name, sizes in parts.items():
        counts = ", ".join(f"{value:,} {key}" for key, value in sizes.items())
        lines.append(f"  {name:<16} {counts}")
    show(None, "\n".join(lines), as_json=False, quiet=quiet)


def data_check(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="e.g. cifar10:PATH.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count, hash and check a data set.

    Exit 3 if it cannot be used.
    """
    from redefense.data.check import check_dataset

    found = check_dataset(spec)
    show(found.as_dict(), "\n".join(found.lines()), as_json=as_json, quiet=quiet)
    if found.problems:
        count = len(found.problems)
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise DataError(f"{spec} cannot be used: {found.problems[0]}{more}")


def check_plugin(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A Python file that registers attacks, defences, models or other names.",
        ),
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check what a plug-in registers.

    Each object is tested as its kind requires. Exit 1 if a check fails.
    """
    from redefense.conformance import check_file

    found = check_file(path)
    failed = [check for check in found if not check.passed]
    rows = [dataclasses.asdict(check) for check in found]
    document = {"plugin": str(path), "holds": not failed, "checks": rows}
    text = check_lines(((check.name, check.passed, check.detail) for check in found), 24)
    show(document, text, as_json=as_json, quiet=quiet)
    if failed:
        # also with --quiet: an exit code needs a reason
        echo(f"{path} failed: {failed[0].name}: {failed[0].detail}", quiet=False)
        raise typer.Exit(1)


def _entries(kind: str) -> list[tuple[str, str]]:
    from redefense.plugins import MODULES, registry, summary_of, words

    # the registry of data sets has another name than the option --data
    plural = "datasets" if kind == "data" else kind
    if plural not in MODULES:
        raise ConfigError(
            f"cannot list {kind!r}; choose attacks, defences, models, data, recipes or suites"
        )
    names, rows = registry(plural), []
    for name in names:
        try:
            if kind == "recipes":
                from redefense.recipes import recipe, summary

                text = summary(recipe(name))
            else:
                text = summary_of(names[name])
            if (origin := names.origin(name)) is not None:
                text = f"{text} (from {words(origin)})".lstrip()
        except ConfigError as error:  # one plug-in cannot be loaded; list the others
            text = str(error)
        rows.append((name, text))
    return rows
