"""Whatever kind of bundle is served, a request is answered as its run.py and as torch answer it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export_tools import SHAPE, bundle, hyper, plain, set_config, spoil, torch_logits
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError, DataError
from redefense.export import runner
from redefense.export.quantise import Int8
from redefense.export.write import synthetic
from redefense.serve.audit.client import Client, Form
from redefense.serve.model import Model
from redefense.serve.settings import Settings
from redefense.stochastic import Stochastic
from serve_tools import make_bundle, serving

IMAGES = synthetic(SHAPE, 24).numpy()
ONLY_SECOND = [0.0, 1.0]


def small() -> Ensemble:
    return plain(2, "digits-cnn")


def compact() -> Ensemble:
    return hyper(2)


MAKERS: dict[str, tuple[Callable[[], Ensemble], Int8 | None]] = {
    "plain": (small, None),
    "int8": (small, Int8(calibration=synthetic(SHAPE, 128))),
    "int8 by batch": (small, Int8()),
    "compact": (compact, None),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """A bundle of a kind, made once: with equal shares, or all for the second member."""
    root, known = tmp_path_factory.mktemp("kinds"), dict[tuple[str, bool], Path]()

    def make(kind: str, second: bool) -> Path:
        if (kind, second) not in known:
            out = root / f"{kind.replace(' ', '-')}-{int(second)}"
            if second:
                shares = {"mixture": ONLY_SECOND, "randomized": False}
                known[kind, True] = spoil(make(kind, False), out, lambda b: set_config(b, **shares))
            else:
                maker, int8 = MAKERS[kind]
                known[kind, False] = bundle(maker(), out, int8=int8)
        return known[kind, second]

    return make


def agree(found: list[int], wanted: np.ndarray, kind: str) -> bool:
    """Equal classes; where 8 bits answer, on the share that a bundle promises."""
    share = float((np.array(found) == wanted).mean())
    return share >= (runner.AGREEMENT["int8"] if kind.startswith("int8") else 1.0)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_request_is_answered_as_by_run_py_and_by_the_member_in_torch(
    kind: str, made: Callable[[str, bool], Path], tmp_path: Path
) -> None:
    folder = made(kind, True)
    places = [tmp_path / f"{i}.npy" for i in range(len(IMAGES))]
    for place, image in zip(places, IMAGES, strict=True):
        np.save(place, image)
    words = [sys.executable, "-I", str(folder / "run.py"), *map(str, places)]
    said = subprocess.run(words, capture_output=True, check=True, text=True).stdout
    by_runner = [line.split("\t")[1] for line in said.splitlines()]
    logits = torch_logits(MAKERS[kind][0](), IMAGES)[1]
    with serving(Model(folder, threads=1), Settings(grace=0.0)) as url, Client(url) as client:
        forms: list[Form] = ["binary", "json"]
        for form in forms:
            reply = client.infer(IMAGES, form)
            assert reply.output("label") == by_runner
            assert agree(reply.output("class_id"), logits.argmax(-1), kind)


@pytest.mark.parametrize("kind", MAKERS)
def test_each_image_is_answered_by_the_member_that_was_drawn(
    kind: str, made: Callable[[str, bool], Path]
) -> None:
    folder = made(kind, False)
    logits = torch_logits(MAKERS[kind][0](), IMAGES)
    opened = runner.open_bundle(folder)
    sessions = [opened.open(m, threads=1) for m in range(2)]
    settings = Settings(research=True, seed=5, grace=0.0)
    with serving(Model(folder, threads=1), settings) as url, Client(url) as client:
        reply = client.infer(IMAGES)
    drawn, found = np.array(reply.output("member")), reply.output("class_id")
    assert set(drawn) == {0, 1}
    alone = [
        int(runner.logits_of(sessions[m], image[None]).argmax())
        for m, image in zip(drawn, IMAGES, strict=True)
    ]
    assert found == alone
    assert agree(found, logits[drawn, np.arange(len(drawn))].argmax(-1), kind)


@pytest.mark.parametrize(
    ("kind", "grouped"),
    [*((kind, False) for kind in MAKERS), ("plain", True), ("int8", True), ("compact", True)],
)
def test_an_answer_does_not_depend_on_batch_mates(
    kind: str, grouped: bool, made: Callable[[str, bool], Path]
) -> None:
    settings = Settings(scores=True, grouped=grouped, grace=0.0)
    bright = np.ones_like(IMAGES[:1])
    with serving(Model(made(kind, True), threads=1), settings) as url, Client(url) as client:
        alone = client.infer(IMAGES[:1]).output("scores")
        beside = client.infer(np.concatenate([IMAGES[:1], bright])).output("scores")
    assert beside[: len(alone)] == pytest.approx(alone, abs=1e-6)


def test_members_whose_answers_would_depend_on_mates_are_not_grouped(
    made: Callable[[str, bool], Path],
) -> None:
    for kind in MAKERS:
        model = Model(made(kind, False), threads=1)
        if kind == "int8 by batch":
            with pytest.raises(ConfigError, match="--calibration 0"):
                model.check_grouped(True)
        else:
            model.check_grouped(True)
        model.check_grouped(False)


def test_members_that_draw_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="member 0 answers the same image in different ways"):
        Model(make_bundle(tmp_path / "noisy", noise=0.1))
    with pytest.raises(ConfigError, match="a stochastic network cannot be exported"):
        bundle(Stochastic(plain(2)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_damaged_template_or_weights_are_not_served(
    made: Callable[[str, bool], Path], tmp_path: Path
) -> None:

    for name in ("template.onnx", "weights.npz"):
        bad = tmp_path / name
        shutil.copytree(made("compact", False), bad)
        content = bytearray((bad / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bad / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            Model(bad, threads=1)
