"""Devices: their names, availability and settings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from redefense.errors import ConfigError, first_line


def name_of(device: torch.device) -> str:
    """Name of the accelerator; the device type where torch reports none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def computing() -> Iterator[None]:
    """Flushes denormal numbers, and makes cuDNN deterministic, in the whole process."""
    cudnn = torch.backends.cudnn
    # torch has no getter for flushing: the product with a denormal number tells
    before = not bool(torch.tensor(1e-40) * 1.0), cudnn.deterministic
    # on a CPU denormal numbers are tens of times slower than others
    torch.set_flush_denormal(True)
    # otherwise cuDNN may sum weight gradients in any order: two trainings with one seed differ, and
    # a resumed one differs from an uninterrupted one
    cudnn.deterministic = True
    try:
        # test loops of other libraries run in inference mode, which has no gradients
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_flush_denormal(before[0])
        cudnn.deterministic = before[1]


def check_device(device: str) -> torch.device:
    """The device of that name, checked to be available.

    Raises:
        ConfigError: naming the device.
    """
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise ConfigError(f"cannot use device {device!r}: it holds no numbers")
        # a well-formed name may be of a device that is absent or fails: only an allocation tells
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"cannot use device {device!r}: {first_line(error)}") from None
    return place
