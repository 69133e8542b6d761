"""The command line as a shell would call it, in this process."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from redefense import cli


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


def command(*words: object) -> Result:
    """Run `redefense WORDS...`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["redefense", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return Result(int(end.value.code or 0), out.getvalue(), err.getvalue())
