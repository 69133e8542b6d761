"""Evaluations with recorded passes, on the tape in place of CUDA graphs: the same report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redefense.config import DataConfig, OptimConfig, Run, ThreatConfig
from redefense.ensembles.recorded_passes import RecordedPasses
from redefense.errors import ConfigError
from redefense.evaluation import api
from redefense.evaluation.api import evaluate_run
from redefense.runtime.recording import recorder_for
from redefense.train.experiment import train
from tape import TapeRecorder

pytestmark = pytest.mark.filterwarnings("ignore::redefense.RedCheckWarning")

SUITE = {
    "cells": [
        {"attack": "pgd", "view": "sampled", "settings": {"steps": 6}},
        {"attack": "hinge", "view": "members", "settings": {"steps": 4, "restarts": 2}},
        {"attack": "apgd", "view": "averaged", "settings": {"steps": 6}},
        {"attack": "square", "view": "averaged", "settings": {"queries": 12}},
    ]
}


def report_of(run: Path, suite: str, replay: str, said: list[str]) -> dict[str, Any]:
    out = run / replay / "small.json"
    out.parent.mkdir()
    report, _ = evaluate_run(run, suite=suite, images=8, out=out, replay=replay, log=said.append)
    document: dict[str, Any] = json.loads(report.to_json())
    for cell in [*document["cells"], *document["further_cells"]]:
        cell.pop("seconds", None)
    document["provenance"].pop("date")
    return document


def test_a_suite_gives_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RecordedPasses] = []

    class Kept(RecordedPasses):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named | {"settling": 2})
            made.append(self)

    monkeypatch.setattr("redefense.ensembles.recorded_passes.RecordedPasses", Kept)
    monkeypatch.setattr(api, "recorder_for", lambda device: TapeRecorder())
    run, suite = tmp_path / "run", tmp_path / "suite.json"
    small = {"name": "independent", "model": "digits-cnn", "num_members": 2, "width": 4}
    train(
        Run(
            data=DataConfig(spec="digits", images=32), ensemble=small, batch_size=16, epochs=2,
            defence={"name": "vanilla"}, threat=ThreatConfig(eps=0.1), optim=OptimConfig(lr=0.1),
        ),
        run, quiet=True,
    )  # fmt: skip
    suite.write_text(json.dumps(SUITE))
    said: list[str] = []
    plain, mine = (report_of(run, str(suite), replay, said) for replay in ("off", "auto"))
    assert plain == mine
    kept = sorted((run / "off" / "small").glob("*.npz"))
    assert len(kept) > len(SUITE["cells"])
    for records in kept:
        one, other = np.load(records), np.load(run / "auto" / "small" / records.name)
        for key in set(one.files) - {"seconds"}:
            assert np.array_equal(one[key], other[key]), (records.name, key)
    (passes,) = made  # of "auto" alone
    assert passes.why is None
    assert passes.counts["replayed"] > 0
    assert not any("replayed" in line for line in said)
    with pytest.raises(ConfigError, match="--replay must be auto or off, got 'on'"):
        evaluate_run(run, replay="on")


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert recorder_for(torch.device("cpu")) is None
