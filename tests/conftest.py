"""Fixtures of all tests."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def own_names_of_a_module() -> None:
    """What fixtures of other files registered is not known to this one's."""
    from redefense import plugins  # after the import hook that checks types

    for kind in plugins.HOMES:
        plugins.registry(kind)._added.clear()
    plugins._loaded.clear()


@pytest.fixture(autouse=True)
def own_names_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, a page that it runs included, is known to that test alone."""
    from redefense import plugins

    for kind in plugins.HOMES:
        monkeypatch.setattr(plugins.registry(kind), "_added", dict(plugins.registry(kind)._added))
    monkeypatch.setattr(plugins, "_loaded", set(plugins._loaded))
