"""Logging of a training: `metrics.jsonl` and TensorBoard."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redefense.runtime.files import append_line, write_text
from redefense.runtime.folders import METRICS


class Metrics:
    """Appends to `metrics.jsonl`, and to TensorBoard if it is installed."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self.path = folder / METRICS
        kept: list[str] = []
        if resume_step and self.path.exists():
            # lines after the resumed checkpoint will be written again
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line)
                except ValueError:  # truncated by a killed process
                    break
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # its records after the resumed checkpoint will be written again, too
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one record."""
        append_line(self.path, json.dumps({"step": step, **values}))
        if self._board is not None:
            for key, value in values.items():
                # names, and lists with a value for each member, are in the file alone
                if isinstance(value, float):
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
