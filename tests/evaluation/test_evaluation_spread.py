"""Images spread over processes give the figures and records of one process; commands exit right."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_tools import command
from mesh_tools import evaluation
from redefense.bench.scaling import launch
from redefense.runtime.workers import SINGLE_PROCESS, Workers, own_device

SUITE = {
    "name": "mine", "cascade": True, "measures": True,
    "cells": [
        {"attack": "pgd", "view": "sampled", "settings": {"steps": 3}},
        {"attack": "hinge", "view": "members", "settings": {"steps": 3}},
        {"attack": "subset", "view": "members", "settings": {"steps": 3, "num_targets": 1}},
    ],
    "baseline_attacks": [{"attack": "hinge", "view": "members", "settings": {"steps": 6}}],
}  # fmt: skip


def read(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.with_suffix(".json").read_text())
    return found


def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    one, two = (tmp_path / name / "mine" for name in ("one", "two"))
    for count, store in ((1, one), (2, two)):
        assert launch(count, evaluation, store, json.dumps(SUITE), timeout=120.0) == [0] * count
    assert read(one) == read(two)
    for path in sorted(one.glob("*.npz")):
        with np.load(path) as a, np.load(two / path.name) as b:
            assert a.files == b.files
            assert all(np.array_equal(a[k], b[k]) for k in a.files if k != "seconds")


def test_shares_cover_every_chunk_once() -> None:
    chunks = list(range(7))
    shares = [Workers(rank=rank, count=3).share(chunks) for rank in range(3)]
    assert sorted(c for share in shares for c in share) == chunks
    assert SINGLE_PROCESS.share(chunks) == chunks
    assert SINGLE_PROCESS.gather(chunks) == chunks


def test_the_audit_command_exits_1_when_a_claim_does_not_hold() -> None:
    examples = Path(str(files("redefense.audit") / "examples"))
    for table in ("red_table1.csv", "red_table2.csv", "red_table3.csv"):
        done = command("audit", examples / table, "--json")
        assert done.code == 1
        assert json.loads(done.out)["holds"] is False
    sound = command("audit", examples / "sound_table.csv")
    assert sound.code == 0
    assert "error" not in sound.out
    assert command("audit", "nowhere.csv").code == 3


def test_each_process_of_a_machine_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert [own_device(d) for d in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
