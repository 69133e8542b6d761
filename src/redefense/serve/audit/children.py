"""Starts servers in separate processes, as an operator would, for the audit."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from redefense.errors import DataError
from redefense.serve.audit.channels import Replica
from redefense.serve.settings import Settings

_START: Final = 120.0  # seconds to load and warm up


def options_of(settings: Settings) -> list[str]:
    """The command line for these settings."""
    words: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        option = "--" + field.name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is not None and value is not False:  # 0.0 is a value
            words += [option, str(value)]
    return words


@contextmanager
def child(bundle: Path, settings: Settings, *more: str) -> Iterator[Replica]:
    """A server of the bundle on a free local port, within the context.

    `more` are additional arguments of its command line.

    Raises:
        DataError: it does not start, with its output.
    """
    words = [sys.executable, "-m", "redefense", "serve", str(bundle), "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*words, *options_of(settings), *more], stdout=subprocess.DEVNULL, stderr=stream
            )
        try:
            url = url_in(process, log)
            yield Replica(url, lambda: log.read_text(encoding="utf-8"), process)
        finally:
            process.terminate()
            process.wait()


def url_in(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address of a server, from its log, once it listens.

    Raises:
        DataError: it ends, or does not listen in time.
    """
    until = time.monotonic() + _START
    while time.monotonic() < until:
        text = log.read_text(encoding="utf-8")
        for line in text.splitlines():
            # a line may be read while it is being written
            if '"listening"' in line and line.endswith("}"):
                return str(json.loads(line)["url"])
        if process.poll() is not None:
            raise DataError(f"the server did not start: {text.strip()[-500:]}")
        time.sleep(0.05)
    raise DataError(f"the server did not start within {_START:g} s")
