"""Evaluation: evaluate, report, audit, landscape, card."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from redefense.commands.options import DataSpec, Device, Json, Quiet, Replay, RunDir, echo, show


def evaluate(
    path: RunDir,
    suite: Annotated[str, typer.Option(help="A suite's name, or a .json file.")] = "quick",
    data: DataSpec = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="The first N of a fixed permutation of the split."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="test, or validation to choose settings on; a claim is of test images."),
    ] = "test",
    eps: Annotated[
        str | None,
        typer.Option(help="Radius of the threat, or several: 2/255,8/255; by default the run's."),
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Norm of the threat: linf or l2.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the evaluation.")] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of repetitions of each attack, with different seeds.")
    ] = 1,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    checks: Annotated[
        str, typer.Option(help="quick, or full for checks that run further attacks.")
    ] = "quick",
    no_cascade: Annotated[
        bool,
        typer.Option(
            "--no-cascade", help="Attack all images, also those that already fool all members."
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="How aware attacks query the ensemble: fp32 (as it is), auto (batch norms folded) "
            "or bf16 (folded, in bfloat16)."
        ),
    ] = None,
    stochastic: Annotated[
        str, typer.Option(help="Measure stochastic networks by fresh draws: auto, on or off.")
    ] = "auto",
    save_images: Annotated[
        bool,
        typer.Option(
            "--save-images",
            help="Save the attacked images as ATTACK.images.npz in the folder of the records.",
        ),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest number of images per call of a network, which bounds the memory; "
            "by default 1,228,800 values (8 images of 224 x 224 pixels).",
        ),
    ] = None,
    replay: Replay = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a check fails.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attack a trained run and write DIR/evaluation/SUITE.json."""
    # only one of the processes that torchrun starts prints
    first = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not first
    from redefense.checks.catalogue import explained
    from redefense.evaluation.api import evaluate_run
    from redefense.report.sentences import PERCENT, members_weak
    from redefense.results.schema import OF_DEFENCE

    report, target = evaluate_run(
        path, suite=suite, data=data, images=images, split=split, eps=eps, norm=norm, seed=seed,
        seeds=seeds, device=device, out=out, checks=checks,
        # None: as the suite says
        cascade=False if no_cascade else None,
        precision=precision, stochastic=stochastic, keep_images=save_images, replay=replay,
        batch_size=batch_size, log=None if quiet else lambda line: echo(line, quiet),
    )  # fmt: skip
    red = [check for check in report.data["checks"] if check["passed"] is False]
    for check in red:
        # such a check says nothing against the measurement
        word = "about the defence" if check["id"] in OF_DEFENCE else "check failed"
        echo(f"{word}, {explained(check['id'], check['detail'])}", quiet)
    if weak := members_weak(report.data["clean"]["per_member"], report.data["mixture"]):
        echo(weak.replace(PERCENT, " %"), quiet)
    if as_json and first:
        # the bytes of the stored file, which end with a line break
        typer.echo(report.to_json(), nl=False)
    elif not as_json:
        # a report of the run does not read files elsewhere
        what = path if out is None else target
        echo(f"wrote {target}; next: redefense report {what}", quiet)
    if strict and red:
        raise typer.Exit(1)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Evaluated runs, folders of runs, or files of evaluations."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="An .html page, with .md, .csv and .json; or a .md, .csv, .json or .tex file."
        ),
    ] = Path("report.html"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a report on evaluated runs: a page, or a table."""
    from rich.console import Console

    from redefense.report.differences import format_differences
    from redefense.report.page import write_report
    from redefense.report.tables import format_table, summary_rows, to_json
    from redefense.results.join import join

    written = write_report(paths, out)
    results = join(paths)
    if as_json:
        files = {"files": [str(path) for path in written]}
        show(files | json.loads(to_json(results)), as_json=True)
    elif not quiet:
        # a pipe has no width, and a wrapped table is unreadable
        width = None if sys.stdout.isatty() else 160
        console = Console(width=width)
        console.print(format_table(summary_rows(results)))
        if (differences := format_differences(results)) is not None:
            console.print(differences)
        typer.echo(f"report: {written[0]}")


def audit(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="An evaluation, a run, or a CSV of claims.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the figures of a table that cannot be right.

    Each is listed with the reason. Exit 1 if there are any.
    """
    from redefense.audit.audit import audit as findings_of
    from redefense.audit.audit import exit_code

    findings = findings_of(path)
    errors = sum(finding.severity == "error" for finding in findings)
    document = {"holds": not errors, "findings": [dataclasses.asdict(f) for f in findings]}
    # notes do not change the exit code, so --quiet omits them
    lines = [str(f) for f in findings if f.severity == "error" or not quiet]
    show(document, "\n".join(lines), as_json=as_json)
    notes = len(findings) - errors
    message = f"{errors} claim{'s do' if errors != 1 else ' does'} not hold"
    echo(f"{path}: {message}, {notes} note{'s' * (notes != 1)}", quiet or as_json)
    raise typer.Exit(exit_code(findings))


def landscape(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR [DIR2]", help="One or two runs.")],
    out: Annotated[Path, typer.Option(help="An .svg or .png file.")] = Path("landscape.svg"),
    image: Annotated[
        int | None,
        typer.Option(help="Validation image; by default the first that both classify correctly."),
    ] = None,
    data: DataSpec = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plot the loss surfaces of two members.

    They are drawn over the plane spanned by the gradients of the members.
    """
    from redefense.report.landscape import write_landscape

    written = write_landscape(paths, out, image=image, data=data)
    show({"file": str(written)}, as_json=as_json)
    echo(f"wrote {written}", quiet)


def card(
    path: RunDir,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default DIR/README.md.")
    ] = None,
    license_name: Annotated[str, typer.Option("--license", help="SPDX identifier.")] = "mit",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model card of an evaluated run."""
    from redefense.report.card import write_card

    written = write_card(path, out, license_name=license_name)
    show({"file": str(written)}, as_json=as_json)
    echo(f"wrote {written}", quiet)
