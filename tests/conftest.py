"""Fixtures of all tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from browser import chromium, launched


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without Chromium there is no browser to test in, which the count of deselected tests says."""
    if chromium() is None:
        without = [item for item in items if item.get_closest_marker("browser") is not None]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


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


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, for tests that are marked `browser`; pages of it by `browser.opened`."""
    with launched() as browser:
        yield browser
