"""Certification: certify."""

from pathlib import Path
from typing import Annotated

import typer

from redefense.commands.options import DataSpec, Device, Json, Quiet, RunDir, echo, show


def certify(
    path: RunDir,
    sigma: Annotated[
        float, typer.Option(help="Deviation of the Gaussian noise on images in [0, 1].")
    ] = 0.25,
    eps: Annotated[
        str | None,
        typer.Option(help="L2 radii, e.g. 0.25 or 0.1,0.5; by default 0, sigma/2 and sigma."),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Number of noise draws per image.")] = 1000,
    alpha: Annotated[float, typer.Option(help="Probability of a wrong certificate.")] = 0.001,
    data: DataSpec = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="The first N of a fixed permutation of the test split."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Certify the L2 accuracy of a run with Gaussian noise.

    The bounds hold for one draw of the noise, and for the majority vote over draws.
    """
    from redefense.evaluation.stochastic.certify import certify_run
    from redefense.radius import read_eps

    radii = [] if eps is None else [read_eps(part, "--eps") for part in eps.split(",")]
    document, target = certify_run(
        path, sigma=sigma, radii=radii, draws=draws, alpha=alpha, data=data, images=images,
        seed=seed, device=device, out=out, log=lambda line: echo(line, quiet),
    )  # fmt: skip
    lines = [
        f"l2 {one['radius']:g}: certified accuracy of one draw {100 * one['single']:.1f} %, "
        f"of the vote {100 * one['vote']:.1f} % (confidence {100 * one['confidence']:g} %)"
        for one in document["certificates"]
    ]
    show(document, "\n".join(lines), as_json=as_json, quiet=quiet)
    echo(f"wrote {target}", quiet or as_json)
