"""Training: train, materialise."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from redefense.commands.options import (
    DataSpec,
    Device,
    Json,
    Quiet,
    Replay,
    RunDir,
    Set,
    echo,
    resolve_run,
    show,
)
from redefense.errors import RedefenseError
from redefense.runtime.folders import METRICS


def train(
    what: Annotated[str, typer.Argument(metavar="RECIPE|RUN.json", help="What to train.")],
    changes: Set = None,
    data: DataSpec = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; by default runs/RECIPE.")] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|FILE", help="A run or a file of weights to initialise the members from."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the training.")] = None,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Download the data if it is missing.")
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="DATAxMEMBER",
            help="How torchrun's processes share batches and members; by default only batches.",
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print and store the time of each phase.")
    ] = False,
    replay: Replay = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a recipe, or a run from its JSON record."""
    from redefense.config import StartConfig, default_folder

    # only one of the processes that torchrun starts prints
    first = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not first
    as_json = as_json and first
    try:
        run = resolve_run(what, changes, data, seed)
    except RedefenseError as error:
        # all processes raise it, and one message is enough
        error.reported = not first
        raise
    if start is not None:
        run = run.model_copy(update={"start": StartConfig(path=str(start))})
    target = out if out is not None else default_folder(run)
    # after the settings: a mistake in them is answered without the import of torch
    from redefense.train.experiment import train as train_run

    train_run(
        run, target, resume=resume, device=device, quiet=quiet or as_json, download=download,
        profile=profile, mesh=mesh, replay=replay,
    )  # fmt: skip
    if as_json:
        lines = (target / METRICS).read_text().splitlines()
        last = json.loads(lines[-1]) if lines else {}
        summary = {"run": str(target), "recipe": run.recipe, "seed": run.seed, "last": last}
        show(summary, as_json=True)
    echo(f"trained {target}; next: redefense evaluate {target}", quiet)


def materialise(
    path: RunDir,
    out: Annotated[Path, typer.Option(help="Directory of the new run.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the members of a PS-RED run as plain networks."""
    from redefense.train.loading import materialise as write_out

    write_out(path, out)
    show({"run": str(out)}, as_json=as_json)
    echo(f"wrote {out}; next: redefense evaluate {out}", quiet)
