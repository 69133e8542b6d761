"""Profile of a training: seconds by phase, as a table and as `RUN/profile.json`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from redefense.runtime.files import write_json
from redefense.runtime.phases import OTHER, PHASES, watched
from redefense.runtime.progress import note


class Profile:
    """Accumulates the seconds of each phase on a device, excluding its inner phases."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._device, self._open = torch.device(device), [OTHER]
        self._since = time.perf_counter()

    def enter(self, name: str) -> None:
        """Enter a phase."""
        self.charge()
        self._open.append(name)

    def leave(self) -> None:
        """Leave the innermost phase."""
        self.charge()
        self._open.pop()

    def charge(self) -> None:
        """Add the time since the last call to the innermost phase."""
        # otherwise its work would be assigned to a later phase; training gets slightly slower
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        name = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def as_dict(self) -> dict[str, Any]:
        """Total `seconds`; for each phase its `seconds` and its `share` of them."""
        total = sum(self.seconds.values())
        phases = {
            name: {"seconds": seconds, "share": seconds / total if total else 0.0}
            for name, seconds in self.seconds.items()
        }
        return {"device": str(self._device), "seconds": total, "phases": phases}

    def table(self) -> str:
        """The same as text."""
        it = self.as_dict()
        rows = [
            f"{name:<22}{phase['seconds']:>10.2f} s{100 * phase['share']:>8.1f} %"
            for name, phase in it["phases"].items()
        ]
        return "\n".join([*rows, f"{'in all':<22}{it['seconds']:>10.2f} s{100:>8.1f} %"])


@contextmanager
def profiled(folder: Path, device: str | torch.device) -> Iterator[None]:
    """Profile the training within; then, even if interrupted, write and print the result.

    A resumed training is profiled from there on.
    """
    profile = Profile(device)
    try:
        with watched(profile):
            yield
    finally:
        profile.charge()  # the work outside all phases since the last one
        write_json(folder / "profile.json", profile.as_dict())
        note(profile.table())
