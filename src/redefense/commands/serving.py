"""Serving: serve a bundle, and audit whether a server reveals its draws."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redefense.commands.options import Json, Quiet, check_lines, echo, show
from redefense.errors import ConfigError, not_installed
from redefense.serve.settings import Mode, Policy, Settings, check_address

# these need packages of the extra `serve`
if TYPE_CHECKING:
    from redefense.export.runner import Trust
    from redefense.serve.draws import Draw
    from redefense.serve.model import Model

PACKAGES = ("onnxruntime", "starlette", "uvicorn", "prometheus_client")
# other machines reach a server only if --host says so
HOST, PORT = "127.0.0.1", 8000
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that export wrote.")]


def serve(
    bundle: Bundle,
    # None where a default would do: --audit refuses options that it would ignore
    host: Annotated[str | None, typer.Option(help=f"Address to listen on; {HOST}.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help=f"{PORT}; 0 selects a free port.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model name in the routes; by default the folder's.")
    ] = None,
    policy: Annotated[
        Policy, typer.Option(help="Reuse of draws: fresh (none), per-input or per-client.")
    ] = "fresh",
    key: Annotated[
        Path | None,
        typer.Option(
            help="File with the secret key of per-input and per-client, shared by replicas."
        ),
    ] = None,
    epoch: Annotated[
        float | None,
        typer.Option(help="Seconds for which per-client reuses a draw; by default an hour."),
    ] = None,
    client_header: Annotated[
        str | None,
        typer.Option(help="Header that identifies clients behind a proxy; by default the address."),
    ] = None,
    signer: Annotated[
        Path | None,
        typer.Option(
            metavar="PUBLIC.pem", help="Public Ed25519 key that the bundle's signature must match."
        ),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(help="How to predict; averaged and member (the first) are for comparison."),
    ] = "sampled",
    scores: Annotated[
        bool, typer.Option("--scores", help="Return the scores of all classes.")
    ] = False,
    research: Annotated[
        bool,
        typer.Option(
            "--research", help="Seeded draws and visible members; on loopback addresses only."
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Random seed of a research server, by default 0.")
    ] = None,
    grouped: Annotated[
        bool,
        typer.Option(
            "--grouped",
            help="Run a member's images as one batch: faster, but response times reveal the draw.",
        ),
    ] = False,
    max_batch: Annotated[int, typer.Option(help="Maximum number of images in a batch.")] = 64,
    max_delay: Annotated[
        float, typer.Option(help="Longest time in seconds that a batch waits for further images.")
    ] = 0.0,
    max_queue: Annotated[
        int, typer.Option(help="Maximum number of waiting images; further requests get 429.")
    ] = 256,
    deadline: Annotated[
        float, typer.Option(help="Seconds after which a request is answered with 504.")
    ] = 5.0,
    max_body: Annotated[
        int | None, typer.Option(help="Maximum size of a request in bytes.")
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Maximum number of pixels of an uploaded picture.")
    ] = 16_000_000,
    tick: Annotated[
        float,
        typer.Option(
            help="Interval in seconds at which answers are sent, to hide differences in speed."
        ),
    ] = 0.0,
    grace: Annotated[
        float, typer.Option(help="Seconds from SIGTERM (not ready) to the end of listening.")
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option(help="Threads per member; by default one per core.")
    ] = None,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Start servers with these settings on the loopback, test their secrecy, and exit.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a bundle over HTTP, with a secret draw per image.

    The server implements the Open Inference Protocol v2.

    SIGHUP reloads BUNDLE; SIGTERM finishes pending requests and exits.
    """
    for package in PACKAGES:
        # one line that names the extra, in place of an ImportError from inside the server
        if find_spec(package) is None:
            raise ConfigError(not_installed("serving", package, "serve"))
    from redefense.serve.draws import draw_by, read_key
    from redefense.serve.model import Model
    from redefense.serve.observe import log_to_stderr
    from redefense.serve.process import serve as run_server

    # not the option's default, since a seed without --research is refused
    if research and seed is None:
        seed = 0
    settings = Settings(
        policy=policy, mode=mode, scores=scores, research=research, seed=seed, grouped=grouped,
        max_batch=max_batch, max_delay=max_delay, max_queue=max_queue, deadline=deadline,
        max_body=max_body, max_pixels=max_pixels, tick=tick, epoch=epoch,
        client_header=client_header, grace=grace, threads=threads,
    )  # fmt: skip
    if audit:
        own = {"host": host, "port": port, "name": name, "key": key}
        if given := ", ".join(f"--{option}" for option, value in own.items() if value is not None):
            raise ConfigError(f"--audit starts its own servers on this machine: remove {given}")
        _audit(bundle, settings, signer, as_json=as_json, quiet=quiet)
        return
    if as_json:
        raise ConfigError("--json requires --audit; the log of a server is always JSON")
    if key is not None and policy == "fresh":
        raise ConfigError(
            "--key requires the policy per-input or per-client: fresh draws need no key"
        )
    address = HOST if host is None else host
    check_address(settings, address)
    log_to_stderr(quiet=quiet)
    # read once: a reloaded bundle is checked with the same keys
    secret, trust = read_key(key), _trust(signer)

    # called again for each reload of the bundle
    def load(named: str | None) -> "tuple[Model, Draw]":
        model = Model(bundle, name=name if named is None else named, threads=threads, trust=trust)
        return model, draw_by(settings, model.mixture, secret)

    run_server(load, settings, host=address, port=PORT if port is None else port)


def _trust(signer: Path | None) -> "Trust | None":
    from redefense.export.signing import trust_in

    return None if signer is None else trust_in(signer)


def _audit(
    bundle: Path, settings: Settings, signer: Path | None, *, as_json: bool, quiet: bool
) -> None:
    from redefense.serve.audit.children import child
    from redefense.serve.audit.run import run_audit
    from redefense.serve.model import Model

    # a damaged bundle is refused before any server is started
    model = Model(bundle, threads=settings.threads, trust=_trust(signer))
    model.check_grouped(settings.grouped)
    more = () if signer is None else ("--signer", str(signer))
    echo(f"auditing {bundle}, policy {settings.policy}: takes about a minute", quiet)
    findings = run_audit(model, settings, lambda: child(bundle, settings, *more))
    passed = all(finding.passed for finding in findings)
    document = {
        "bundle": str(bundle), "policy": settings.policy, "passed": passed,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }  # fmt: skip
    shown = [f for f in findings if not (quiet and f.passed)]
    text = check_lines(((f.check, f.passed, f.detail) for f in shown), 30)
    show(document, text, as_json=as_json)
    raise typer.Exit(0 if passed else 1)
