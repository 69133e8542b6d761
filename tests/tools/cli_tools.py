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


def exit_code(*words: object) -> int:
    """The exit code of `redefense WORDS...`, which writes to the standard streams as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["redefense", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)


def command(*words: object) -> Result:
    """Run `redefense WORDS...`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(*words)
    return Result(code, out.getvalue(), err.getvalue())
