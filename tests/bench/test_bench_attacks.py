"""The attack benchmark: both tables on the shipped digits, and what it does without the library."""

import json

import numpy as np
import pytest
import torch

from redefense.bench import attacks as bench
from redefense.bench.attack_tables import tables
from redefense.errors import ConfigError

NAMES = ["fgsm", "pgd", "apgd", "deepfool", "meanprob_pgd"]


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    return bench.run(images=16, model="mlp", train_images=500, names=NAMES)


def rows(result: dict[str, object], table: str) -> dict[str, dict[str, object]]:
    found = result[table]["rows"]  # type: ignore[index]  # JSON
    return {row["attack"]: row for row in found}


def test_the_first_table_compares_default_preset_and_library(result: dict[str, object]) -> None:
    single = rows(result, "single")
    assert list(single) == [name for name in NAMES if name != "meanprob_pgd"]
    for row in single.values():
        for kind in ("default", "preset", "theirs"):
            assert 0 <= row[kind]["accuracy"] <= 1  # type: ignore[index]  # JSON
        assert row["times_faster"] > 0  # type: ignore[operator]  # JSON


def test_passes_are_those_of_the_published_table(result: dict[str, object]) -> None:
    single = rows(result, "single")
    for name, passes in (("fgsm", 1), ("pgd", 10)):
        for kind in ("preset", "theirs"):
            figures = single[name][kind]
            assert (figures["forwards"], figures["backwards"]) == (passes, passes)  # type: ignore[index]  # JSON


def test_the_deterministic_preset_does_what_the_library_does(result: dict[str, object]) -> None:
    fgsm = rows(result, "single")["fgsm"]
    assert fgsm["preset"]["accuracy"] == fgsm["theirs"]["accuracy"]  # type: ignore[index]  # JSON


def test_the_second_table_shows_the_gap_of_a_naive_evaluation(result: dict[str, object]) -> None:
    random = rows(result, "random")
    assert random["apgd"]["unchanged"] > 0  # type: ignore[operator]  # it hands back clean images
    assert random["meanprob_pgd"]["unchanged"] == 0
    assert random["meanprob_pgd"]["accuracy"] < random["apgd"]["accuracy"]  # type: ignore[operator]


def test_the_result_is_json_and_text_with_its_provenance(result: dict[str, object]) -> None:
    assert json.loads(json.dumps(result)) == result
    text = tables(result)
    assert "mlp on digits, 16 images" in text
    for name in NAMES:
        assert name in text


def test_without_the_library_its_columns_stay_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_library", lambda: None)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    lines: list[str] = []
    result = bench.run(images=4, model="linear", train_images=200, names=["fgsm"], log=lines.append)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # type: ignore[index]
    assert "theirs" not in rows(result, "single")["fgsm"]
    assert any("pip install --no-deps torchattacks==3.5.1" in line for line in lines)


def test_an_unknown_attack_is_refused() -> None:
    with pytest.raises(ConfigError, match="no attack named nonsense"):
        bench.run(names=["nonsense"])
    with pytest.raises(ConfigError, match="leaves out the table of arc"):
        bench.run(names=["arc"], single=True)
    with pytest.raises(ConfigError, match="got 0"):
        bench.run(names=["fgsm"], train_images=0)


def test_for_the_first_table_alone_one_network_is_trained() -> None:
    lines: list[str] = []
    result = bench.run(
        images=2, model="linear", names=["fab"], train_images=200, single=True, log=lines.append
    )
    assert result["settings"]["members"] == 1
    assert result["random"] is None
    assert "random ensemble" not in tables(result)
    assert "200 training images" in tables(result)
    assert sum("trained 1 x linear on 200 images" in line for line in lines) == 1
