"""Images of a data set for an evaluation, and validation images for selection."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from redefense.config import Run
from redefense.data import Dataset, Split, test_indices, train_validation
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError
from redefense.evaluation.baselines import SELECTION_IMAGES
from redefense.evaluation.cells import Subject
from redefense.runtime.folders import METRICS
from redefense.train.session import accuracy

SPLITS: Final = ("test", "validation")


def drift_of(path: Path, ensemble: Ensemble, dataset: Dataset, run: Run) -> float | None:
    """Clean validation accuracy minus that of the training log; None without a log."""
    log = path / METRICS
    lines = log.read_text().splitlines() if log.is_file() else []
    try:
        logged = [json.loads(line).get("validation_accuracy") for line in lines]
    except (ValueError, AttributeError):  # a damaged log counts as missing
        return None
    if not logged or logged[-1] is None:
        return None
    _, validation, _ = train_validation(dataset, run.data.validation)
    return accuracy(ensemble, validation, run.batch_size) - float(logged[-1])


def subject_of(
    ensemble: Ensemble,
    dataset: Dataset,
    images: int | None,
    run_json: Mapping[str, Any],
    run: Run | None = None,
    device: str = "cpu",
    split: str = "test",
) -> Subject:
    """The first `images` of a split, all by default.

    Raises:
        ConfigError: if there are fewer images.
    """
    test = len(dataset.test)
    if run is None:
        # a model that was not trained here may have been trained on any other images
        index = test_indices(test, test if images is None else images)
        x, y = _images(dataset.test, index, device)
        return Subject(ensemble, x, y, index.numpy(), dataset.name, "test", run_json)
    _, validation, held = train_validation(dataset, run.data.validation)
    if split == "test":
        # always in the published random order, so that its first images are a fair sample
        index = test_indices(test, test if images is None else images)
        x, y = _images(dataset.test, index, device)
        rest = torch.arange(len(validation))
    else:
        count = len(validation) if images is None else images
        if not 1 <= count <= len(validation):
            raise ConfigError(
                f"the number of validation images must lie in [1, {len(validation)}], got {count}"
            )
        first, rest = torch.arange(len(validation)).tensor_split([count])
        x, y = _images(validation, first, device)
        index = held[:count]
    rest = rest[:SELECTION_IMAGES]
    return Subject(
        ensemble, x, y, index.numpy(), dataset.name, split, run_json,
        _images(validation, rest, device) if len(rest) else None,
    )  # fmt: skip


def _images(split: Split, index: Tensor, device: str) -> tuple[Tensor, Tensor]:
    # loaded networks are channels-last and would convert every batch of another memory format
    x = split.float(index).to(device, memory_format=torch.channels_last)
    return x, split.labels[index].to(device)
