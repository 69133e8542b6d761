"""Examples, certificates, several radii, seeds and single networks on the page."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from redefense.checks.catalogue import CATALOGUE
from redefense.errors import DataError
from redefense.report.card import card
from redefense.report.page import summary_table, write_report
from redefense.report.pictures import LARGEST, magnified, png
from report_tools import build_run


def decoded(uri: str) -> Any:
    """The pixels of a PNG in a data URI."""
    start = "data:image/png;base64,"
    assert uri.startswith(start)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(start)))))


def with_examples(run: Path, mixture: list[float] | None = None) -> dict[str, Any]:
    """A run with two stored examples of three members: one fools two, the other none."""
    document = build_run(run, extra={"examples": "quick/examples.npz", "mixture": mixture})
    clean = np.zeros((2, 1, 4, 4), dtype=np.float32)
    attacked = clean.copy()
    attacked[0, 0, 0, 0] = 0.2
    label, predicted = np.array([3, 5]), np.array([[3, 5], [8, 5], [9, 5]])
    np.savez(
        run / "evaluation" / "quick" / "examples.npz",
        index=np.array([0, 2]), label=label, attack=np.array([document["cells"][3]["id"], "clean"]),
        clean=clean, attacked=attacked, correct=predicted == label, predicted=predicted,
    )  # fmt: skip
    return document


def test_examples_show_who_is_fooled_and_the_odds_of_the_draw(tmp_path: Path) -> None:
    document = with_examples(tmp_path / "red")
    (html, *_) = write_report([tmp_path / "red"], tmp_path / "page.html")
    text = html.read_text().replace("\u00a0", " ")
    label = document["cells"][3]["label"]
    assert "2 of 3 members fooled: member 1 predicts 8, member 2 predicts 9. " in text
    assert f"Chance of a right answer: 33 %. Found by: {label}." in text
    assert "no member is fooled. Chance of a right answer: 100 %. No attack changed that." in text
    images = re.findall(r'<img src="([^"]+)" alt="([^"]+)">', text)
    assert len(images) == 6
    assert all(alt for _, alt in images)
    as_it_is, attacked, change = (decoded(uri) for uri, _ in images[:3])
    assert as_it_is.max() == 0
    assert attacked[0, 0] == round(0.2 * 255)
    assert (change[0, 0], change[1, 1]) == (255, 128)
    assert images[2][1] == "The change, magnified 2.5 times"


def test_odds_weigh_the_members(tmp_path: Path) -> None:
    document = with_examples(tmp_path / "red")
    mixture = np.array([0.7, 0.2, 0.1])
    document["mixture"] = mixture.tolist()
    for cell in document["cells"]:
        correct = np.load(tmp_path / "red" / "evaluation" / cell["per_image"])["correct"]
        cell["accuracy"]["expected"] = float((mixture @ correct).mean())
    clean = np.load(tmp_path / "red" / "evaluation" / "quick" / "clean.npz")["correct"]
    document["clean"]["expected"] = float((mixture @ clean).mean())
    (tmp_path / "red" / "evaluation" / "quick.json").write_text(json.dumps(document))
    (html, *_) = write_report([tmp_path / "red"], tmp_path / "page.html")
    assert "Chance of a right answer: 70\u00a0%" in html.read_text()


def test_pictures_stay_small_and_magnification_fills_the_range() -> None:
    pixels = np.linspace(0, 1, 3 * 200 * 300).reshape(3, 200, 300)
    assert max(decoded(png(pixels)).shape[:2]) == LARGEST
    assert decoded(png(pixels[:1, :8, :8])).shape == (8, 8)
    change, times = magnified(np.array([[[0.1, -0.05]]]))
    assert change.tolist() == [[[1.0, 0.25]]]
    assert times == 5
    assert magnified(np.zeros((1, 2, 2)))[0].tolist() == np.full((1, 2, 2), 0.5).tolist()


def test_damaged_examples_are_refused(tmp_path: Path) -> None:
    with_examples(tmp_path / "red")
    np.savez(tmp_path / "red" / "evaluation" / "quick" / "examples.npz", index=np.arange(2))
    with pytest.raises(DataError, match=r"examples\.npz is damaged: missing label"):
        summary_table([tmp_path / "red"])


def test_certificates_stand_on_page_and_card(tmp_path: Path) -> None:
    build_run(tmp_path / "red")
    level = {
        "norm": "2", "radius": 0.125, "sigma": 0.25, "draws": 1000, "single": 0.512, "vote": 0.604,
        "confidence": 0.999,
    }  # fmt: skip
    document = {
        "schema": 1, "kind": "certificate", "clean": 0.7, "certificates": [level],
        "data": {"name": "digits", "split": "test", "num_images": 360},
    }  # fmt: skip
    folder = tmp_path / "red" / "certificates"
    folder.mkdir()
    (folder / "sigma-0.25.json").write_text(json.dumps(document))
    html, md, *_ = write_report([tmp_path / "red"], tmp_path / "page.html")
    for text in (html.read_text(), md.read_text(), card(tmp_path / "red")):
        for shown in ("0.125", "51.2", "60.4", "99.9", "360 test images of digits"):
            assert shown in text
    (folder / "sigma-0.25.json").write_text(json.dumps(document | {"certificates": []}))
    with pytest.raises(DataError, match="not a valid certificate: certificates"):
        write_report([tmp_path / "red"], tmp_path / "page.html")


def test_the_curve_over_radii_stands_on_page_and_card(tmp_path: Path) -> None:
    points = [
        {"eps": eps, "unaware": 0.8 - eps, "unaware_interval": None,
         "aware": 0.7 - eps, "aware_interval": [0.65 - eps, 0.75 - eps]}
        for eps in (0.1, 0.2)
    ]  # fmt: skip
    build_run(tmp_path / "red", extra={"eps_curve": points})
    html, md, *_ = write_report([tmp_path / "red"], tmp_path / "page.html")
    assert "evaluated at several radii" in html.read_text()
    for text in (html.read_text(), md.read_text(), card(tmp_path / "red")):
        for shown in ("70.0", "60.0", "50.0"):
            assert shown in text
    assert "45.0 to 55.0" in html.read_text()


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"eps_curve": [{"aware": 0.5}]}, r"eps_curve\.0\.eps"),
        ({"eps_curve": [{"eps": 0.1, "aware_interval": [0.1]}]}, r"eps_curve\.0\.aware_interval"),
        ({"curve_cost": {"attack": 7}}, r"curve_cost\.attack"),
        ({"best_mixture": {"mixture": "even"}}, r"best_mixture\.mixture"),
    ],
    ids=["eps", "interval", "cost", "mixture"],
)
def test_a_damaged_record_of_a_curve_is_named(
    extra: dict[str, Any], key: str, tmp_path: Path
) -> None:
    build_run(tmp_path / "red", extra=extra)
    with pytest.raises(DataError, match=f"is not a valid evaluation: {key}"):
        write_report([tmp_path / "red"], tmp_path / "page.html")


def test_the_curve_states_its_cost(tmp_path: Path) -> None:
    cost = {"attack": "Hinge(steps=20)", "radii": 9, "images": 200, "forwards": 540.2,
            "backwards": 540.0}  # fmt: skip
    build_run(tmp_path / "red", extra={"curve": [[0.0, 0.9], [0.2, 0.3]], "curve_cost": cost})
    (html, *_) = write_report([tmp_path / "red"], tmp_path / "page.html")
    assert (
        "Hinge at 9 radii on the first 200 images, 540 forward and 540 backward passes per image"
        in html.read_text()
    )


def test_a_folder_of_runs_stands_for_all_that_were_evaluated(tmp_path: Path) -> None:
    for name in ("runs/a", "runs/deep/b"):
        build_run(tmp_path / name)
    (tmp_path / "runs" / "not-evaluated").mkdir()
    (tmp_path / "runs" / "not-evaluated" / "run.json").write_text("{}")
    assert [row["run"] for row in summary_table([tmp_path / "runs"])] == ["a", "b"]
    with pytest.raises(DataError, match="holds no evaluation"):
        summary_table([tmp_path / "runs" / "not-evaluated"])


def test_one_network_has_one_figure_under_attack(tmp_path: Path) -> None:
    build_run(tmp_path / "one", members=1)
    html, md, *_ = write_report([tmp_path / "one"], tmp_path / "page.html")
    text = html.read_text()
    main = text[text.index("<main") : text.index('<h2 id="provenance"')]
    for absent in ("averaged ensemble", "best member alone", "unaware attacks",
                   "Does the randomness", "members fooled", "may try again"):  # fmt: skip
        assert absent not in main
    assert "one network" in main
    row = next(line for line in md.read_text().splitlines() if line.startswith("| one |"))
    assert row.count("\u2013") == 3


def test_a_red_check_says_what_it_means_and_what_to_do(tmp_path: Path) -> None:
    red: dict[str, Any] = {
        "id": "S22",
        "passed": False,
        "detail": "64 of 64 input gradients are zero",
    }
    build_run(tmp_path / "red", extra={"checks": [red]})
    html, md, *_ = write_report([tmp_path / "red"], tmp_path / "page.html")
    entry = CATALOGUE["S22"]
    for text in (html.read_text(), md.read_text()):
        plain = re.sub(r"\\|</?code>", "", text).replace("&#39;", "'")
        assert red["detail"] in plain
        for words in (entry.red, entry.todo):
            assert words.replace("`", "") in plain.replace("`", "")
