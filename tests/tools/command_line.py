"""The command line, called in this process."""

import contextlib
import io
import sys
from typing import NamedTuple

import pytest

from redefense import cli


class Called(NamedTuple):
    code: int
    out: str
    err: str


def call(*words: object) -> Called:
    """Exit code and streams of `redefense WORDS`."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["redefense", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    code = end.value.code
    return Called(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())
