"""Evaluations of validation images, which are never taken for test images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redefense.claims import make
from redefense.config import override
from redefense.data import load_dataset, train_validation
from redefense.errors import ConfigError, DataError
from redefense.evaluation.api import evaluate_run
from redefense.evaluation.cells import image_digest
from redefense.recipes import recipe
from redefense.report import ranking, reproduce
from redefense.report.sentences import on_validation
from redefense.report.tables import labels_of
from redefense.results.join import join

SMALL = ("epochs=1", "data.images=64", "ensemble.model=mlp", "ensemble.num_members=2")
SUITE: dict[str, Any] = {
    "name": "mine",
    "baseline_attacks": [{"attack": "meanprob_pgd", "view": "members", "settings": {"steps": 1}}],
    "cells": [
        {"attack": "fgsm", "view": "sampled"},
        {"attack": "hinge", "view": "members", "settings": {"steps": 2}},
    ],
}


@pytest.fixture
def run(trained: Callable[[Any, Path], Path], tmp_path: Path) -> Path:
    (tmp_path / "mine.json").write_text(json.dumps(SUITE))
    return trained(override(recipe("digits-vanilla"), SMALL), tmp_path / "run")


def evaluated(run: Path, **settings: Any) -> dict[str, Any]:
    _, target = evaluate_run(run, suite=str(run.parent / "mine.json"), **settings)
    return {"file": target, **json.loads(target.read_text())}


def clean(found: dict[str, Any]) -> Any:
    """The records of the clean images."""
    return np.load(found["file"].parent / found["clean"]["per_image"])


def test_the_images_are_the_first_that_the_training_held_out(run: Path) -> None:
    _, validation, held = train_validation(load_dataset("digits"))
    found = evaluated(run, images=50, split="validation")
    assert found["file"] == run / "evaluation" / "mine-validation.json"
    assert (found["data"]["split"], found["data"]["num_images"]) == ("validation", 50)
    x, y = validation.float(torch.arange(50)), validation.labels[:50]
    assert found["data"]["sha256"] == image_digest(x, y)
    np.testing.assert_array_equal(clean(found)["index"], held[:50])


@pytest.mark.parametrize(
    ("images", "chosen_on"), [(50, "validation"), (None, "evaluated images")], ids=["some", "all"]
)
def test_the_best_member_is_chosen_on_other_images(
    run: Path, images: int | None, chosen_on: str
) -> None:
    found = evaluated(run, images=images, split="validation")
    assert found["headline"]["chosen_on"] == chosen_on


def test_all_images_are_those_of_a_longer_prefix(run: Path) -> None:
    """The accuracy of each image does not depend on how many follow it."""
    some, every = (evaluated(run, images=n, split="validation", out=run / f"{n}.json")
                   for n in (50, None))  # fmt: skip
    np.testing.assert_array_equal(clean(some)["correct"], clean(every)["correct"][:, :50])


def test_a_report_names_them_and_shows_test_images_first(run: Path) -> None:
    evaluated(run, images=60, split="validation")
    evaluated(run, images=40)
    results = join([run])
    assert set(labels_of(results)) == {"run (40 images)", "run (60 validation images)"}
    assert ranking.best(results).images == "40 images"
    assert "quote figures of test images" in str(on_validation(results))
    assert on_validation([ranking.best(results)]) is None
    commands = {result.images: reproduce.command(result.suites[0]) for result in results}
    assert "--split validation --images 60" in str(commands["60 validation images"])
    assert "--split" not in str(commands["40 images"])


def test_a_claim_is_of_test_images(run: Path) -> None:
    evaluated(run, images=60, split="validation")
    with pytest.raises(DataError, match=r"is of validation images, and a claim is of test images"):
        make.claim([run])
    evaluated(run, images=40)
    said: list[str] = []
    claim = make.claim([run], log=said.append)
    assert said == [
        f"{run}/evaluation/mine-validation.json is of validation images and left out: "
        "a claim is of test images"
    ]
    assert [e.data["split"] for e in claim.evaluations] == ["test"]


def test_several_radii_of_validation_images_have_one_file(run: Path) -> None:
    found = evaluated(run, images=20, split="validation", eps="0.05,0.1")
    assert found["file"] == run / "evaluation" / "mine-validation.json"
    assert found["data"]["split"] == "validation"
    assert [point["eps"] for point in found["eps_curve"]] == [0.05, 0.1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "train"}, "--split must be test or validation, got 'train'"),
        (
            {"split": "validation", "images": 4000},
            r"number of validation images must lie in \[1, 144\], got 4000",
        ),
    ],
    ids=["another split", "too many images"],
)
def test_what_cannot_be_measured_is_refused(run: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluated(run, **settings)
    assert not (run / "evaluation").exists()


def test_other_data_have_no_images_that_the_training_held_out(run: Path, tmp_path: Path) -> None:
    digits = load_dataset("digits")
    other, images = tmp_path / "other.npz", digits.train.images.numpy().copy()
    images[0] = 255 - images[0]
    np.savez(
        other,
        x_train=images, y_train=digits.train.labels.numpy(),
        x_test=digits.test.images.numpy(), y_test=digits.test.labels.numpy(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"--split validation is of the data of the training"):
        evaluated(run, split="validation", data=f"npz:{other}")
