"""Files are written whole or not at all, whatever the disk says."""

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from redefense.errors import WriteError
from redefense.evaluation.store import write_arrays
from redefense.runtime.files import append_line, locked, write_bytes, write_text, written_aside

LONG = "x" * 5000


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk on which no file may grow beyond `size` bytes: writes fail as on a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, LONG),
    "bytes": lambda path: write_bytes(path, LONG.encode()),
    "arrays": lambda path: write_arrays(
        path, {"a": np.random.default_rng(0).random(2000), "b": np.zeros(3)}
    ),
    "line": lambda path: append_line(path, LONG),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("size", [0, 1, 3000])
def test_without_room_the_file_is_named_and_the_folder_stays_as_it_was(
    tmp_path: Path, write: Callable[[Path], object], size: int
) -> None:
    path = tmp_path / "results.json"
    path.write_text("before\n")
    with room_for(size), pytest.raises(WriteError, match=r"results\.json: .*free some space") as e:
        write(path)
    assert e.value.code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert path.read_text() == "before\n"
    write(path)
    assert path.stat().st_size > 3000


def test_a_line_that_fits_is_appended_and_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for line in ("a", "\u00fc", "c"):
        append_line(path, line)
    assert path.read_text(encoding="utf-8") == "a\n\u00fc\nc\n"


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_text(path, "\u00fc")
    assert path.read_bytes() == "\u00fc".encode()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_leaves_nothing_and_says_why(tmp_path: Path, number: int) -> None:
    path = tmp_path / "page.html"

    def fail() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(WriteError, match=f"page.html: {os.strerror(number)}; ") as caught:
        fail()
    assert caught.value.code == (1 if number in (errno.ENOSPC, errno.EDQUOT) else 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(WriteError, match=r"cannot write .*page\.html: Is a directory"):
        write_text(tmp_path / "page.html", LONG)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"):
        write_text(tmp_path / "file" / "page.html", LONG)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "page.html"]


def test_text_that_came_from_a_path_in_another_encoding_is_written_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_text(path, os.fsdecode(b"run \xff"))
    assert path.read_text(encoding="utf-8") == "run \ufffd"
    write_text(path, "r\u00fcn".encode().decode("ascii", "surrogateescape"))  # read where LANG=C
    assert path.read_text(encoding="utf-8") == "r\u00fcn"


def test_a_lock_has_one_holder_at_a_time_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    for _ in range(2):  # it can be taken again
        with locked(path, wait=False) as free:
            assert free
            with locked(path, wait=False) as again:
                assert not again
            with locked(path, wait=False) as again:  # whoever was refused took nothing away
                assert not again
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "kept").touch()
    with locked(path, wait=False):
        pass
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["kept"]


def test_a_lock_is_freed_by_a_kill_and_waited_for(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    script = (
        "import pathlib, sys, time\nfrom redefense.runtime.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), wait=False):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with locked(path, wait=False) as free:
            assert not free
        threading.Timer(0.2, holder.kill).start()
        with locked(path, wait=True) as free:
            assert free
        assert holder.wait() < 0
