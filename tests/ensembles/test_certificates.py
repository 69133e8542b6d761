"""Certificates of Gaussian noise in L2, for one draw and for the vote, against closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import beta
from torch import Tensor, nn

from cli_tools import command
from redefense.config import ThreatConfig, override
from redefense.data import load_dataset
from redefense.data import test_indices as test_images
from redefense.errors import ConfigError, DataError
from redefense.evaluation.cells import Subject
from redefense.evaluation.stochastic.cells import Draws
from redefense.evaluation.stochastic.certify import certify_run, right_answers
from redefense.evaluation.stochastic.measure import run_drawn
from redefense.evaluation.suite import CellSpec, Suite
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.stochastic import GaussianNoise, Stochastic
from redefense.stochastic.certificates import certificate, least_chance
from redefense.train.experiment import train

SIGMA, RADIUS = 0.3, 0.2


class Plane(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).sum(1) / 4 - 2.0
        return torch.stack([z, -z], 1)


def distances(x: Tensor) -> NDArray[np.float64]:
    """How far an image lies inside of class 0, in L2: the normal has length 1."""
    found: NDArray[np.float64] = Plane()(x)[:, 0].double().numpy()
    return found


def test_bounds_of_chances_are_those_of_clopper_and_pearson() -> None:
    right = np.array([0, 1, 40, 99, 100])
    low = least_chance(right, 100, 0.01)
    assert low[0] == 0
    assert low[1:] == pytest.approx(beta.ppf(0.01, right[1:], 101 - right[1:]))
    assert low[-1] == pytest.approx(0.01 ** (1 / 100))


def test_of_a_linear_network_the_certificate_is_the_worst_case_itself() -> None:
    x = 0.25 + 0.6 * torch.rand(50, 1, 4, 4, generator=stream(0, "certificate"))
    y, distance = torch.zeros(50, dtype=torch.long), distances(x)
    exact = ndtr((distance - RADIUS) / SIGMA)
    # with the chances known, shifting by the radius is what moving to the plane does
    assert ndtr(ndtri(ndtr(distance / SIGMA)) - RADIUS / SIGMA) == pytest.approx(exact)
    many = np.round(ndtr(distance / SIGMA) * 10**7).astype(np.int64)
    found = certificate(many, 10**7, sigma=SIGMA, radius=RADIUS)
    assert found.single == pytest.approx(exact.mean(), abs=1e-3)
    assert found.single < exact.mean()
    assert found.vote == (distance > RADIUS + 1e-3).mean()
    # from draws of the network, it keeps below
    right = right_answers(GaussianNoise(Plane(), sigma=SIGMA), x, y, 200, seed=0)
    drawn = certificate(right, 200, sigma=SIGMA, radius=RADIUS)
    assert exact.mean() - 0.2 < drawn.single < exact.mean()
    assert 0 < drawn.vote <= (distance > RADIUS).mean()


def test_certificates_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    chance = ndtr(rng.normal(1.0, 0.8, size=40))
    single, vote = ndtr(ndtri(chance) - 0.5).mean(), (ndtri(chance) > 0.5).mean()
    for _ in range(200):
        found = certificate(rng.binomial(60, chance), 60, sigma=1.0, radius=0.5, alpha=0.05)
        assert found.single <= single
        assert found.vote <= vote


def test_the_vote_may_be_proven_where_one_draw_is_often_wrong() -> None:
    found = certificate(np.array([700]), 1000, sigma=1.0, radius=0.1)
    assert found.vote == 1
    assert found.single < 0.7


def test_settings_that_prove_nothing_are_refused() -> None:
    right = np.array([3])
    for settings, said in (
        ({"sigma": 0.0, "radius": 1.0}, "sigma must be positive, got 0.0"),
        ({"sigma": 1.0, "radius": -1.0}, "radius must not be negative"),
        ({"sigma": 1.0, "radius": float("nan")}, "radius must not be negative"),
        ({"sigma": 1.0, "radius": 1.0, "alpha": 1.0}, r"alpha must lie in \(0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            certificate(right, 5, **settings)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two small members."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = ["epochs=1", "ensemble.num_members=2", "ensemble.model=mlp", "data.images=200"]
    train(override(recipe("digits-vanilla"), changes), folder, quiet=True)
    return folder


def test_a_trained_run_is_certified(home: Path) -> None:
    document, target = certify_run(home, sigma=0.1, draws=20, images=40)
    assert json.loads(target.read_text()) == document
    clean, half, whole = document["certificates"]
    assert [one["radius"] for one in (clean, half, whole)] == [0.0, 0.05, 0.1]
    assert document["clean"] >= clean["single"] >= half["single"] >= whole["single"]
    again, _ = certify_run(home, sigma=0.1, draws=20, images=40)
    assert again["certificates"] == document["certificates"]
    with pytest.raises(ConfigError, match=r"--out must name a \.json file"):
        certify_run(home, sigma=0.1, draws=1, images=1, out=home / "x.txt")
    with pytest.raises(ConfigError, match="is not a certificate; choose another file"):
        certify_run(home, sigma=0.1, draws=1, images=1, out=home / "run.json")


def test_other_data_than_the_runs_own_are_named_and_never_taken_in_silence(tmp_path: Path) -> None:
    def arrays(name: str, seed: int) -> Path:
        rng, labels = np.random.default_rng(seed), np.arange(60) % 3
        images = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / name, x_train=images, y_train=labels, x_test=images, y_test=labels)
        return tmp_path / name

    here, there = arrays("here.npz", 0), arrays("there.npz", 1)
    changes = ["epochs=1", "ensemble.num_members=1", "ensemble.model=mlp", f"data.spec=npz:{here}"]
    train(override(recipe("digits-vanilla"), changes), tmp_path / "run", quiet=True)
    document, _ = certify_run(tmp_path / "run", sigma=0.1, draws=2, images=3, data=f"npz:{there}")
    assert document["provenance"]["data"] == f"npz:{there}"
    with pytest.raises(DataError, match=r"trained on 3 classes of .* images, the data has 10 of"):
        certify_run(tmp_path / "run", sigma=0.1, draws=2, images=3, data="digits")
    there.replace(here)
    with pytest.raises(DataError, match=f"npz:{here} is not the data that .* was trained on"):
        certify_run(tmp_path / "run", sigma=0.1, draws=2, images=3)


def test_a_run_with_noise_of_its_own_is_certified_with_that_noise(tmp_path: Path) -> None:
    changes = ["epochs=1", "ensemble.model=mlp", "data.images=200"]
    ensemble = train(override(recipe("digits-image-noise"), changes), tmp_path, quiet=True)
    document, _ = certify_run(tmp_path, sigma=0.25, draws=20, images=40)
    data = load_dataset("digits").test
    index = test_images(len(data), 40)
    x, y = data.float(index), data.labels[index]
    # without further noise
    expected = right_answers(ensemble.member(0), x, y, 20, seed=0)
    assert document["clean"] == expected.mean() / 20
    with pytest.raises(
        ConfigError, match=r"adds noise of standard deviation 0.25 .*, got sigma 0.5"
    ):
        certify_run(tmp_path, sigma=0.5, draws=1, images=1)


def test_commands_certify_and_measure_by_draws(home: Path) -> None:
    done = command("certify", home, "--sigma", 0.1, "--eps", 0.05, "--draws", 9, "--images", 10)
    assert done.code == 0, done.err
    assert done.out.startswith("l2 0.05: certified accuracy of one draw")
    plan = home / "fgsm.json"
    plan.write_text('{"cells": [{"attack": "fgsm", "view": "sampled"}]}')
    out = home / "evaluation" / "drawn.json"
    done = command(
        "evaluate", home, "--suite", plan, "--stochastic", "on", "--images", 10,
        "--out", out, "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    stored = json.loads(out.read_text())
    assert stored["stochastic"] is True
    assert stored["headline"]["exact"] is False
    assert stored["headline"]["aware"] is None


def test_an_attack_may_not_leave_less_than_is_proven() -> None:
    x = 0.25 + 0.6 * torch.rand(60, 1, 4, 4, generator=stream(0, "certificate"))
    y = torch.zeros(60, dtype=torch.long)
    network = Stochastic(GaussianNoise(Plane(), sigma=SIGMA), draws=4)
    subject = Subject(network, x, y, np.arange(60), "planes")
    suite = Suite(name="one", cells=(CellSpec(attack="meanprob_pgd", view="members"),))
    report = run_drawn(
        subject, suite, ThreatConfig(norm="2", eps=RADIUS), draws=Draws(score=400, attack=4)
    )
    low, high = report.headline["aware_interval_draws"]
    assert low <= ndtr((distances(x) - RADIUS) / SIGMA).mean() <= high
    assert report.data["certificate"]["single"] < high
    assert {c["id"]: c["passed"] for c in report.data["checks"]}["D3"]
