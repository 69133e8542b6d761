"""Fixtures of the tests of evaluations."""

import pytest


@pytest.fixture
def without_victim_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the checks before the first attack: they take as long as two short attacks."""
    monkeypatch.setattr("redefense.evaluation.run.before_run", lambda ensemble, x, y: [])
