"""How far an evaluation is, and what is left of it after an interruption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.gradient import FGSM, PGD
from redefense.config import ThreatConfig
from redefense.ensembles import Independent
from redefense.evaluation import store as stores
from redefense.evaluation.cells import Cell, Subject, Task
from redefense.evaluation.progress import Progress, rough_passes
from redefense.evaluation.run import run_suite
from redefense.evaluation.store import in_chunks, own_images, read_arrays, read_object
from redefense.evaluation.suite import SUITES
from redefense.rng import stream
from redefense.runtime.workers import Workers

EPS = 0.2


class Flat(nn.Module):
    """Looks at one pixel."""

    def __init__(self, pixel: int) -> None:
        super().__init__()
        self.pixel = pixel

    def forward(self, x: Tensor) -> Tensor:
        z = 4 * (x.flatten(1)[:, self.pixel] - 0.5)
        return torch.stack([-z, z], 1)


def subject(count: int, **settings: Any) -> Subject:
    x = torch.rand(count, 1, 2, 2, generator=stream(0, "images"))
    y = (x.flatten(1)[:, 0] > 0.5).long()
    members = Independent([Flat(0), Flat(3)]).eval()
    return Subject(members, x, y, np.arange(count), "made up", **settings)


class Watched:
    """A progress on a clock that is set by hand."""

    def __init__(self) -> None:
        self.now, self.lines = 0.0, list[tuple[str, float, str]]()
        self.progress = Progress(self.show, every=1.0, clock=lambda: self.now)

    def show(self, label: str, share: float, words: str) -> None:
        self.lines.append((label, share, words))

    def work(self, seconds: float, passes: int) -> None:
        self.now += seconds
        self.progress.passed(passes)


def test_the_time_left_is_that_of_equal_work() -> None:
    watched = Watched()
    watched.progress.plan([("cell 1/2 a", 4000.0), ("cell 2/2 b", 8000.0)])
    watched.progress.begin("cell 1/2 a", 400, share=400)
    watched.work(10.0, 500)  # of 1000 passes guessed for the first hundred images
    assert watched.lines[-1] == (
        "cell 1/2 a", 0.125, "50/400 images; in total 0:10 elapsed, 3:50 remaining",
    )  # fmt: skip
    watched.work(30.0, 1500)
    watched.progress.advance(100, 2000.0)
    watched.work(20.0, 1000)  # now a hundred images are known to take 2000
    assert watched.lines[-1] == (
        "cell 1/2 a",
        0.375,
        "150/400 images; in total 1:00 elapsed, 7:00 remaining",
    )


def test_what_is_found_in_the_store_does_not_count_as_speed() -> None:
    watched = Watched()
    watched.progress.begin("b", 400, share=400)
    watched.progress.advance(200, 2000.0, found=True)
    watched.work(10.0, 1000)
    assert watched.lines[-1] == ("b", 0.75, "300/400 images, 0:10 elapsed, 0:10 remaining")


def test_one_process_shows_the_progress_of_all() -> None:
    watched = Watched()
    watched.progress.begin("b", 400, share=200)
    watched.work(10.0, 0)
    watched.progress.advance(100, 2000.0)
    watched.work(10.0, 0)
    assert watched.lines[-1][2] == "200/400 images, 0:20 elapsed, 0:20 remaining"


def test_lines_come_at_intervals_and_none_without_a_display() -> None:
    watched = Watched()
    watched.progress.begin("b", 100, share=100)
    for _ in range(10):
        watched.work(0.25, 1)
    assert len(watched.lines) == 2
    silent = Progress()
    silent.begin("b", 100, share=100)
    silent.passed(10)
    silent.advance(100, 10.0)


def test_guessed_passes_grow_with_the_settings() -> None:
    assert rough_passes(FGSM()) == 1
    assert rough_passes(PGD(steps=10)) == 10
    assert rough_passes(PGD(steps=10, restarts=3)) == 30
    assert all(rough_passes(kind()) >= 1 for kind in ATTACKS.values())


class Stop(BaseException):
    """An interrupt by Ctrl-C."""


class Interrupted:
    """Lets some chunks of an attack through, then stops; counts what was attacked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.attacked, original = list[int](), PGD.perturb

        def perturb(self_: PGD, victim: Any, x: Tensor, y: Tensor, threat: Any, *, rng: Generator
                    ) -> Tensor:  # fmt: skip
            if len(self.attacked) == allowed:
                raise Stop
            self.attacked.append(len(x))
            return original(self_, victim, x, y, threat, rng=rng)

        monkeypatch.setattr(PGD, "perturb", perturb)


