"""Fixtures of all tests."""

import pytest


@pytest.fixture(autouse=True)
def own_names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, a page that it runs included, is known to that test alone."""
    from redefense import plugins  # after the import hook that checks types

    for kind in plugins.HOMES:
        monkeypatch.setattr(plugins.registry(kind), "_added", {})
    monkeypatch.setattr(plugins, "_loaded", set())
