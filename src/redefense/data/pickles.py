"""Reads CIFAR's python batches without executing pickled code."""

import pickle
import pickletools
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.errors import DataError, one_line


class Dtype:
    """Replacement of numpy's dtype in a pickle: holds its code only."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """The byte order of single bytes does not matter."""


class Bytes:
    """Replacement of a numpy array in a pickle; accepts arrays of unsigned bytes only."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        """The array.

        Raises:
            ValueError: if the state is not that of an array of unsigned bytes in C order.
        """
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, Dtype) or dtype.code not in ("u1", b"u1") or fortran:
            raise ValueError("not an array of unsigned bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape)


# Python 3 writes bytes as latin-1 text in the old protocols
def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): Bytes,
    # as numpy 2 names it
    ("numpy._core.multiarray", "_reconstruct"): Bytes,
    ("numpy", "ndarray"): Bytes,
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): _encode,
}
"""The only names that a batch may import, with their harmless replacements."""


REFUSED = (
    "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4",
    "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX",
)  # fmt: skip
"""Opcodes that no batch needs."""


def _check_steps(raw: bytes) -> None:
    """Check the opcodes of a pickle without executing it.

    Raises:
        pickle.UnpicklingError: for opcodes that no batch needs or that exhaust the memory.
    """
    for step, argument, _ in pickletools.genops(raw):
        if step.name in REFUSED:
            raise pickle.UnpicklingError(f"contains the opcode {step.name}")
        # the unpickler's memo table is as long as its largest index
        if step.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(raw):
            raise pickle.UnpicklingError("expands to more memory than is allowed")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"tries to import {module}.{name}")
        return ALLOWED[module, name]


def load(raw: bytes, where: str) -> dict[str, Any]:
    """A pickled dictionary of strings, numbers, bytes, lists and arrays of bytes.

    Raises:
        DataError: naming the file, if it is damaged or imports anything.
    """
    try:
        _check_steps(raw)
        # the batches were written by Python 2, whose strings are bytes
        found = _Reader(BytesIO(raw), encoding="bytes").load()
        return {_text(key): _value(value) for key, value in found.items()}
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{where}: refused as unsafe or damaged: the pickle {one_line(error)}"
        ) from error
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise DataError(f"{where}: damaged pickle ({one_line(error)})") from error


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _value(value: Any) -> Any:
    return value.array() if isinstance(value, Bytes) else value
