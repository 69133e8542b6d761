"""Images of a data set for an evaluation: test images, and validation images for selection."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redefense.config import Run
from redefense.data import Dataset, Split, test_indices, train_validation
from redefense.ensembles import Ensemble
from redefense.evaluation.baselines import SELECTION_IMAGES
from redefense.evaluation.cells import Subject
from redefense.train.session import accuracy


def drift_of(path: Path, ensemble: Ensemble, dataset: Dataset, run: Run) -> float | None:
    """Clean validation accuracy minus that of the training log; None without a log."""
    log = path / "metrics.jsonl"
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
) -> Subject:
    total = len(dataset.test)
    # always in the published random order, so that its first images are a fair sample
    index = test_indices(total, total if images is None else images)
    fraction = run.data.validation if run is not None else 0.1
    _, validation, _ = train_validation(dataset, fraction)
    return Subject(
        ensemble,
        *_images(dataset.test, index, device),
        index.numpy(),
        dataset.name,
        "test",
        run_json,
        # a model that was not trained here may have been trained on these images
        _images(validation, torch.arange(min(SELECTION_IMAGES, len(validation))), device)
        if run is not None
        else None,
    )


def _images(split: Split, index: Tensor, device: str) -> tuple[Tensor, Tensor]:
    # loaded networks are channels-last and would convert every batch of another memory format
    x = split.float(index).to(device, memory_format=torch.channels_last)
    return x, split.labels[index].to(device)
