"""Deployment: export, verify."""

from pathlib import Path
from typing import Annotated

import typer

from redefense.commands.options import DataSpec, Json, Quiet, RunDir, check_lines, echo, show


def export(
    path: RunDir,
    out: Annotated[Path, typer.Option(help="Directory of the new bundle.")],
    precision: Annotated[
        str, typer.Option(help="Precision of the weights: fp32 or int8.")
    ] = "fp32",
    calibration: Annotated[
        int | None,
        typer.Option(
            min=0, help="Training images for int8 calibration, by default 512; 0 scales per batch."
        ),
    ] = None,
    data: DataSpec = None,
    license_name: Annotated[str, typer.Option("--license", help="SPDX identifier.")] = "mit",
    sign: Annotated[
        Path | None,
        typer.Option(metavar="PRIVATE.pem", help="Ed25519 key that signs the manifest."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a bundle: one ONNX file per member.

    A bundle can be run and verified without torch.
    """
    from redefense.export.summary import summary
    from redefense.export.trained import export_run

    export_run(
        path, out, data=data, precision=precision, calibration=calibration,
        license_name=license_name, sign=sign, log=lambda line: echo(line, quiet),
    )  # fmt: skip
    found = summary(out)
    show(found.as_dict(), "\n".join(found.lines()), as_json=as_json, quiet=quiet)
    echo(f"wrote {out}; next: redefense verify {out}", quiet)


def verify(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by export.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A run whose outputs the bundle must reproduce."),
    ] = None,
    signer: Annotated[
        Path | None,
        typer.Option(
            metavar="PUBLIC.pem", help="Public Ed25519 key that the signature must match."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Verify a bundle; exit 1 with the reason if a check fails."""
    from redefense.export.verify import verify as checks_of

    checks = checks_of(path, against=against, signer=signer)
    failed = [check for check in checks if not check.passed]
    rows = [check.as_dict() for check in checks]
    document = {"bundle": str(path), "holds": not failed, "checks": rows}
    text = check_lines(((check.id, check.passed, check.detail) for check in checks), 10)
    show(document, text, as_json=as_json, quiet=quiet)
    if failed:
        # also with --quiet: an exit code needs a reason
        echo(f"{path} does not hold: {failed[0].id}: {failed[0].detail}", quiet=False)
        raise typer.Exit(1)
    echo(f"{path} holds", quiet)
