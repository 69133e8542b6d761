"""Members of a compact bundle: kernels of the hypernetwork, appended to an ONNX template."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from redefense.export.runner.errors import BundleError, Floats

GRID = ("rows", "columns", "size")
TAPS: dict[str, tuple[Callable[..., Any], float]] = {
    # how nine taps become one, and the mean square of the result for standard normal taps
    "mean": (np.mean, 1 / 9),
    "max": (np.max, 1.485013**2 + 0.357353),
    "sum": (np.sum, 9.0),
}


def written(weights: dict[str, Floats], compact: dict[str, Any], m: int) -> dict[str, Floats]:
    """All tensors of member m: those that are stored, and the kernels its hypernetwork writes.

    Two linear layers turn each embedding z into a unit of n x n x 3 x 3; a kernel is a grid of
    units, in the order of reading, scaled to the variance that He's rule gives its layer.
    """
    own, writer = f"members.{m}.", f"writers.{0 if compact['shared'] else m}."
    tensors = {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}
    try:
        z = weights[f"embeddings.{m}"]
        first, first_bias = weights[writer + "first.weight"], weights[writer + "first.bias"]
        second, second_bias = weights[writer + "second.weight"], weights[writer + "second.bias"]
        n = int(compact["unit"])
        inner = (z @ first.T + first_bias).reshape(len(z), n, second.shape[1])
        units = (inner @ second.T + second_bias).reshape(len(z), n, n, 3, 3)
        start = 0
        for grid in compact["grids"]:
            rows, columns, size = (int(grid[key]) for key in GRID)
            blocks = units[start : start + rows * columns].reshape(rows, columns, n, n, 3, 3)
            kernel = blocks.transpose(0, 2, 1, 3, 4, 5).reshape(rows * n, columns * n, 3, 3)
            start, mean_square = start + rows * columns, 1.0
            if size == 1:
                reduce, mean_square = TAPS[compact["taps"]]
                kernel = reduce(kernel, axis=(2, 3), keepdims=True)
            scale = math.sqrt(2 / (size**2 * columns * n) / mean_square)
            tensors[grid["name"] + ".weight"] = (kernel * scale).astype(np.float32)
    except (KeyError, ValueError) as error:
        raise BundleError(f"the stored weights do not fit config.json: {error}") from None
    return tensors


def initialisers(tensors: dict[str, Floats]) -> bytes:
    """A piece of ONNX that adds weights to the graph of the file it is appended to.

    Protocol buffers merge messages that follow each other, so a template and this piece are one
    model; no package for ONNX is needed to write it.
    """
    pieces = []
    for name, array in tensors.items():
        dims = b"".join(b"\x08" + _varint(n) for n in array.shape)  # TensorProto.dims = 1
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        tensor = dims + b"\x10\x01" + _field(8, name.encode()) + _field(9, raw)  # FLOAT, name, data
        pieces.append(_field(5, tensor))  # GraphProto.initializer
    return _field(7, b"".join(pieces))  # ModelProto.graph


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload
