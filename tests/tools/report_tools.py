"""Made-up evaluations on disk, as the harness would write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from redefense.report.page import write_report
from redefense.results.intervals import accuracy_interval

Attacks = dict[tuple[str, str, bool], float]  # (attack, view, aware): a member's accuracy
QUICK: Attacks = {
    ("fgsm", "sampled", False): 0.7,
    ("pgd", "sampled", False): 0.55,
    ("meanprob_pgd", "all members", True): 0.4,
    ("hinge", "all members", True): 0.38,
}


def _cell(run: Path, suite: str, key: tuple[str, str, bool], correct: Any, eps: float) -> Any:
    attack, view, aware = key
    name = f"{attack}-{view.replace(' ', '')}-linf-{eps:g}"
    record = f"{suite}/{name}.npz"
    (run / "evaluation" / suite).mkdir(parents=True, exist_ok=True)
    np.savez(run / "evaluation" / record, correct=correct, index=np.arange(correct.shape[1]) * 3)
    bounded = attack not in ("cw", "deepfool")
    means = correct.mean(1)
    return {
        "id": name, "attack": attack, "repr": f"{attack.upper()}(steps=10)", "view": view,
        "label": f"{attack.upper()}, {view}", "aware": aware, "bounded": bounded,
        "distortion": {"l0": 30.0, "l2": 0.41, "linf": eps},
        "threat": {"norm": "inf", "eps": eps if bounded else None},
        "accuracy": {
            "protocol": float(means.mean()) + 0.01, "protocol_sd": 0.012,
            "expected": float(correct.mean()), "averaged": float(means.max()),
            "worst_member": float(means.min()), "best_member": float(means.max()),
            "any": float(correct.any(0).mean()), "all": float(correct.all(0).mean()),
        },
        "interval": list(accuracy_interval(correct.mean(0)))[1:],
        "unchanged": 0.0, "forwards": 30.0, "backwards": 30.0, "seconds": 2.5, "per_image": record,
    }  # fmt: skip


def build_run(
    run: Path,
    attacks: Attacks = QUICK,
    *,
    suite: str = "quick",
    n: int = 360,
    members: int = 3,
    eps: float = 0.2,
    seed: int = 0,
    clean: float = 0.96,
    single: float = 0.3,
    averaged: float = 0.25,
    alone: tuple[float, ...] = (),
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Store a made-up evaluation under `run` as the harness would, and return its JSON."""
    rng = np.random.default_rng(seed)
    ease = rng.random((1, n))  # some images are easy for every attack and member
    noise = rng.normal(0, 0.15, (members, n))
    draw = {key: (ease + noise) < share for key, share in attacks.items()}
    cells = [_cell(run, suite, key, correct, eps) for key, correct in draw.items()]
    correct = (ease + noise) < clean + 0.02
    folder = run / "evaluation"
    (folder / suite).mkdir(parents=True, exist_ok=True)
    np.savez(folder / suite / "clean.npz", correct=correct, index=np.arange(n) * 3)
    beside = {"single": ease[0] < single, "averaged": ease[0] < averaged}
    if alone:
        beside["members"] = np.stack([ease[0] < share for share in alone])
    np.savez(folder / suite / "baselines.npz", allow_pickle=False, **beside)
    aware = any(cell["aware"] and cell["bounded"] for cell in cells)
    headline = {
        "unaware": 0.5, "aware": 0.3, "aware_interval": [0.25, 0.35], "best_single_member": single,
        "averaged": averaged, "best_single_member_index": 1, "chosen_on": "validation",
    }  # fmt: skip
    document = {
        "schema": 1, "suite": suite, "run": {"name": run.name},
        "provenance": {"version": "0.1.0", "commit": "abc1234", "torch": "2.13.0",
                       "machine": "2 cores", "seed": 0, "date": "2026-11-22"},
        "data": {"name": "digits", "split": "test", "num_images": n},
        "clean": {"expected": float(correct.mean()), "averaged": 0.97,
                  "per_member": correct.mean(1).tolist()},
        "cells": cells,
        "headline": headline if aware else None,
        "checks": [{"id": "S01", "passed": True, "detail": "largest excess 3e-8"},
                   {"id": "S34", "passed": False, "detail": "12 % returned unchanged"}],
        "from_a_later_version": 1,
        **(extra or {}),
    }  # fmt: skip
    (folder / f"{suite}.json").write_text(json.dumps(document), encoding="utf-8")
    return document


def q_of(run: Path, suite: str) -> Any:
    """(cells + clean, n) expected correctness, read back without the library."""
    document = json.loads((run / "evaluation" / f"{suite}.json").read_text())
    names = [c["per_image"] for c in document["cells"] if c["bounded"]] + [f"{suite}/clean.npz"]
    return np.stack([np.load(run / "evaluation" / name)["correct"].mean(0) for name in names])


def full_report(folder: Path) -> tuple[Path, str]:
    curve = [
        [0.0, 0.96, 0.93, 0.98],
        [0.1, 0.6, 0.55, 0.65],
        [0.2, 0.3, 0.25, 0.35],
        [0.4, 0, 0, 0.01],
    ]
    extra = {"transfer": [[0.9, 0.4, 0.3], [0.35, 0.92, None], [0.4, 0.2, 0.95]], "curve": curve}
    attacks = {**QUICK, ("cw", "sampled", False): 0.05}
    build_run(folder / "digits-red", attacks, extra=extra)
    build_run(folder / "digits-vanilla", {k: v / 20 for k, v in QUICK.items()}, seed=1, single=0.02)
    files = write_report([folder / "digits-red", folder / "digits-vanilla"], folder / "report.html")
    assert [path.suffix for path in files] == [".html", ".md", ".csv", ".json"]
    assert all(path.is_file() for path in files)
    return files[0], files[0].read_text(encoding="utf-8")
