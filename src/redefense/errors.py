"""The exceptions of this package. The command line prints their line and exits with `code`.

RedefenseError
├── ConfigError      a setting, recipe or option is wrong                      exit 2
├── InputError       images, labels or arguments of a function are wrong       exit 2
│   └── ModelError   a network refuses images, its answers are no logits       exit 3
├── DataError        a data set or a run is missing, damaged or refused        exit 3
│   ├── CheckpointError  a checkpoint is missing, truncated or altered         exit 3
│   └── TableError       lines of a table cannot be read, one line for each    exit 3
├── WriteError       a file cannot be written: no room (exit 1), no permission exit 2
├── ResourceError    memory does not suffice                                   exit 1
└── TrainingError    training cannot go on (non-finite loss, no gradient)      exit 1
    └── Interrupted  stopped by a signal after saving                          exit 130 or 143
"""

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

# on a CPU torch raises a plain RuntimeError, which only these parts of its text distinguish
_NO_MEMORY: Final = ("not enough memory", "out of memory", "can't allocate memory")

BAD_JSON: Final = (OSError, ValueError, RecursionError)
"""Exceptions of a JSON file that cannot be read, is damaged, or is nested too deeply."""


def not_installed(what: str, package: str, extra: str) -> str:
    """Message for a package that is not installed, with the extra that installs it."""
    # from a clone, since redefense is on no package index and the name could be another's
    return f"{what} needs {package}; in the clone: pip install -c constraints.txt -e '.[{extra}]'"


def need(
    module: str,
    what: str = "this",
    *,
    extra: str = "onnx",
    error: "type[ConfigError] | type[DataError] | None" = None,
) -> Any:
    """The module of that name, of a package that an extra of redefense installs.

    Raises:
        ConfigError: if it is not installed, or the given `error`.
    """
    try:
        return import_module(module)
    except ImportError as missing:
        package = (missing.name or module).partition(".")[0]
        raise (error or ConfigError)(not_installed(what, package, extra)) from None


def text_of(error: BaseException) -> str:
    """The text of an error; empty if it cannot be computed."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - an error of somebody else's
        return ""


def first_line(error: BaseException) -> str:
    """The relevant line of an error's text; empty if it has none."""
    lines = text_of(error).strip().splitlines() or [""]
    # scripted networks have it in the last line
    return lines[-1 if "TorchScript" in lines[0] else 0].strip()


def one_line(error: BaseException) -> str:
    """The whole text of an error on one line; its type if it has none."""
    return " ".join(text_of(error).split()) or type(error).__name__


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch means that memory does not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(part in text_of(error) for part in _NO_MEMORY)


def suggestion(word: str, known: Sequence[str]) -> str:
    """A "did you mean" with the nearest known word; empty if none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def first_of(names: Sequence[str], shown: int = 3, count: int = 0) -> str:
    """The first of some names, and the number of the remaining ones, of at least `count`."""
    more = max(count, len(names)) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


class RedCheckWarning(UserWarning):
    """A self-check of an evaluation failed: read it before you quote a figure.

    Attributes:
        report: the complete `Report`, for use where warnings are raised as errors.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class RedefenseError(Exception):
    """Base class of all errors; `str()` is one line, except for `TableError`.

    Attributes:
        code: exit code of the command line.
        reported: whether another process of the same command prints it.
    """

    code = 2
    reported = False

    def __str__(self) -> str:
        # objects of users that a message names may have a repr of many lines, as tensors
        return " ".join(super().__str__().splitlines())


class ConfigError(RedefenseError, ValueError):
    """A setting has the wrong name, type or value."""


class InputError(RedefenseError, ValueError):
    """Images, labels or other arguments break the input contract."""


class ModelError(InputError):
    """A network cannot take the images, cannot be differentiated, or its answers are no logits."""

    code = 3


class DataError(RedefenseError):
    """A data set or stored file is missing, damaged or refused as unsafe."""

    code = 3


class CheckpointError(DataError):
    """A checkpoint is missing, truncated or altered."""


class TableError(DataError):
    """Several lines of a table cannot be read; the message names each in a line of its own."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class WriteError(RedefenseError, OSError):
    """A file cannot be written: the disk is full, or the place does not allow it."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.code = 1 if full else 2


class ResourceError(RedefenseError):
    """Not enough memory."""

    code = 1


class TrainingError(RedefenseError):
    """Training cannot continue: the message names stage and step."""

    code = 1


class Interrupted(RedefenseError):  # noqa: N818 - an interruption is not an error
    """Stopped by a signal, after saving."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number
