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
    "evaluation/stochastic/*.py", "checks/*.py",
    *(f"evaluation/{name}.py" for name in (
        "baselines", "budget_check", "cells", "full_checks", "member_statistics",
        "pass_counter", "plan", "run", "store", "suite",
    )),
)  # fmt: skip
"""The modules that determine the saved intermediate results of an evaluation."""


def provenance(seed: int, device: torch.device = _CPU) -> dict[str, Any]:
    """Versions, commit, machine with its accelerator, seed and date.

    Call it before the work: the commit may change during it.
    """
    return {
        "version": redefense.__version__,
        "commit": _commit(),
        **place_of(device),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def place_of(device: torch.device) -> dict[str, str]:
    """The torch version and the machine of this process."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    accelerator = "" if device.type == "cpu" else f", {name_of(device)}"
    return {
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores, {threads} threads, "
        f"Python {platform.python_version()}{accelerator}",
    }


def joined(places: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The machines of an evaluation that was begun on one and resumed on others."""
    if len(places) == 1:
        return dict(places[0])
    return {
        "torch": "; ".join(dict.fromkeys(place["torch"] for place in places)),
        "machine": "; ".join(f"{place['machine']}, torch {place['torch']}" for place in places),
    }


UNKNOWN: Final = {"torch": "not recorded", "machine": "not recorded"}
"""The machine of evaluations begun before machines were recorded."""


def code() -> str:
    """SHA-256 of the code that determines an attack's records; finer than the version.

    The files are read from disk, so call it before the work: they may change during it.
    """
    digest = hashlib.sha256()
    for place in sorted(found for pattern in _MAKERS for found in _PACKAGE.glob(pattern)):
        # names and lengths too, so that code moved between files gives another digest
        source = place.read_bytes()
        digest.update(f"{place.relative_to(_PACKAGE).as_posix()} {len(source)} ".encode() + source)
    return digest.hexdigest()


def _commit() -> str:
    """Commit of the checkout that contains this package; empty for an installed package.

    It ends in "-dirty" if the package's files differ from the commit; other files do not count.
    """
    # a package installed inside another project's checkout is not part of it
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    commit = _git("rev-parse", "--verify", "HEAD")
    changed = _git("status", "--porcelain", "--", ".")
    return "" if commit is None else commit + "-dirty" * (changed != "")


def _git(*words: str) -> str | None:
    """Output of git in the package's folder; None if git fails."""
    # several jobs may ask at once, and none may hold a lock that disturbs the user
    command = ["git", "--no-optional-locks", "-C", str(_PACKAGE), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
