"""Fixtures of all tests.

Nothing of redefense is imported before the hook that checks types is in place: so not at the top.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import type_checks
from browser import chromium, launched

type_checks.install()

# a deadline would assert speed, and fail on a busy machine
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without Chromium there is no browser to test in, which the count of deselected tests says."""
    if chromium() is None:
        without = [item for item in items if item.get_closest_marker("browser") is not None]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all workers of this test run share."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if hasattr(request.config, "workerinput") else root


@pytest.fixture(scope="session")
def trained(shared: Path) -> Callable[[Any, Path], Path]:
    """Puts a trained `Run` into a new folder; equal runs are trained once by all workers."""
    from redefense.runtime.files import locked
    from redefense.train.experiment import train

    def put(run: Any, out: Path) -> Path:
        known = shared / "trained" / hashlib.sha256(run.model_dump_json().encode()).hexdigest()
        with locked(known.with_suffix(".lock"), wait=True):
            if not known.exists():
                train(run, known, quiet=True)
        shutil.copytree(known, out)
        return out

    return put


@pytest.fixture(autouse=True, scope="module")
def own_names_of_a_module() -> None:
    """What fixtures of other files registered is not known to this one's."""
    from redefense import plugins

    for kind in plugins.MODULES:
        plugins.registry(kind)._added.clear()
    plugins._loaded.clear()


@pytest.fixture(autouse=True)
def own_names_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers, a page that it runs included, is known to that test alone."""
    from redefense import plugins

    for kind in plugins.MODULES:
        monkeypatch.setattr(plugins.registry(kind), "_added", dict(plugins.registry(kind)._added))
    monkeypatch.setattr(plugins, "_loaded", set(plugins._loaded))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, for tests that are marked `browser`; pages of it by `browser.opened`."""
    with launched() as browser:
        yield browser


@pytest.fixture
def without_victim_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the checks before the first attack: they take as long as two short attacks."""
    monkeypatch.setattr("redefense.evaluation.run.before_run", lambda ensemble, x, y: [])
