"""The model card says what the evaluation says, and nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from redefense.errors import ConfigError, DataError
from redefense.report.card import METRICS, card, unmeasured_card, write_card
from redefense.report.page import summary_table

AWARE = {"hinge": True, "pgd": False, "fgsm": False}


def build(run: Path, name: str = "red", n: int = 300) -> dict[str, Any]:
    """A small stored evaluation with records."""
    rng = np.random.default_rng(0)
    folder = run / "evaluation" / "quick"
    folder.mkdir(parents=True)
    cells = []
    for position, (attack, aware) in enumerate(AWARE.items()):
        correct = rng.random((3, n)) < 0.2 + 0.2 * position
        np.savez(folder / f"{attack}.npz", correct=correct, index=np.arange(n))
        cells.append(
            {
                "id": attack, "attack": attack, "view": "members" if aware else "sampled",
                "aware": aware, "threat": {"norm": "inf", "eps": 0.03},
                "accuracy": {"expected": float(correct.mean())}, "per_image": f"quick/{attack}.npz",
            }
        )  # fmt: skip
    clean = rng.random((3, n)) < 0.9
    np.savez(folder / "clean.npz", correct=clean, index=np.arange(n))
    np.savez(folder / "baselines.npz", single=clean[0] & clean[1], averaged=clean[2])
    document = {
        "schema": 1, "suite": "quick",
        "run": {"name": name, "ensemble": {"model": "resnet8"}, "defence": {"name": "red"}},
        "provenance": {"seed": 0}, "data": {"name": "cifar10", "split": "test", "num_images": n},
        "clean": {"expected": float(clean.mean()), "per_member": clean.mean(1).tolist()},
        "cells": cells, "headline": None, "checks": [],
    }  # fmt: skip
    (run / "evaluation" / "quick.json").write_text(json.dumps(document))
    return document


def head_of(text: str) -> dict[str, Any]:
    """The YAML before the text."""
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_every_figure_of_the_head_is_the_evaluations(tmp_path: Path) -> None:
    build(tmp_path / "red")
    (row,) = summary_table([tmp_path / "red"])
    (index,) = head_of(card(tmp_path / "red"))["model-index"]
    metrics = [metric for result in index["results"] for metric in result["metrics"]]
    assert [metric["value"] for metric in metrics] == [
        round(100 * row[key].value, 2) for key in METRICS
    ]
    assert {metric["args"]["num_images"] for metric in metrics} == {300}
    assert {metric["args"].get("eps") for metric in metrics} == {None, 0.03}


def test_the_head_has_what_a_hub_reads(tmp_path: Path) -> None:
    build(tmp_path / "red")
    text = card(tmp_path / "red", license_name="Apache-2.0")
    assert text.startswith("---\nlibrary_name: redefense\npipeline_tag: image-classification\n")
    head = head_of(text)
    assert head["license"] == "apache-2.0"
    assert head["datasets"] == ["uoft-cs/cifar10"]
    assert "red" in head["tags"]
    assert list(head) == [
        "library_name", "pipeline_tag", "license", "tags", "datasets", "metrics", "model-index",
    ]  # fmt: skip


def test_the_body_gives_both_headlines_with_intervals(tmp_path: Path) -> None:
    build(tmp_path / "red")
    (row,) = summary_table([tmp_path / "red"])
    body = card(tmp_path / "red").split("---\n", 2)[2]
    for key in ("aware", "unaware"):
        estimate = row[key]
        ends = f"{100 * estimate.low:.1f}, {100 * estimate.high:.1f}"
        assert f"{100 * estimate.value:.1f} \\[{ends}\\]" in body
    assert "each a resnet8, trained with the method red" in body
    assert body.count("\n# ") == 1


def test_a_card_says_where_the_run_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "runs" / "red")
    assert 'redefense.load("red")' in card(tmp_path / "runs" / "red")  # not whose machine it is
    monkeypatch.chdir(tmp_path)
    assert 'redefense.load("runs/red")' in card(Path("runs/red"))
    assert 'redefense.from_pretrained("me/red")' in card(
        Path("runs/red"), opened_by="from_pretrained", name="me/red"
    )


def test_a_name_cannot_break_out_of_the_head_or_the_text(tmp_path: Path) -> None:
    run = tmp_path / "a\n---\n<script>"
    build(run)
    text = card(run)
    assert text.count("\n---\n") == 1
    assert head_of(text)["model-index"][0]["name"] == "a --- <script>"
    assert "# a --- \\<script\\>" in text


def test_names_are_escaped_in_the_text_and_only_there(tmp_path: Path) -> None:
    document = build(tmp_path / "red")
    document["run"] |= {"ensemble": {"model": "my_net"}, "defence": {"name": "my_red"}}
    (tmp_path / "red" / "evaluation" / "quick.json").write_text(json.dumps(document))
    known = card(tmp_path / "red")
    unknown = unmeasured_card("x", data="digits", num_members=3, model="my_net", method="my_red")
    for text in (known, unknown):
        assert "my_red" in head_of(text)["tags"]
        assert r"each a my\_net, trained with the method my\_red." in text


def test_a_card_is_written_beside_the_run_or_not_at_all(tmp_path: Path) -> None:
    build(tmp_path / "red")
    assert write_card(tmp_path / "red") == tmp_path / "red" / "README.md"
    assert (tmp_path / "red" / "README.md").read_text() == card(tmp_path / "red")
    with pytest.raises(ConfigError, match="SPDX"):
        card(tmp_path / "red", license_name="mit\nevil: 1")
    with pytest.raises(DataError, match="no run at"):
        write_card(tmp_path / "empty", tmp_path / "new" / "README.md")
    assert not (tmp_path / "new").exists()


def test_the_card_does_not_import_torch() -> None:
    code = "import redefense.report.card, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_card_without_an_evaluation_claims_nothing() -> None:
    text = unmeasured_card("red", data="cifar10", num_members=3, model="resnet8", method="red")
    assert "Nothing was measured." in text
    assert "An ensemble of 3 classifiers, each a resnet8, trained with the method red" in text
    assert "model-index" not in text
    assert "metrics" not in text
    assert not re.search(r"\d %", text)


def test_figures_of_validation_images_are_not_those_of_a_hub(tmp_path: Path) -> None:
    document = build(tmp_path / "red")
    document["data"]["split"] = "validation"
    (tmp_path / "red" / "evaluation" / "quick.json").write_text(json.dumps(document))
    text = card(tmp_path / "red")
    assert "model-index" not in head_of(text)
    assert "300 validation" in text
    assert "quote figures of test images" in text
