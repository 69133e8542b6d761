"""Standard streams that accept any text, whatever their encoding."""

import codecs
import io
import os
import sys
from types import MappingProxyType
from typing import Any, Final

_PLAIN: Final = MappingProxyType(
    {
        "\u2212": "-",  # minus: a question mark in its place would lose the sign
        "\u2013": "-",
        "\u2014": "-",
        "\u00a0": " ",
        "\u00b7": "-",
        "\u00b1": "+-",
        "\u00d7": "x",
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2026": "...",
        "\u2192": "->",
        "\u2264": "<=",
        "\u2265": ">=",
    }
)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        # errors in reading are not replaced: the text would be wrong
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in lost), error.end


def accept_every_letter() -> None:
    """Replace characters that the encoding of a standard stream lacks, instead of raising.

    Symbols are replaced by their ASCII form and other characters by a question mark. A closed
    stream, or one whose reader closes it, writes nothing.
    """
    codecs.register_error("redefense", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Python sets None for a descriptor that was closed at its start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        # the streams of notebooks and test runners accept any text
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="redefense")
            if stream is getattr(sys, f"__{name}__"):  # the interpreter's own, which stays open
                setattr(sys, name, _piped(stream))


class _Pipe(io.FileIO):
    """A stream that discards what is written after its reader has closed the pipe.

    The command goes on, and its exit code still states its result.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            # the descriptor itself, so that Python's last flush at its exit succeeds, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def _piped(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        # closed by the interpreter's own stream
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
