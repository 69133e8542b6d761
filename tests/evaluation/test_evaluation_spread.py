"""Images spread over processes give the figures and records of one process; commands exit right."""

import json
import os
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redefense.runtime.workers import ALONE, Workers, own_device

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from redefense.config import ThreatConfig
from redefense.ensembles import Independent
from redefense.evaluation.cells import Subject
from redefense.evaluation.run import run_suite
from redefense.evaluation.suite import Suite
from redefense.runtime.workers import workers

rng = torch.Generator().manual_seed(0)
x, y = torch.rand(230, 1, 2, 2, generator=rng), torch.randint(0, 3, (230,), generator=rng)
members = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)]
for member in members:
    for p in member.parameters():
        p.data.normal_(generator=rng)
with workers() as team:
    subject = Subject(Independent(members).eval(), x, y, np.arange(230), "made up", workers=team)
    store = Path(sys.argv[1])
    suite = Suite.model_validate_json(sys.argv[2])
    data = run_suite(subject, suite, ThreatConfig(eps=0.1), store=store).data
    data["provenance"].pop("date")
    for cell in data["cells"]:
        cell.pop("seconds")
    if team.first:
        store.with_suffix(".json").write_text(json.dumps(data))
"""

SUITE = {
    "name": "mine", "cascade": True, "measures": True,
    "cells": [
        {"attack": "pgd", "view": "sampled", "settings": {"steps": 3}},
        {"attack": "hinge", "view": "members", "settings": {"steps": 3}},
        {"attack": "subset", "view": "members", "settings": {"steps": 3, "num_targets": 1}},
    ],
    "beside": [{"attack": "hinge", "view": "members", "settings": {"steps": 6}}],
}  # fmt: skip


def _run(store: Path, count: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(store), json.dumps(SUITE)],
            env={**shared, "RANK": str(rank)},
        )
        for rank in range(count)
    ]
    assert [process.wait(timeout=120) for process in started] == [0] * count
    found: dict[str, Any] = json.loads(store.with_suffix(".json").read_text())
    return found


def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one" / "mine", 1), _run(tmp_path / "two" / "mine", 2)
    for data in (one, two):
        data["provenance"].pop("commit")  # somebody may commit between the two
    assert one == two
    for path in sorted((tmp_path / "one" / "mine").glob("*.npz")):
        with np.load(path) as a, np.load(tmp_path / "two" / "mine" / path.name) as b:
            assert a.files == b.files
            assert all(np.array_equal(a[k], b[k]) for k in a.files if k != "seconds")


def test_shares_cover_every_chunk_once() -> None:
    chunks = list(range(7))
    shares = [Workers(rank=rank, count=3).share(chunks) for rank in range(3)]
    assert sorted(c for share in shares for c in share) == chunks
    assert ALONE.share(chunks) == chunks
    assert ALONE.gather(chunks) == chunks


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "redefense", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_audit_command_exits_1_when_a_claim_does_not_hold() -> None:
    examples = Path(str(files("redefense.audit") / "examples"))
    for table in ("red_table1.csv", "red_table2.csv", "red_table3.csv"):
        done = _command("audit", str(examples / table), "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout)["holds"] is False
    sound = _command("audit", str(examples / "sound_table.csv"))
    assert sound.returncode == 0
    assert "error" not in sound.stdout
    assert _command("audit", "nowhere.csv").returncode == 3


def test_each_process_of_a_machine_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert [own_device(d) for d in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
