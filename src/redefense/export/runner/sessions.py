"""Members of a bundle in onnxruntime: logits, draws, and agreement with stored logits."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.export.runner.errors import BundleError, Floats

# From 1.29 on onnxruntime reports to its makers how often each session ran and how long it took,
# and a session is a member. It reads this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

TOLERANCE = {"fp32": 1e-4, "int8": 0.3}
"""Most that a member may deviate from the probes' logits: the root mean square of the differences,
as a share of that of the logits."""
MASKED = -1e4
"""What stands for a logit of -inf; lower where others are."""
AGREEMENT = {"fp32": 0.98, "int8": 0.85}
"""Least share of probes on which a member names the class that its logits name."""


def open_session(model: bytes, *, threads: int = 0) -> Any:
    """A session of onnxruntime on the CPU.

    Raises:
        BundleError: if onnxruntime refuses the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise BundleError("members need onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its exceptions share no narrower class
        raise BundleError(f"onnxruntime refuses the member: {error}") from None


def logits_of(session: Any, images: Floats) -> Floats:
    """(B, classes) logits of one member, finite for classes that it masks with -inf."""
    (logits,) = session.run(["logits"], {"images": np.ascontiguousarray(images, np.float32)})
    logits = np.asarray(logits, np.float32)
    masked = np.isneginf(logits)
    if not masked.any() or logits.ndim != 2:
        return logits
    # what masks a row altogether is no answer, and stays so
    masked &= np.isfinite(logits).any(1, keepdims=True)
    lowest = np.where(masked, np.inf, logits).min(1, keepdims=True)
    return np.where(masked, np.minimum(2 * lowest, MASKED), logits).astype(np.float32)


def need_numbers(logits: Floats, word: str) -> None:
    """Refuse an answer that is not a number: `argmax` would name a class all the same.

    Raises:
        BundleError: naming the image by `word`.
    """
    if not np.isfinite(logits).all():
        raise BundleError(f"{word}: the answer of the member is not a number")


def draw_members(mixture: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """(count,) members drawn with probabilities `mixture` (M,) from the operating system's entropy.

    By rejection where the mixture is uniform, so that no member is favoured by even one part in
    2**63; otherwise by comparing 53 random bits with the mixture's sums.
    """
    probs = np.asarray(mixture, np.float64)
    if not (probs == probs[0]).all():
        edges = probs.cumsum()
        uniform = (_entropy(count) >> np.uint64(11)) * 2.0**-53
        drawn = np.searchsorted(edges, uniform * edges[-1], side="right")
        return np.asarray(drawn, np.int64)
    largest = np.uint64(2**64 // len(probs) * len(probs) - 1)
    kept = np.empty(0, np.uint64)
    while len(kept) < count:
        raw = _entropy(count - len(kept))
        kept = np.concatenate([kept, raw[raw <= largest]])
    return np.asarray(kept % np.uint64(len(probs)), np.int64)


def _entropy(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), np.uint64)


def classify(sessions: Sequence[Any], images: Floats, drawn: NDArray[np.int64]) -> Floats:
    """(B, classes) logits where member drawn[b] answers image b: the work of one member."""
    rows = [np.flatnonzero(drawn == m) for m in range(len(sessions))]
    parts = [
        logits_of(session, images[own])
        for session, own in zip(sessions, rows, strict=True)
        if len(own)
    ]
    order = np.concatenate(rows)
    return np.concatenate(parts)[order.argsort()]


def deviation(found: Floats, stored: Floats) -> tuple[float, float]:
    """How far logits are from stored ones (see `TOLERANCE`), and on which share classes agree."""
    masked = (found <= MASKED) & (stored <= MASKED)  # large, they would hide what differs elsewhere
    gap, size = (np.where(masked, 0, part).astype(np.float64) for part in (found - stored, stored))
    same = float((found.argmax(-1) == stored.argmax(-1)).mean())
    return float(np.linalg.norm(gap)) / max(float(np.linalg.norm(size)), 1e-12), same


def differs(found: Floats, stored: Floats, precision: str) -> str:
    """In which respect logits are not the stored ones; empty if they are, up to the tolerance."""
    off, same = deviation(found, stored)
    most, least = TOLERANCE[precision], AGREEMENT[precision]
    if off <= most and same >= least:
        return ""
    return (
        f"deviates by {off:.2g} of its logits' size ({most:g} allowed) and names the same class on "
        f"{100 * same:.1f} % ({100 * least:g} % needed)"
    )
