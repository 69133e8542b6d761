"""Serving a bundle, and auditing how well a server keeps its secret."""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redefense.commands.options import Json, Quiet, say
from redefense.errors import ConfigError, lacking
from redefense.serve.settings import Mode, Policy, Settings, check_address

if TYPE_CHECKING:
    from redefense.export.runner import Trust

PACKAGES = ("onnxruntime", "starlette", "uvicorn", "prometheus_client")
HOST, PORT = "127.0.0.1", 8000
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.")]


def serve(
    bundle: Bundle,
    host: Annotated[str | None, typer.Option(help=f"Address to listen on; {HOST}.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"{PORT}; 0 takes a free one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="In the routes; the folder's name.")] = None,
    policy: Annotated[
        Policy, typer.Option(help="Whose draw is kept: fresh (none), per-input or per-client.")
    ] = "fresh",
    key: Annotated[
        Path | None, typer.Option(help="Secret of the keyed policies, shared by replicas.")
    ] = None,
    epoch: Annotated[
        float | None, typer.Option(help="Seconds that per-client keeps a draw; an hour.")
    ] = None,
    client_header: Annotated[
        str | None, typer.Option(help="Header by which your proxy names clients; else the address.")
    ] = None,
    signer: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC.pem", help="Ed25519 key that must have signed the bundle."),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="averaged and member (the first) are there to compare.")
    ] = "sampled",
    scores: Annotated[bool, typer.Option("--scores", help="Answer with all scores, too.")] = False,
    research: Annotated[
        bool, typer.Option("--research", help="Seeded draws, members shown; loopback only.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of a research server; 0.")] = None,
    grouped: Annotated[
        bool,
        typer.Option(
            "--grouped", help="Compute a member's images together: faster, but time tells."
        ),
    ] = False,
    max_batch: Annotated[int, typer.Option(help="Images answered together.")] = 64,
    max_delay: Annotated[float, typer.Option(help="Seconds a batch waits for more.")] = 0.0,
    max_queue: Annotated[int, typer.Option(help="Images that may wait; more get 429.")] = 256,
    deadline: Annotated[float, typer.Option(help="Seconds until 504.")] = 5.0,
    max_body: Annotated[int | None, typer.Option(help="Bytes of a request.")] = None,
    max_pixels: Annotated[int, typer.Option(help="Of an uploaded picture.")] = 16_000_000,
    tick: Annotated[
        float, typer.Option(help="Seconds; answers leave on this grid, to hide members' speed.")
    ] = 0.0,
    grace: Annotated[
        float, typer.Option(help="Seconds from SIGTERM (not ready) to the end of listening.")
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option(help="That a member computes with; one per core.")
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Attack servers so started, on the loopback, and exit.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer requests with a bundle: a secret draw per image, Open Inference Protocol v2."""
    for package in PACKAGES:
        if find_spec(package) is None:
            raise ConfigError(lacking("serving", package, "serve"))
    from redefense.serve.draws import draw_by, read_key
    from redefense.serve.model import Model
    from redefense.serve.observe import log_to_stderr
    from redefense.serve.process import serve as run_server

    if research and seed is None:
        seed = 0
    settings = Settings(
        policy=policy,
        mode=mode,
        scores=scores,
        research=research,
        seed=seed,
        grouped=grouped,
        max_batch=max_batch,
        max_delay=max_delay,
        max_queue=max_queue,
        deadline=deadline,
        max_body=max_body,
        max_pixels=max_pixels,
        tick=tick,
        epoch=epoch,
        client_header=client_header,
        grace=grace,
        threads=threads,
    )
    if audit:
        own = {"host": host, "port": port, "name": name, "key": key}
        if given := ", ".join(f"--{option}" for option, value in own.items() if value is not None):
            raise ConfigError(f"--audit starts servers of its own here: leave {given} out")
        _audit(bundle, settings, signer, as_json=as_json, quiet=quiet)
        return
    if as_json:
        raise ConfigError("--json is for --audit; what a server logs is JSON anyway")
    if key is not None and policy == "fresh":
        raise ConfigError(
            "--key is for the policies per-input and per-client: fresh draws need none"
        )
    address = HOST if host is None else host
    check_address(settings, address)
    log_to_stderr(quiet=quiet)
    model = Model(bundle, name=name, threads=threads, trust=_trust(signer))
    model.check_grouped(settings.grouped)
    draw = draw_by(settings, model.mixture, read_key(key))
    run_server(model, settings, draw, host=address, port=PORT if port is None else port)


def _trust(signer: Path | None) -> "Trust | None":
    from redefense.export.signing import trust_in

    return None if signer is None else trust_in(signer)


def _audit(
    bundle: Path, settings: Settings, signer: Path | None, *, as_json: bool, quiet: bool
) -> None:
    from redefense.serve.audit import run_audit
    from redefense.serve.children import child
    from redefense.serve.model import Model

    model = Model(bundle, threads=settings.threads, trust=_trust(signer))
    model.check_grouped(settings.grouped)
    more = () if signer is None else ("--signer", str(signer))
    say(f"auditing {bundle}, policy {settings.policy}: servers come and go for a minute", quiet)
    findings = run_audit(model, settings, lambda: child(bundle, settings, *more))
    passed = all(finding.passed for finding in findings)
    if as_json:
        shown = {"bundle": str(bundle), "policy": settings.policy, "passed": passed}
        rows = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps(shown | {"findings": rows}, indent=1))
    else:
        for finding in (finding for finding in findings if not (quiet and finding.passed)):
            mark = "ok  " if finding.passed else "FAIL"
            typer.echo(f"{mark}  {finding.check:<30}  {finding.detail}")
    raise typer.Exit(0 if passed else 1)
