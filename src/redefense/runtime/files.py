"""Atomically written files, and a lock between processes.

A file is written under another name in the same folder and renamed. After a full disk or a kill,
and for concurrent readers, it is the previous or the new version.
"""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from redefense.errors import WriteError

UNFINISHED: Final = ".writing-"
"""Prefix of the names of incomplete files."""

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the name of the file or folder to write errors within the block.

    Raises:
        WriteError: naming `path`, the reason and what to do.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(f"cannot write {path}: {reason(error)}", full=is_full(error)) from None


def reason(error: OSError) -> str:
    """Reason for a failed write, and what to do."""
    text = error.strerror or str(error)
    if is_full(error):
        return f"{text}; free some space on its disk and run the same command again"
    return f"{text}; choose another place, or make this one writable"


def is_full(error: OSError) -> bool:
    """Whether the error is a full disk or an exceeded quota."""
    # safetensors raises its own error, with the number only in its text
    return error.errno in _NO_ROOM or any(f"(os error {n})" in str(error) for n in _NO_ROOM)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path in the same folder to write a file to; it becomes `path` if the block succeeds.

    The folder is created if needed. After an error the new file is removed, and a previous `path`
    is unchanged.

    Raises:
        WriteError: if the file cannot be written.
    """
    # a short name: that of `path` may be as long as the file system allows
    aside = path.with_name(f"{UNFINISHED}{os.getpid()}-{threading.get_native_id()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file; it is released if the process is killed.

    Yields:
        Whether the lock is held. With `wait` it always is, and the file remains. Otherwise it is
        not if another process holds it, and the holder removes the file, and the folder if empty.

    Raises:
        WriteError: if the file cannot be created.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: the last writer wins
        yield True
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    with handle:
        try:
            # the system releases it with the process, so that a killed one leaves no stale lock
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        if wait:
            yield True
            return
        if not path.exists() or not os.path.samestat(os.fstat(handle.fileno()), path.stat()):
            yield False  # its holder has just removed it
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        WriteError: if it cannot be written.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically.

    Raises:
        WriteError: if it cannot be written.
    """
    # a path that cannot be decoded in the locale's encoding contains surrogates
    content = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    write_bytes(path, content.encode())


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically.

    Raises:
        WriteError: if it cannot be written.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, which is not held in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file atomically.

    Raises:
        WriteError: if it cannot be written.
    """
    content = f"{line}\n".encode()
    # unbuffered, so that closing the file does not repeat a failed write
    with writing(path), path.open("ab", buffering=0) as file:
        length = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            os.truncate(path, length)
            raise
