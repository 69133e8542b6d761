"""Standard streams take every text: an ASCII terminal, a closed stream, a full disk."""

import io
import os
import sys
from pathlib import Path

import pytest

import redefense
from cli_tools import exit_code
from redefense.commands.streams import accept_every_letter
from report_tools import build_run


def stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def written(file: io.TextIOWrapper) -> bytes:
    buffer = file.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["report", "r\u00fcn"], 0),
        (["audit", "r\u00fcn"], 1),
        (["card", "r\u00fcn"], 0),
        (["audit", "\u4e2d\u6587.csv"], 3),
        (["evaluate", "n\u00f6 \u2212"], 3),
        (["show", os.fsdecode(b"not utf-8 \xff")], 2),
        (["list", "attacks"], 0),
        (["list", "\u00fcbel"], 2),
        (["data", "check", "folder:\u00fc"], 3),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_no_encoding_of_the_terminal_is_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    encoding: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    build_run(tmp_path / "r\u00fcn")
    out, err = stream(encoding), stream(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert exit_code(*words) == code
    assert b"Traceback" not in written(err)
    # click takes a stream that claims ASCII for one that was not set up, and writes UTF-8 there
    known = "utf-8" if encoding == "ascii" else encoding
    assert (written(out) + written(err)).decode(known)


def test_signs_keep_their_meaning_where_letters_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    out = stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    accept_every_letter()
    out.write("\u22123.2\u00a0% \u00b1 1, eps \u2264 8, r\u00fcn")
    assert written(out) == b"-3.2 % +- 1, eps <= 8, r?n"


def test_closed_streams_take_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert exit_code("list", "attacks") == 0
    assert exit_code("list", "nothing") == 2
    for name in ("stdout", "stderr"):
        getattr(sys, name).close()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_stops_changes_no_exit_code(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    table = Path(redefense.__file__).parent / "audit" / "examples" / "red_table1.csv"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, name, pipe)
        monkeypatch.setattr(sys, f"__{name}__", pipe)
        assert exit_code("audit", table) == 1
        assert exit_code("list", "attacks") == 0
        assert exit_code("list", "nothing") == 2
