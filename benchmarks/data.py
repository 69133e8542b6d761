"""How fast data are loaded and augmented, and how much memory a large set takes.

python benchmarks/data.py --cifar10 PATH --tiny-imagenet PATH --large 1000000

Every load runs in a process of its own. Figures are printed as JSON; they depend on the machine,
so only those of one run should be compared.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from redefense.data import Loader, Split, cache, load_dataset
from redefense.data.source import Block, Part, Source
from redefense.rng import stream

Figures = dict[str, Any]


def in_own_process(work: Callable[..., Figures], *args: object) -> Figures:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def memory(field: str) -> float:
    """A figure of this process in MB, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise KeyError(field)


class Peak:
    """The largest anonymous memory seen every 20 ms: what the kernel cannot drop and read again."""

    def __init__(self) -> None:
        self.anonymous, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.anonymous = max(self.anonymous, memory("RssAnon"))

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def load_once(spec: str, folder: Path) -> Figures:
    started = time.perf_counter()
    found = load_dataset(spec, cache=folder)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "images": len(found.train) + len(found.test)}


def loads(spec: str) -> Figures:
    """One cold load and the median of five warm ones."""
    with tempfile.TemporaryDirectory() as folder:
        cold = in_own_process(load_once, spec, Path(folder))
        warm = [in_own_process(load_once, spec, Path(folder))["seconds"] for _ in range(5)]
    return {"images": cold["images"], "cold_s": cold["seconds"], "warm_s": statistics.median(warm)}


def augment_by_pil(images: np.ndarray, labels: np.ndarray, batch: int) -> Iterator[torch.Tensor]:
    """Batches as the usual loop over single images makes them: crop, flip, to tensor, stack."""
    rng = Random(0)
    order = list(range(len(images)))
    rng.shuffle(order)
    for start in range(0, len(order), batch):
        tensors = []
        for index in order[start : start + batch]:
            image = Image.fromarray(images[index])
            padded = Image.new("RGB", (40, 40))
            padded.paste(image, (4, 4))
            left, top = rng.randrange(9), rng.randrange(9)
            image = padded.crop((left, top, left + 32, top + 32))
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            tensors.append(pixels.to(torch.float32).div(255))
        yield torch.stack(tensors)


def throughput(count: int = 20_000, trials: int = 5) -> Figures:
    """Images augmented in a second at 3x32x32 and batch 128, one thread, best of some trials."""
    images = torch.randint(256, (count, 3, 32, 32), generator=stream(0, "bench"), dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.int64)
    loader = Loader(Split(images, labels), batch_size=128, seed=0, augment=True)
    pictures = images.permute(0, 2, 3, 1).contiguous().numpy()

    def rate(batches: Callable[[], Iterator[object]]) -> float:
        best = 0.0
        for _ in range(trials):
            started = time.perf_counter()
            for _batch in batches():
                pass
            best = max(best, count / (time.perf_counter() - started))
        return best

    ours = rate(lambda: loader.epoch(0))
    theirs = rate(lambda: augment_by_pil(pictures, labels.numpy(), 128))
    return {
        "images_per_s": round(ours),
        "pil_loop_images_per_s": round(theirs),
        "ratio": round(ours / theirs, 1),
    }


def synthetic(count: int) -> Source:
    """Images that follow from their number; made a block at a time."""

    def part(images: int) -> Part:
        def blocks() -> Iterator[Block]:
            base = np.random.default_rng(0).integers(0, 256, (1024, 3, 32, 32), dtype=np.uint8)
            for start in range(0, images, 1024):
                yield base[: min(1024, images - start)] ^ np.uint8(start // 1024 % 256)

        return Part(labels=np.arange(images, dtype=np.int64) % 1000, blocks=blocks)

    return Source(
        name="synthetic",
        classes=tuple(str(number) for number in range(1000)),
        shape=(3, 32, 32),
        train=part(count),
        test=part(10_000),
        found="made up",
    )


def write_large(count: int, folder: Path) -> Figures:
    base = memory("RssAnon")
    started = time.perf_counter()
    with Peak() as peak:
        cache.store(folder, synthetic(count), lambda _: None)
    return {
        "write_s": round(time.perf_counter() - started, 1),
        "write_peak_MB": round(peak.anonymous - base, 1),
        "size_MB": round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6),
    }


def read_large(folder: Path, steps: int) -> Figures:
    """Open the set and train on nothing for some steps of 256 images drawn from all of it."""
    base = memory("RssAnon")
    started = time.perf_counter()
    with Peak() as peak:
        found = cache.load(folder)
        assert found is not None
        opened = time.perf_counter() - started
        loader = Loader(found.train, batch_size=256, seed=0, augment=True)
        batches = loader.epoch(0)
        started = time.perf_counter()
        for _ in range(steps):
            next(batches)
        seconds = time.perf_counter() - started
    return {
        "open_s": round(opened, 2),
        "images_per_s": round(256 * steps / seconds),
        "read_peak_MB": round(peak.anonymous - base, 1),
        "mapped_MB": memory("RssFile"),
    }


def large(count: int) -> Figures:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "entry"
        written = in_own_process(write_large, count, folder)
        steps = min(2000, count // 256)
        return {"images": count} | written | in_own_process(read_large, folder, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cifar10", help="path of CIFAR-10 in any layout")
    parser.add_argument("--tiny-imagenet", help="path of TinyImageNet in any layout")
    parser.add_argument("--large", type=int, default=0, help="images of a synthetic large set")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures: Figures = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
    }
    if chosen.cifar10:
        figures["cifar10"] = loads(f"cifar10:{chosen.cifar10}")
    if chosen.tiny_imagenet:
        figures["tiny_imagenet"] = loads(f"tiny-imagenet:{chosen.tiny_imagenet}")
    figures["augmentation"] = throughput()
    if chosen.large:
        figures["large"] = large(chosen.large)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
