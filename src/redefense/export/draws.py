"""Tests that members are drawn with the stated probabilities and unpredictably."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

NUM_DRAWS = 20_000
ALARM = 1e-6
"""False positive rate of each of the two tests."""

Draw = Callable[[NDArray[np.float64], int], NDArray[np.int64]]

# seeds all global generators, then draws 64 of 2**16 members with the program on standard input
_SEEDED = """
import random, sys, types
import numpy
random.seed(0); numpy.random.seed(0)
module = sys.modules["run"] = types.ModuleType("run")
exec(compile(sys.stdin.read(), "run.py", "exec"), module.__dict__)
random.seed(0); numpy.random.seed(0)
print(module.draw_members(numpy.full(2**16, 2.0**-16), 64).tolist())
"""


def chi_square_p(counts: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    """P-value of Pearson's chi-square test of counts against `probs`.

    Cells with expectation below ten are merged; a count where the probability is 0 gives 0.
    """
    if (counts[probs == 0] > 0).any():
        return 0.0
    expected = probs * counts.sum()
    # below ten the chi-square distribution is a poor fit and its p-values mislead
    rare = expected < 10
    found, wanted = counts[~rare].astype(float), expected[~rare]
    if expected[rare].sum() >= 10:
        found = np.append(found, counts[rare].sum())
        wanted = np.append(wanted, expected[rare].sum())
    if len(found) < 2:
        return 1.0
    return float(chdtrc(len(found) - 1, ((found - wanted) ** 2 / wanted).sum()))


def draw_faults(draw: Draw, mixture: NDArray[np.float64]) -> list[str]:
    """Deviations of `draw` from independent draws with the probabilities `mixture`.

    Two tests: of members, and of pairs of neighbouring draws (members of one batch).
    """
    drawn = draw(mixture, NUM_DRAWS)
    size = len(mixture)
    if drawn.shape != (NUM_DRAWS,) or drawn.min() < 0 or drawn.max() >= size:
        return [f"{NUM_DRAWS} draws gave something else than members 0 to {size - 1}"]
    p = chi_square_p(np.bincount(drawn, minlength=size), mixture)
    if p < ALARM:
        return [f"members are not drawn by the mixture (chi-square p = {p:.1e})"]
    # disjoint pairs, since overlapping ones depend on each other
    pairs = np.bincount(drawn[::2] * size + drawn[1::2], minlength=size**2)
    p = chi_square_p(pairs, np.outer(mixture, mixture).ravel())
    if p < ALARM:
        return [f"neighbouring draws depend on each other (chi-square p = {p:.1e})"]
    return []


def seed_faults(program: str) -> list[str]:
    """Fault if two processes with equal seeds of all global generators draw equally.

    Args:
        program: text of a `run.py`, which is executed.
    """
    # -I: no file of the working folder can replace a module that run.py imports
    command = [sys.executable, "-I", "-c", _SEEDED]
    first, second = (
        subprocess.run(command, input=program, capture_output=True, check=True, text=True).stdout
        for _ in range(2)
    )
    return ["draws follow the seeds of global generators"] if first == second else []
