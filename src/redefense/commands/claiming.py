"""Claims: make, check, recompute, compare, table."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from redefense.commands.options import Device, Json, Quiet, echo, show

ClaimFiles = Annotated[list[Path], typer.Argument(metavar="CLAIM...", help="Files of claims.")]
Images = Annotated[
    int | None, typer.Option(min=1, help="Use only results on this number of images.")
]


def make(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|REPORT.json...",
            help="An evaluated run; or evaluations of one set of weights, with their records.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the claim; by default the run's name.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Web address of a description of the weights.")
    ] = None,
    authors: Annotated[str | None, typer.Option(help="Authors of the weights.")] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="Licence of the weights, e.g. MIT.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the claim of a run, or of weights of your own.

    Weights that `redefense train` did not make need --name, --link, --authors and --licence.
    An existing claim of the same weights keeps its results on other images.
    """
    from redefense.claims.format import read, write
    from redefense.claims.make import claim

    made = claim(
        sources, name, link=link, authors=authors, licence=licence,
        log=lambda line: echo(line, quiet),
    )  # fmt: skip
    if out.is_file():
        made = made.keeping(read(out))
    for plan in (plan for each in made.evaluations for plan in each.suites):
        commit = str(plan.provenance.get("commit", ""))
        # nobody else can obtain this code
        if not commit or commit.endswith("-dirty"):
            echo(f"{plan.file} was made by code without a commit ({commit or 'unknown'})", quiet)
    write(made, out)
    show({"file": str(out)}, as_json=as_json)
    echo(f"wrote {out}; next: redefense claim check {out}", quiet)


def check(paths: ClaimFiles, as_json: Json = False, quiet: Quiet = False) -> None:
    """Check claims without training.

    It checks schema, hashes, figures and attacks, and applies the rules of `audit`. Exit 1 if a
    claim does not hold, 3 if a file is missing or unreadable.
    """
    from redefense.audit.audit import exit_code
    from redefense.claims.check import check as findings_of
    from redefense.errors import DataError

    unread: dict[str, str] = {}
    by_file = {}
    for path in paths:
        try:
            by_file[str(path)] = findings_of(path)
        # collected: one unreadable file must not hide the findings about the others
        except DataError as error:
            unread[str(path)] = str(error)
    failed = [file for file, findings in by_file.items() if exit_code(findings)]
    if as_json:
        listed = {file: [dataclasses.asdict(f) for f in found] for file, found in by_file.items()}
        shown = {"holds": not failed and not unread, "findings": listed, "unread": unread}
        show(shown, as_json=True)
    for file, findings in by_file.items():
        for finding in () if as_json else findings:
            if finding.severity == "error" or not quiet:
                typer.echo(f"{file}: {finding}")
        if not as_json and (file in failed or not quiet):
            typer.echo(f"{file}: {'does not hold' if file in failed else 'holds'}")
    for reason in unread.values():
        echo(f"redefense: {reason}", quiet=False)
    raise typer.Exit(3 if unread else int(bool(failed)))


def recompute(
    path: Annotated[Path, typer.Argument(metavar="CLAIM", help="The file of a claim.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SPEC",
            help="The data of the claim on this machine, e.g. digits or cifar10:PATH.",
        ),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            "--run",
            metavar="DIR",
            help="A run, or a folder for a model hub, to evaluate instead of training.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Save the run here, so that a second call resumes it."),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train, evaluate, and compare the result with a claim.

    With --weights nothing is trained. Exit 1 if the figures differ.
    """
    from redefense.claims.format import read
    from redefense.claims.recompute import recompute as differences_of

    it = read(path)
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        log = None if quiet else lambda line: echo(line, quiet)
        found = differences_of(it, data, folder, weights=weights, device=device, log=log)
    lines = list(map(str, found))
    document = {"claim": str(path), "holds": not found, "differences": lines}
    if found or not quiet:
        lines.append(f"{path}: {'does not hold' if found else 'holds'}")
    show(document, "\n".join(lines), as_json=as_json)
    raise typer.Exit(int(bool(found)))


def compare(
    methods: Annotated[
        list[str], typer.Argument(metavar="METHOD...", help="Names of claims without their seed.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Name of one of them: add paired differences from it.")
    ] = None,
    images: Images = None,
    claims: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of claims METHOD-SEED.json.")
    ] = Path("claims"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods over all their seeds, under matched attacks."""
    from redefense.claims.compare import seeds_of, table

    rows = table({name: seeds_of(name, claims, images) for name in methods}, against)
    _print(rows, as_json=as_json, quiet=quiet)


def table(
    paths: ClaimFiles,
    against: Annotated[
        str | None, typer.Option(help="Name of a claim: add paired differences from it.")
    ] = None,
    attacks: Annotated[
        bool, typer.Option("--attacks", help="Print one row for each attack instead.")
    ] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="Print the gain of the random draw instead.")
    ] = False,
    images: Images = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print claims as a Markdown table, one row each.

    Accuracies are in percent, with 95 % intervals. The training cost is in millions of forward
    passes: its FLOPs, divided by those of one image through one member.
    """
    from redefense.claims.tables import chosen, read_whole
    from redefense.errors import ConfigError

    if attacks and draw:
        raise ConfigError("--attacks and --draw print different tables: use one of them")
    kind = "draw" if draw else "attacks" if attacks else "methods"
    rows = chosen([read_whole(path) for path in paths], kind, images, against)
    _print(rows, as_json=as_json, quiet=quiet)


def _print(markdown: str, *, as_json: bool, quiet: bool) -> None:
    """Print a Markdown table, or its rows as JSON."""
    lines = [line.strip("| ") for line in markdown.splitlines() if line.startswith("|")]
    head, *rows = [[cell.strip() for cell in line.split(" | ")] for line in lines] or [[]]
    # the first row below the heading is Markdown's ruler
    found = [dict(zip(head, row, strict=False)) for row in rows[1:]]
    show({"rows": found}, markdown, as_json=as_json, quiet=quiet)


def leaderboard(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of claims.")],
    out: Annotated[
        Path, typer.Option(metavar="SITE", help="Folder to write; open its index.html.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the leaderboard of a folder of claims as static pages."""
    from redefense.claims.site import write_site

    written = write_site(folder, out)
    show({"files": list(map(str, written))}, as_json=as_json)
    echo(f"wrote {written[0]} and a page for each of {len(written) - 1} claims", quiet)
