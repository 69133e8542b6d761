"""Files written whole or not at all, and a lock between processes.

A file is written under another name in the same folder and renamed, so that a full disk, a kill or
a reader at the same moment meets the previous version or the new one, and nothing in between.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from redefense.errors import WriteError

UNFINISHED: Final = ".writing-"
"""How the names of files begin that are not whole yet."""

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Give an error of writing within the block the name of the file or folder it was about.

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
    """Why a file could not be written, and what to do about it."""
    text = error.strerror or str(error)
    if is_full(error):
        return f"{text}; free some space on its disk and run the same command again"
    return f"{text}; choose another place, or make this one writable"


def is_full(error: OSError) -> bool:
    """Whether the error says that no room is left, on the disk or within a quota."""
    # safetensors raises its own error, which holds the number in its text alone
    return error.errno in _NO_ROOM or "os error 28" in str(error)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path in the same folder to write a file to; it becomes `path` if the block succeeds.

    The folder is made if need be. After an error nothing is left of it, and a previous `path` is
    kept.

    Raises:
        WriteError: if the file cannot be written.
    """
    # a short name of its own: that of `path` may be as long as the file system allows
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
    """Hold the lock that a file stands for: one process has it at a time, and loses it if killed.

    Yields:
        Whether it is held. With `wait` it always is, and the file stays; otherwise it is not where
        another process holds it, and the holder removes the file, and the folder if left empty.

    Raises:
        WriteError: if the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: the last one's files count
        yield True
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        if wait:
            yield True
            return
        if not path.exists() or not os.path.samestat(os.fstat(handle.fileno()), path.stat()):
            yield False  # its holder has removed it in this moment
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                path.parent.rmdir()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        WriteError: if it cannot be written.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        WriteError: if it cannot be written.
    """
    # a path that was no text in the locale's encoding holds its bytes as surrogates
    content = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    write_bytes(path, content.encode())


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file, whole or not at all.

    Raises:
        WriteError: if it cannot be written.
    """
    content = f"{line}\n".encode()
    # unbuffered, so that closing the file does not try to write again what had no room
    with writing(path), path.open("ab", buffering=0) as file:
        length = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            os.truncate(path, length)
            raise
