"""Where a number comes from: the code in memory, not what lies beside it or came later."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from redefense.config import ThreatConfig
from redefense.ensembles import Independent
from redefense.evaluation import provenance
from redefense.evaluation import run as running
from redefense.evaluation.cells import Cell, Subject, clean_cell
from redefense.evaluation.suite import SUITES


def _git(folder: Path, *words: str) -> None:
    named = ["-c", "user.name=t", "-c", "user.email=t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *named, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in a checkout of its own, committed."""
    folder = tmp_path / "checkout" / "package"
    (folder / "attacks").mkdir(parents=True)
    for name in ("__init__.py", "rng.py", "attacks/pgd.py", "../notes.md"):
        (folder / name).write_text(f"# {name}\n")
    _git(folder.parent, "init", "-q")
    _git(folder.parent, "add", ".")
    _git(folder.parent, "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "_PACKAGE", folder)
    return folder


def _commit() -> str:
    return str(provenance.provenance(0)["commit"])


def test_a_commit_is_dirty_if_the_package_differs_and_not_for_what_lies_beside(
    package: Path,
) -> None:
    clean = _commit()
    assert len(clean) == 40
    (package.parent / "notes.md").write_text("changed")
    assert _commit() == clean
    (package / "new.py").write_text("")
    assert _commit() == f"{clean}-dirty"


def test_a_package_below_a_strangers_checkout_has_no_commit(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = package.parent / "site-packages"
    installed.mkdir()
    (installed / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "_PACKAGE", installed)
    assert _commit() == ""


def test_code_is_told_apart_by_what_makes_results(package: Path) -> None:
    before = provenance.code()
    (package / "__init__.py").write_text("# a page of the report")
    assert provenance.code() == before
    (package / "attacks" / "pgd.py").write_text("# another step\n")
    assert provenance.code() != before


def test_every_module_that_makes_results_is_there() -> None:
    assert all(any(provenance._PACKAGE.glob(pattern)) for pattern in provenance._MAKERS)


def test_an_evaluation_names_the_commit_it_began_with(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = _commit()

    def meanwhile(*given: Any) -> Cell:
        _git(package.parent, "commit", "-q", "--allow-empty", "-m", "second")
        return clean_cell(*given)

    monkeypatch.setattr(running, "clean_cell", meanwhile)
    x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    subject = Subject(Independent([model]).eval(), x, y, np.arange(4), "made up")
    report = running.run_suite(subject, SUITES["quick"], ThreatConfig(eps=0.1))
    assert _commit() != began
    assert report.data["provenance"]["commit"] == began
