"""Deployment: export, verify."""

import json
from pathlib import Path
from typing import Annotated

import typer

from redefense.commands.options import DataSpec, Json, Quiet, RunDir, computing, say


def export(
    path: RunDir,
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    precision: Annotated[str, typer.Option(help="fp32, or int8.")] = "fp32",
    calibration: Annotated[
        int,
        typer.Option(min=0, help="int8: fix ranges by N training images; 0 finds them per batch."),
    ] = 0,
    data: DataSpec = None,
    license_name: Annotated[str, typer.Option("--license", help="SPDX identifier.")] = "mit",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a bundle: a file per member, and what is needed to run and verify it without torch."""
    with computing():
        from redefense.export.summary import summary
        from redefense.export.trained import export_run

        export_run(
            path,
            out,
            data=data,
            precision=precision,
            calibration=calibration,
            license_name=license_name,
            say=lambda line: say(line, quiet),
        )
    shown = summary(out)
    if as_json:
        typer.echo(json.dumps(shown.as_dict(), indent=1))
    elif not quiet:
        for line in shown.lines():
            typer.echo(line)
    say(f"wrote {out}; next: redefense verify {out}", quiet)
