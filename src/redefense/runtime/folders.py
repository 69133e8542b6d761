"""Names of the files and folders of a run, which users and scripts rely on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

LOCK: Final = ".lock"
"""File that a process holds a lock on while it writes to a folder."""

RUN: Final = "run.json"
"""All settings, in a run and in each of its checkpoints."""
METRICS: Final = "metrics.jsonl"
"""The log of the training, a line for each epoch."""
CHECKPOINTS: Final = "checkpoints"
FINAL: Final = "final"
"""Folder of the trained weights, a checkpoint without the optimizer's state."""
WEIGHTS: Final = "weights.safetensors"
STATE: Final = "state.json"
MANIFEST: Final = "manifest.json"
"""Hashes of a checkpoint's other files, written last."""

EVALUATION: Final = "evaluation"
"""Folder of the evaluations, each a JSON file with a folder of its records beside it."""
PLAN: Final = "plan.json"
"""Settings of an evaluation, in the folder of its records."""
BASELINES: Final = "baselines.npz"
"""Records of the single members and of the average, there too."""
CERTIFICATES: Final = "certificates"


def evaluation_files(home: Path) -> Iterable[Path]:
    """The JSON files of the evaluations in a folder, in the order of their names."""
    # hidden files are incomplete ones, see `files.UNFINISHED`, or those of a file manager
    return sorted((home / EVALUATION).glob("[!.]*.json"))