def _pgd(view: str, folder: Path | None) -> Cell:
    task = Task(
        subject=subject(250), attack=PGD(steps=3), threat=ThreatConfig(eps=EPS), view=view, seed=0,
        name="pgd", met=np.ones(250, dtype=bool),
    )  # fmt: skip
    return task.run(folder)


@pytest.mark.parametrize("view", ["sampled", "averaged"])
def test_a_cell_goes_on_where_it_was_cut_off_with_the_same_bits(
    view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _pgd(view, None)
    with monkeypatch.context() as patch:
        Interrupted(patch, allowed=2)
        with pytest.raises(Stop):
            _pgd(view, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "100.npz"]
    (tmp_path / "100.npz").write_bytes(b"cut off")  # damaged: made again
    rest = Interrupted(monkeypatch, allowed=9)
    again = _pgd(view, tmp_path)
    assert rest.attacked == [100, 50]
    for key in ("correct", "averaged", "linf", "l2", "l0", "forwards", "backwards"):
        assert np.array_equal(getattr(again, key), getattr(whole, key))


def _figures(store: Path | None) -> dict[str, Any]:
    data = run_suite(subject(120), SUITES["quick"], ThreatConfig(eps=EPS), store=store).data
    data["provenance"].pop("date")
    for cell in data["cells"]:
        cell.pop("seconds")
    return data


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"other": 1}'])
def test_a_stored_object_without_its_key_is_damaged(text: str, tmp_path: Path) -> None:
    path = tmp_path / "measures.json"
    assert read_object(path, "diversity") is None  # missing
    path.write_text(text)
    assert read_object(path, "diversity") is None
    path.write_text('{"diversity": {}, "other": 1}')
    assert read_object(path, "diversity") == {"diversity": {}, "other": 1}


def test_a_finished_evaluation_leaves_no_chunks_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = list[str]()
    original = stores.write_arrays

    def write(path: Path, arrays: Any) -> None:
        if "forwards" in arrays:  # the chunks of records, not those of attacked images
            kept.append(path.name)
        original(path, arrays)

    monkeypatch.setattr(stores, "write_arrays", write)
    assert _figures(tmp_path / "quick") == _figures(None)
    further = len(_figures(tmp_path / "quick")["further_cells"])
    assert further > 0
    assert kept.count("0.npz") == kept.count("100.npz") == 4 + further
    assert not [path for path in (tmp_path / "quick").iterdir() if path.is_dir()]


def test_chunks_are_the_same_on_any_number_of_processes() -> None:
    def work(images: slice) -> dict[str, Any]:
        return {"start": images.start, "size": images.stop - images.start, "forwards": 0}

    alone = [int(part["size"]) for part in in_chunks(250, work)]
    assert alone == [100, 100, 50]
    shares = [own_images(250, Workers(rank=rank, count=2)) for rank in range(2)]
    assert shares == [150, 100]


def test_arrays_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    assert read_arrays(None) is None
    assert read_arrays(tmp_path / "missing.npz") is None
    (tmp_path / "bad.npz").write_text("no zip")
    assert read_arrays(tmp_path / "bad.npz") is None
    assert Cell.read(tmp_path / "bad.npz") is None
