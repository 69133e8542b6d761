"""Standard streams that accept any text, whatever their encoding."""

import codecs
import io
import os
import sys
from types import MappingProxyType
from typing import Final

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
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in lost), error.end


def accept_every_letter() -> None:
    """Replace characters that the encoding of a standard stream lacks, instead of raising.

    Symbols are replaced by their ASCII form and other characters by a question mark. A closed
    stream is replaced by one that writes nothing.
    """
    codecs.register_error("redefense", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="redefense")
