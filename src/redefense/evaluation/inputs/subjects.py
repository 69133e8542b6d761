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
from redefense.train.session import accuracy

SPLITS: Final = ("test", "validation")


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
    split: str = "test",
) -> Subject:
    """The first `images` of a split, all by default.

    Raises:
        ConfigError: if there are fewer images.
    """
    _, validation, held = train_validation(dataset, 0.1 if run is None else run.data.validation)
    source = dataset.test if split == "test" else validation
    count = len(source) if images is None else images
    if split == "test":
        # always in the published random order, so that its first images are a fair sample
        chosen = at = test_indices(len(source), count)
        rest = torch.arange(len(validation))
    else:
        if not 1 <= count <= len(source):
            raise ConfigError(
                f"the number of validation images must lie in [1, {len(source)}], got {count}"
            )
        chosen, rest = torch.arange(len(source)).tensor_split([count])
        at = held[chosen]
    rest = rest[:SELECTION_IMAGES]
    return Subject(
        ensemble,
        *_images(source, chosen, device),
        at.numpy(),
        dataset.name,
        split,
        run_json,
        # a model that was not trained here may have been trained on these images
        _images(validation, rest, device) if run is not None and len(rest) else None,
    )


def _images(split: Split, index: Tensor, device: str) -> tuple[Tensor, Tensor]:
    # loaded networks are channels-last and would convert every batch of another memory format
    x = split.float(index).to(device, memory_format=torch.channels_last)
    return x, split.labels[index].to(device)
