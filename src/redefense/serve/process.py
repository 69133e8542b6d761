"""Runs the server: listens, serves, and shuts down without losing a request."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from redefense.errors import ConfigError, RedefenseError
from redefense.serve.app import Service, create_service
from redefense.serve.draws import Draw
from redefense.serve.model import Model
from redefense.serve.observe import LOG
from redefense.serve.settings import Settings, check_address

Load = Callable[[str | None], tuple[Model, Draw]]
"""Loads a bundle under a name (None: its own), and its draw policy."""

_IDLE: Final = 30.0  # seconds that a connection may be idle
_LAST_CALL: Final = 0.2  # seconds for requests in flight on connections about to be closed
_BACKLOG: Final = 2048


class _Server(uvicorn.Server):
    """Does not handle signals, `run` does: uvicorn would stop at once and exit by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 selects a free one.

    Raises:
        ConfigError: the address is not available.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # with an explicit protocol, else asyncio does not disable Nagle's delay of 40 ms
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    # else a restarted server could not listen while old connections time out
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run(app: ASGIApp, service: Service, listener: socket.socket, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain.

    Readiness turns false first and every response closes its connection, so that load balancers and
    clients switch; then listening stops; then remaining requests are answered.
    """
    settings = service.settings
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a client could choose its address
        ws="none",
        lifespan="on",
        timeout_keep_alive=int(_IDLE),
        timeout_graceful_shutdown=int(settings.deadline) + 5,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reaping = asyncio.create_task(_reap(server))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        service.leaving = True
        LOG.info({"event": "leaving"})
        # load balancers poll readiness every few seconds; until then they send requests
        await asyncio.sleep(settings.grace)
        for listening in server.servers:
            listening.close()
        await asyncio.sleep(min(settings.grace, _LAST_CALL))
        server.should_exit = True
    await serving
    for task in (reaping, stopping):
        task.cancel()
    LOG.info({"event": "stopped"})


async def _reap(server: uvicorn.Server) -> None:
    # uvicorn has no timeout for a request's headers
    since: dict[tuple[int, int], float] = {}
    while True:
        await asyncio.sleep(_IDLE / 10)
        now, seen = time.monotonic(), since
        since = {}
        for connection in list(server.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                key = (id(connection), id(cycle))
                since[key] = seen.get(key, now)
                if now - since[key] > _IDLE and connection.transport is not None:
                    connection.transport.close()


def serve(load: Load, settings: Settings, *, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then drain; on SIGHUP reload the bundle.

    Raises:
        ConfigError: the address cannot be listened on, or others could reach a research server.
    """
    check_address(settings, host)
    model, draw = _ready(load, None, settings)
    with contextlib.closing(listen(host, port)) as listener:
        app, service = create_service(model, settings, draw)
        LOG.info({"event": "listening", "url": url_of(listener), "model": model.name})
        asyncio.run(_until_signal(app, service, listener, load))


def _ready(load: Load, name: str | None, settings: Settings) -> tuple[Model, Draw]:
    model, draw = load(name)
    model.check_grouped(settings.grouped)
    # only then do members get batches of several images
    together = settings.grouped or settings.mode != "sampled"
    model.warm_up((1, settings.max_batch) if together else (1,))
    return model, draw


async def _until_signal(
    app: ASGIApp, service: Service, listener: socket.socket, load: Load
) -> None:
    stop, again = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, again.set)
    updating = asyncio.create_task(_update(service, again, load))
    await run(app, service, listener, stop)
    updating.cancel()


async def _update(service: Service, again: asyncio.Event, load: Load) -> None:
    """Whenever `again` is set, load a bundle in the background, then switch to it.

    If it cannot be served, this is logged and the previous one stays.
    """
    while True:
        await again.wait()
        again.clear()
        try:
            made = await asyncio.to_thread(_ready, load, service.model.name, service.settings)
            service.use(*made)
        except RedefenseError as error:
            LOG.error({"event": "update refused", "why": str(error)})
            service.metrics.updates.labels("refused").inc()
        except Exception:  # noqa: BLE001 - a defect of ours must not end what answers
            LOG.exception({"event": "defect"})
            service.metrics.updates.labels("refused").inc()
        else:
            LOG.info({"event": "updated", "model": service.model.name})
            service.metrics.updates.labels("done").inc()
