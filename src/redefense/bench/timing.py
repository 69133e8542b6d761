"""Shared by the benchmarks: a clock that waits for the device, and a record of the machine."""

import time
from collections.abc import Callable
from typing import Any

import torch

from redefense.runtime.device import name_of


def seconds(take: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, the mean over `repeats`, all work on the device included."""
    _wait(device)
    # not with the work that was queued before
    begun = time.perf_counter()
    for _ in range(repeats):
        take()
    _wait(device)
    return (time.perf_counter() - begun) / repeats


def machine(device: str) -> dict[str, Any]:
    """Machine and versions that figures depend on."""
    place = torch.device(device)
    named = {} if place.type == "cpu" else {"accelerator": name_of(place)}
    threads = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"device": device, **named, **threads}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
