"""Quantises members to 8-bit weights and activations, and measures the accuracy."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redefense.data import Split
from redefense.errors import need
from redefense.export import runner
from redefense.export.graph import tidied
from redefense.types import Images, correct

BATCH = 64


# no generated comparison: == of tensors has no single truth value
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Int8:
    """Settings of quantisation.

    Attributes:
        calibration: training images for the ranges of activations (static); without them ranges are
            computed per batch (dynamic).
        validation: held-out images and labels on which accuracy is measured before and after.
    """

    calibration: Images | None = None
    validation: Split | None = None

    def record(self, before: Sequence[bytes], after: Sequence[bytes]) -> dict[str, Any]:
        """The bundle's record of its quantisation; accuracies are fractions, one per member."""
        images = 0 if self.calibration is None else len(self.calibration)
        record: dict[str, Any] = {
            "method": "static" if images else "dynamic",
            "calibration_images": images,
        }
        if self.validation is not None:
            record["accuracy"] = {
                "split": "validation",
                "num_images": len(self.validation),
                "fp32": accuracies(before, self.validation),
                "int8": accuracies(after, self.validation),
            }
        return record


def quantised(model: bytes, calibration: Images | None) -> bytes:
    """The 8-bit form of an fp32 member: signed weights per channel, unsigned activations.

    Static quantisation (QDQ) with calibration images, dynamic without.
    """
    onnx, _ = need("onnx"), need("onnxruntime.quantization")
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # within the function, since the base class needs onnxruntime
    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
        """Yields the calibration images in batches."""

        def __init__(self, images: Images) -> None:
            self.batches: Iterator[Images] = iter(images.float().cpu().split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    # onnxruntime's quantiser reads and writes files only
    with tempfile.TemporaryDirectory() as scratch:
        source, ready, target = (Path(scratch) / f"{name}.onnx" for name in ("a", "b", "c"))
        source.write_bytes(model)
        quant_pre_process(source, ready, skip_symbolic_shape=True)  # folds batch norms
        if calibration is None:
            quantize_dynamic(ready, target, weight_type=QuantType.QInt8, per_channel=True)
        else:
            quantize_static(
                ready,
                target,
                Reader(calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        return tidied(onnx.load(target))


def accuracies(models: Sequence[bytes], split: Split) -> list[float]:
    """Accuracy of each member on all images of a split."""
    return [_accuracy(model, split) for model in models]


def _accuracy(model: bytes, split: Split) -> float:
    session, right, start = runner.open_session(model), 0, 0
    for raw in split.chunks(BATCH):
        # in single precision, as the runner scales bytes
        images = raw.numpy().astype(np.float32) / np.float32(255)
        logits = torch.from_numpy(runner.logits_of(session, images))
        right += int(correct(logits, split.labels[start : start + len(raw)]).sum())
        start += len(raw)
    return right / len(split)
