"""Middleware for every response: headers, the log line, and errors without tracebacks."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, NoReturn
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redefense.serve.observe import LOG, Metrics
from redefense.serve.settings import is_loopback

HEADERS: Final = {
    "Cache-Control": "no-store",  # a cache would fix one member per image
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_GONE = 499  # status in the log if the client disconnected before its answer
_PLAIN: Final = {"Accept-Encoding": "identity"}
_UNREAD: Final = {"Connection": "close"}  # the rest of the body will not be read


class Guard:
    """ASGI middleware around all routes.

    Args:
        leaving: whether connections are to close after their next response.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, leaving: Callable[[], bool]) -> None:
        self._app, self._metrics, self._leaving = app, metrics, leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if self._leaving():
                    headers["Connection"] = "close"
                if status == 503:
                    headers["Retry-After"] = "1"  # by then another server answers
            await send(message)

        try:
            await self._app(scope, receive, send_guarded)
        except ClientDisconnect:
            status = status or _GONE
        except Exception:  # noqa: BLE001 - the last line of defence: a client never sees why
            LOG.exception({"event": "defect"})
            if status == 0:
                answer = JSONResponse({"error": "internal error"}, 500)
                await answer(scope, receive, send_guarded)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # the handler's name, not the path, which the client chooses
        route = getattr(scope.get("endpoint"), "__name__", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        LOG.info(
            {"event": "request", "route": route, "status": status, "ms": round(seconds * 1000)}
        )


class OwnNames:
    """ASGI middleware that accepts loopback host names only.

    A web page elsewhere can resolve its name to this machine (DNS rebinding), so that a visitor's
    browser reads responses of this server. The host name of the request reveals it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_loopback(_name(Headers(scope=scope).get("host", ""))):
            refusal = {"error": "a research server answers to the names of this machine alone"}
            await JSONResponse(refusal, 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Bodies:
    """Reads request bodies of bounded size and time, and of bounded total size.

    Args:
        limit: bytes of one body.
        total: bytes of all bodies that are being read or decoded.
        seconds: timeout of reading a body.
    """

    def __init__(self, *, limit: int, total: int, seconds: float) -> None:
        self._limit, self._left, self._seconds = limit, total, seconds

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; it counts towards the total within the context.

        Raises:
            HTTPException: 413 too large, 408 too slow, 415 compressed, 429 total exceeded.
        """
        content = bytearray()
        coding = ", ".join(request.headers.getlist("content-encoding")).strip()
        if coding.lower() not in ("", "identity"):
            # a few bytes may decompress to more than the memory; binary tensors are small enough
            plain = "a compressed body is not supported"
            raise HTTPException(
                415, f"{plain} (Content-Encoding: {coding[:40]})", {**_UNREAD, **_PLAIN}
            )
        announced = request.headers.get("content-length", "")
        # refused before a byte is read; int() of millions of digits would take seconds
        if announced.isdigit() and len(announced) < 20 and int(announced) > self._limit:
            self._too_large()
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    if len(content) + len(chunk) > self._limit:
                        self._too_large()
                    if len(chunk) > self._left:
                        retry = {"Retry-After": "1"} | _UNREAD
                        raise HTTPException(
                            429, "too many request bodies are being read; try again later", retry
                        )
                    self._left -= len(chunk)
                    content += chunk
            yield bytes(content)
        except TimeoutError:
            late = f"the body took longer than {self._seconds:g} s"
            raise HTTPException(408, late, _UNREAD) from None
        finally:
            self._left += len(content)

    def _too_large(self) -> NoReturn:
        raise HTTPException(413, f"a request may have at most {self._limit} bytes", _UNREAD)
