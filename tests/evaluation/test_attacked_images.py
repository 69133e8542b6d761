"""Attacked images that are kept are those that the records speak of."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from test_cascade import (
    FIRST,
    HANDING_ON,
    INDEPENDENT,
    THREAT,
    TWO_CHUNKS,
    cell,
    members,
    subject,
)

from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.evaluation.api import evaluate
from redefense.evaluation.cascade.attacked import SUFFIX
from redefense.evaluation.cells import judge
from redefense.evaluation.report_object import Report
from redefense.evaluation.run import run_suite
from redefense.evaluation.stochastic import measure
from redefense.evaluation.suite import Suite
from redefense.models.randomized import GaussianNoise
from redefense.results.examples import SHOWN
from redefense.results.intervals import exact_expectation

pytestmark = pytest.mark.usefixtures("without_victim_checks")

PLAIN = Suite(name="mine", cells=(*FIRST, cell("cw", "averaged", steps=2)))


def run(suite: Suite = INDEPENDENT, store: Path | None = None, **settings: Any) -> Report:
    settings = {"subject": subject(), "keep_images": True, **settings}
    return run_suite(settings.pop("subject"), suite, THREAT, store=store, **settings)


@pytest.mark.parametrize("suite", [INDEPENDENT, HANDING_ON, PLAIN], ids=["beside", "on", "plain"])
def test_members_answer_the_kept_images_as_the_records_say(suite: Suite) -> None:
    report, whom = run(suite), subject()
    of_cells = [c for c in (*report.data["cells"], *report.data["further_cells"])]
    assert {c["id"] for c in of_cells} - {"measures", "checks"} == set(report.images)
    for name, images in report.images.items():
        points = report.adversarial(name)
        assert points.shape == whom.x.shape
        np.testing.assert_array_equal(points.numpy(), images)
        found, record = judge(whom.ensemble, points, whom.x, whom.y), report.cells[name]
        np.testing.assert_array_equal(found["correct"], record.correct)
        if name != "cw-averaged-linf-0.15":
            assert float((points - whom.x).abs().max()) <= THREAT.eps + 1e-9


def test_an_attack_is_named_by_name_label_or_cell() -> None:
    report = run()
    same = [report.adversarial(name) for name in ("hinge", "hinge-members-linf-0.15")]
    assert torch.equal(*same)
    for wrong in ("nothing", "hinge-0"):
        with pytest.raises(ConfigError, match="no attack"):
            report.adversarial(wrong)
    twice = Suite(name="mine", cells=(cell("hinge", steps=2), cell("hinge", steps=3)))
    with pytest.raises(ConfigError, match="choose one: "):
        run(twice).adversarial("hinge")
    with pytest.raises(ConfigError, match="--save-images"):
        run(keep_images=False).adversarial("hinge")


def test_images_are_found_again_and_made_again_where_they_are_missing(tmp_path: Path) -> None:
    fresh = run().images
    without = tmp_path / "without"
    run(store=without, keep_images=False)
    assert not list(without.glob(f"*{SUFFIX}"))
    lines: list[str] = []
    for images in (
        run(store=without, log=lines.append).images,  # on top of a finished evaluation
        run(store=without).images,
    ):
        assert {k: v.tolist() for k, v in images.items()} == {
            k: v.tolist() for k, v in fresh.items()
        }
    assert any("MB, in" in line for line in lines)
    next(iter(without.glob(f"hinge*{SUFFIX}"))).write_bytes(b"damaged")
    assert {k: v.tolist() for k, v in run(store=without).images.items()} == {
        k: v.tolist() for k, v in fresh.items()
    }
    assert not list(without.glob("attacked*"))
    assert not list(without.glob("*.chunks"))


def test_a_stopped_evaluation_keeps_the_images_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = subject(TWO_CHUNKS)
    whole = run(HANDING_ON, subject=who)

    class StoppedError(Exception):
        pass

    from redefense.evaluation.cells import Task

    own, calls = Task.chunk, 0

    def stopping(task: Task, *args: Any, **more: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 4:  # within the second attack, of two chunks each
            raise StoppedError
        return own(task, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "chunk", stopping)
        with pytest.raises(StoppedError):
            run(HANDING_ON, tmp_path, subject=who)
    again = run(HANDING_ON, tmp_path, subject=who)
    assert {k: v.tolist() for k, v in again.images.items()} == {
        k: v.tolist() for k, v in whole.images.items()
    }
    assert whole.examples is not None
    assert again.examples is not None
    for name, values in whole.examples.arrays().items():
        np.testing.assert_array_equal(values, again.examples.arrays()[name])


def test_examples_are_the_worst_points_of_the_first_images(tmp_path: Path) -> None:
    whom, report = subject(), run(store=tmp_path, keep_images=False)
    shown = report.examples
    assert shown is not None
    clean = report.cells["clean"].correct
    np.testing.assert_array_equal(shown.index, np.flatnonzero(clean.any(0))[:SHOWN])
    found = judge(
        whom.ensemble,
        torch.from_numpy(shown.attacked),
        whom.x[shown.index],
        whom.y[shown.index],
    )
    np.testing.assert_array_equal(found["correct"], shown.correct)
    np.testing.assert_array_equal(shown.predicted == shown.label, shown.correct)
    tried = [c for name, c in report.cells.items() if name not in ("measures", "checks")]
    q = np.stack([exact_expectation(c.correct, np.full(3, 1 / 3)) for c in tried]).min(0)
    left = exact_expectation(shown.correct, np.full(3, 1 / 3))
    np.testing.assert_allclose(left, q[shown.index], atol=1e-12)
    # a finished evaluation finds them again
    again = run(store=tmp_path, keep_images=False).examples
    assert again is not None
    np.testing.assert_array_equal(again.attacked, shown.attacked)


def test_saved_and_drawing_networks_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MOST_DRAWS", 32)
    whom = subject()
    noisy = GaussianNoise(Independent(members(1)).member(0).double(), sigma=0.1)
    with pytest.warns(UserWarning, match="draw"):
        report = evaluate(
            noisy, (whom.x[:40].float(), whom.y[:40]), Suite(name="mine", cells=FIRST[1:2]),
            keep_images=True, out=tmp_path / "out",
        )  # fmt: skip
    kept = tmp_path / "out" / "evaluation" / report.data["cells"][0]["images"]
    images = report.adversarial("meanprob_pgd")
    assert torch.equal(images, torch.from_numpy(np.load(kept)["images"]))
    record = cast(Any, report.cells["meanprob_pgd-members-linf-0.031373"])
    moved = (images - whom.x[:40].float()).flatten(1).abs().amax(1)
    np.testing.assert_allclose(moved.numpy(), record.linf, atol=1e-6)
    target = run().save(tmp_path / "saved")
    names = {path.name for path in (target.parent / "mine").iterdir()}
    assert "examples.npz" in names
    assert any(name.endswith(SUFFIX) for name in names)
