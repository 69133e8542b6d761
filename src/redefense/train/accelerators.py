"""Devices for which training time is predicted, with the peak figures of their data sheets."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch

from redefense.runtime.device import name_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """Peak and typical performance of one device.

    Attributes:
        half: peak FLOP/s of dense products in bfloat16.
        single: peak FLOP/s of convolutions on single-precision tensors, as torch runs them by
            default.
        bandwidth: peak bytes/s of its memory.
        memory: bytes.
        link: bytes/s to another device, one way.
        reach: fraction of the peak FLOP/s that convolutions reach.
        stream: fraction of the bandwidth that element-wise operations reach.
        launch: minimum seconds of an operation, on the device or its host.
        replayed: minimum seconds of an operation in a replayed recording; None without replay.
        source: where the peak figures are from.
        called: the device name that torch reports.
    """

    half: float
    single: float
    bandwidth: float
    memory: float
    link: float
    reach: float
    stream: float
    launch: float
    source: str
    called: str = ""
    replayed: float | None = None

    def seconds(self, *, half: bool, flops: float, moved: float, replayed: bool = False) -> float:
        """Seconds of one operation: the maximum of its arithmetic, memory traffic and launch."""
        start = self.replayed if replayed and self.replayed is not None else self.launch
        peak = self.half if half else self.single
        arithmetic = flops / (peak * self.reach)
        return max(arithmetic, moved / (self.bandwidth * self.stream), start)


LAUNCH: Final = 35e-6
"""Seconds in which a host launches an operation of a training step, whatever the GPU.

Measured on the hosts of two H100 (virtual machines, one thread, torch 2.11): 28 to 44 us and 34 to
55 us an operation, steps of ResNet-8, 20 and 18 with three and eight members; see docs/gpus.md.
"""

REPLAYED: Final = 4e-6
"""Minimum seconds of an operation of a CUDA graph.

Fitted to two timings on an H100: ten sign-gradient steps against the average of ResNet-8, three and
eight members, took 0.013 and 0.035 s as a graph; see docs/gpus.md. No whole step was timed.
"""

ACCELERATORS: Final[Mapping[str, Accelerator]] = MappingProxyType(
    {
        "h100-sxm": Accelerator(
            half=989e12, single=494e12, bandwidth=3.35e12, memory=80e9, link=450e9,
            reach=0.4, stream=0.8, launch=LAUNCH, replayed=REPLAYED,
            source="NVIDIA H100 data sheet: bfloat16 and TF32 without sparsity, NVLink 900 GB/s",
            called="NVIDIA H100 80GB HBM3",
        ),
        "a100-sxm": Accelerator(
            half=312e12, single=156e12, bandwidth=2.04e12, memory=80e9, link=300e9,
            reach=0.5, stream=0.8, launch=LAUNCH, replayed=REPLAYED,
            source="NVIDIA A100 80 GB data sheet: bfloat16 and TF32, NVLink 600 GB/s",
            called="NVIDIA A100-SXM4-80GB",
        ),
        "rtx-4090": Accelerator(
            half=165e12, single=82.6e12, bandwidth=1.01e12, memory=24e9, link=32e9,
            reach=0.5, stream=0.8, launch=LAUNCH, replayed=REPLAYED,
            source="NVIDIA Ada whitepaper: bfloat16 with fp32 sums and TF32; PCIe 4.0 x16",
            called="NVIDIA GeForce RTX 4090",
        ),
        "cpu-2-cores-avx512": Accelerator(
            half=768e9, single=384e9, bandwidth=40e9, memory=16e9, link=1e9,
            # fitted to 18 steps of `redefense bench train`: ResNet-8, 20 and 18, within 19 %
            reach=0.8, stream=0.7, launch=4e-5,
            source="two cores, two 512-bit multiply-add units each, 3 GHz; bfloat16 dot products",
        ),
    }
)  # fmt: skip


def cores(count: int) -> Accelerator:
    """A CPU of as many cores as threads in use, each half of the two cores in the table."""
    two = ACCELERATORS["cpu-2-cores-avx512"]
    share = count / 2  # the size of the memory does not depend on it
    return replace(
        two, half=two.half * share, single=two.single * share, bandwidth=two.bandwidth * share
    )


def known(device: torch.device) -> Accelerator | None:
    """The entry of a device; for a CPU scaled to the threads in use."""
    # torch uses the cores that it has threads for, however many there are
    if device.type == "cpu":
        return cores(torch.get_num_threads())
    return next((at for at in ACCELERATORS.values() if at.called == name_of(device)), None)
