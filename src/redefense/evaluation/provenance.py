"""Provenance of an evaluation: versions, commit, machine, seed and date."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

import redefense
from redefense.runtime.device import name_of

_CPU: Final = torch.device("cpu")
_PACKAGE: Final = Path(redefense.__file__).resolve().parent
_MAKERS: Final = (
    "attacks/*.py", "models/*.py", "ensembles/*.py", "networks.py", "penalties.py", "rng.py",
    "threat.py", "types.py", "runtime/device.py", "runtime/spread.py", "runtime/workers.py",
    "results/accuracy.py", "results/intervals.py", "stochastic/*.py",
    "evaluation/cascade/*.py", "evaluation/inputs/precision.py",
    "evaluation/stochastic/*.py",
    *(f"evaluation/{name}.py" for name in (
        "baselines", "budget_check", "cells", "member_statistics", "pass_counter", "plan",
        "store", "suite",
    )),
)  # fmt: skip
"""The modules that decide what an evaluation keeps on its way."""


def provenance(seed: int, device: torch.device = _CPU) -> dict[str, Any]:
    """Where a number comes from: versions, commit, machine (its accelerator too), seed, date.

    To be asked before the work: while it is done others may commit.
    """
    return {
        "version": redefense.__version__,
        "commit": _commit(),
        **place_of(device),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def place_of(device: torch.device) -> dict[str, str]:
    """Where this process computes: its torch, and its machine."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    accelerator = "" if device.type == "cpu" else f", {name_of(device)}"
    return {
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores, {threads} threads, "
        f"Python {platform.python_version()}{accelerator}",
    }


def joined(places: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Where something was computed that one place began and others went on with."""
    if len(places) == 1:
        return dict(places[0])
    return {
        "torch": "; ".join(dict.fromkeys(place["torch"] for place in places)),
        "machine": "; ".join(f"{place['machine']}, torch {place['torch']}" for place in places),
    }


UNKNOWN: Final = {"torch": "not recorded", "machine": "not recorded"}
"""Where something was begun before places were written down."""


def code() -> str:
    """SHA-256 of the code that decides what is kept of an attack; versions do not tell it apart.

    What is read is on disk, so ask before the work: files may change while it is done.
    """
    digest = hashlib.sha256()
    for place in sorted(found for pattern in _MAKERS for found in _PACKAGE.glob(pattern)):
        source = place.read_bytes()
        digest.update(f"{place.relative_to(_PACKAGE).as_posix()} {len(source)} ".encode() + source)
    return digest.hexdigest()


def _commit() -> str:
    """Commit of the checkout that this package is run from; empty for an installed one.

    It ends in "-dirty" if the package, whatever is beside it, is not that of the commit.
    """
    # a package installed below somebody's checkout is none of its files
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    commit = _git("rev-parse", "--verify", "HEAD")
    changed = _git("status", "--porcelain", "--", ".")
    return "" if commit is None else commit + "-dirty" * (changed != "")


def _git(*words: str) -> str | None:
    """What git says in the package's folder; None where it has nothing to say."""
    command = ["git", "--no-optional-locks", "-C", str(_PACKAGE), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
