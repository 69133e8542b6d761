"""Devices: their names, whether they are there, and settings for computing on them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from redefense.errors import ConfigError


def name_of(device: torch.device) -> str:
    """What the accelerator is called; the kind of device where torch does not say."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def computing() -> Iterator[None]:
    """Flushes denormal numbers, and lets cuDNN give the same bits each time.

    On a CPU denormal numbers cost tens of times the time of others. On a GPU, left alone, cuDNN may
    add up weights' gradients in any order: two trainings of one seed differed, and a resumed one
    would differ from one that was never stopped. That setting is the whole process's, not the
    thread's.
    """
    cudnn = torch.backends.cudnn
    before = not bool(torch.tensor(1e-40) * 1.0), cudnn.deterministic
    torch.set_flush_denormal(True)
    cudnn.deterministic = True
    try:
        # test loops of other libraries run in inference mode, where nothing has a gradient
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_flush_denormal(before[0])
        cudnn.deterministic = before[1]


def check_device(device: str) -> torch.device:
    """The device of that name; refused if it is unknown or not there, before anything is done.

    Raises:
        ConfigError: naming the device.
    """
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise ConfigError(f"cannot use device {device!r}: it holds no numbers")
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from None
    return place
