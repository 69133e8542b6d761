"""The leaderboard: what is ranked together, and the pages in a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import opened
from cli_tools import command
from redefense.attacks import ATTACKS
from redefense.claims import format, leaderboard
from redefense.config import construct
from redefense.evaluation.suite import SUITES, CellSpec
from redefense.results.intervals import accuracy_interval
from redefense.results.schema import suite_version

N = 50


def call_of(spec: CellSpec) -> str:
    return repr(construct(ATTACKS[spec.attack], spec.settings, spec.attack))


def claim(
    name: str,
    share: float,
    *,
    seed: int = 0,
    members: int = 3,
    suite: str = "quick",
    **changes: Any,
) -> format.Claim:
    """A claim whose records agree with its figures: an attack after another takes more images."""
    left = np.arange(N) < share * N
    clean = np.arange(N) < 0.9 * N

    def figure(q: Any) -> format.Figure:
        found = format.figure(accuracy_interval(q.astype(float)))
        assert found is not None
        return found

    definition = SUITES[suite].model_dump(mode="json")
    cells = tuple(
        format.Attacked(
            id=f"{spec.attack}-{spec.view}", attack=spec.attack, view=spec.view,
            aware=spec.view == "members", bounded=True, repr=call_of(spec),
            expected=figure(left), each=format.packed(left),
        )
        for spec in SUITES[suite].cells
    )  # fmt: skip
    plan = format.Plan(
        file=suite, suite=suite, norm="inf", eps=changes.get("eps", 0.1), images=N, seed=0,
        seeds=1, checks="quick", version=suite_version(definition), provenance={"commit": "a" * 40},
    )  # fmt: skip
    found = format.Evaluated(
        data={"name": "digits", "split": "test", "num_images": N, "sha256": "b" * 64},
        norm="inf", eps=0.1, suites=(plan,), clean=figure(clean), unaware=figure(left),
        aware=figure(left), best_single_member=None, averaged=None, over_single=None,
        over_averaged=None, cells=cells, further=(), red_checks=(),
        untouched=format.packed(clean), lowest=format.packed(left, deflate=False),
    ).model_copy(update=changes)  # fmt: skip
    training = format.Training(
        epochs=None, images=100, passes=share / members, minutes=None, parameters=members * 1000,
        weights=f"{seed}" * 64,
    )  # fmt: skip
    run = {
        "seed": seed, "data": {"spec": "digits"}, "defence": {"name": name},
        "ensemble": {"name": "independent", "num_members": members},
    }  # fmt: skip
    return format.Claim(
        schema=1, name=f"{name}-{seed}", authors="A. Author", link="https://example.org",
        licence="MIT", run=run, training=training, evaluations=(found,),
    )  # fmt: skip


def trained(name: str, share: float, *, seed: int = 0) -> format.Claim:
    """A claim of a run, whose other seeds are the same method."""
    it = claim(name, share, seed=seed)
    training = it.training.model_copy(update={"epochs": 1})
    return it.model_copy(update={"training": training})


def groups(folder: Path, *claims: format.Claim) -> list[leaderboard.Group]:
    for number, it in enumerate(claims):
        format.write(it, folder / f"{number}.json")
    return leaderboard.groups_of(leaderboard.read_all(folder))


def names(group: leaderboard.Group) -> list[str]:
    return [row.name for row in group.rows]


def test_rows_are_ordered_by_the_aware_figure(tmp_path: Path) -> None:
    (group,) = groups(tmp_path, claim("low", 0.2), claim("high", 0.6), claim("mid", 0.4))
    assert names(group) == ["high", "mid", "low"]
    assert group.ranked
    assert not group.earlier


def test_other_images_attacks_suites_and_threats_are_ranked_apart(tmp_path: Path) -> None:
    base = claim("base", 0.5)
    (found,) = base.evaluations
    (plan,) = found.suites
    others: list[dict[str, Any]] = [
        {"data": {**found.data, "sha256": "d" * 64}},
        {"eps": 0.2},
        {"norm": "2"},
        {"suites": (plan.model_copy(update={"version": None}),)},
        {"suites": (plan.model_copy(update={"version": "0" * 12}),)},
        {"suites": (plan.model_copy(update={"checks": "full"}),)},
        {"suites": (plan.model_copy(update={"seeds": 3}),)},
        {"cells": (*found.cells, found.cells[0].model_copy(update={"repr": "fgsm(steps=9)"}))},
    ]  # fmt: skip
    claims = [claim(f"other{i}", 0.6, **change) for i, change in enumerate(others)]
    found_groups = groups(tmp_path, base, claim("same", 0.4), *claims)
    assert names(found_groups[0]) == ["base", "same"]
    assert sorted(map(names, found_groups[1:])) == [[f"other{i}"] for i in range(len(others))]
    assert {name for g in found_groups if g.earlier for name in names(g)} == {"other3", "other4"}
    # what was made under an earlier version comes after what was not
    assert [g.earlier for g in found_groups] == sorted(g.earlier for g in found_groups)


def test_seeds_of_one_method_are_one_row_with_the_luck_of_the_training_in_its_interval(
    tmp_path: Path,
) -> None:
    one, other = trained("red", 0.3), trained("red", 0.5, seed=1)
    (group,) = groups(tmp_path, one, other, claim("at", 0.4))
    row = next(row for row in group.rows if row.name == "red")
    assert row.seeds == 2
    assert row.aware is not None
    assert row.aware.value == pytest.approx(0.4, abs=1e-4)
    alone = one.evaluations[0].aware
    assert alone is not None
    assert row.aware.low is not None
    assert alone.low is not None
    assert row.aware.low < alone.low  # two trainings that differ so much say little of a third


def test_one_training_under_two_names_is_one_seed_with_its_lowest_figure(tmp_path: Path) -> None:
    one, other = trained("red", 0.3), trained("red", 0.5, seed=1)
    again = trained("red", 0.4, seed=2).model_copy(update={"training": other.training})
    (group,) = groups(tmp_path, one, other, again)
    (row,) = group.rows
    assert [entry.claim.name for entry in row.entries] == ["red-0", "red-2"]
    assert row.aware is not None
    assert row.aware.value == pytest.approx(0.35, abs=1e-4)


def test_a_suite_of_a_user_is_not_the_whole_one_whatever_its_name(tmp_path: Path) -> None:
    (found,) = claim("x", 0.5).evaluations
    (plan,) = found.suites
    own = plan.model_copy(update={"suite": {"name": "aware", "cells": []}})
    for number, (suites, whole) in enumerate(
        [((own,), False), ((plan,), False), ((plan.model_copy(update={"suite": "aware"}),), True)]
    ):
        (group,) = groups(tmp_path / str(number), claim("x", 0.5, suites=suites))
        assert group.whole is whole


def test_what_no_aware_attacker_met_has_no_rank(tmp_path: Path) -> None:
    found = claim("x", 0.5).evaluations[0]
    unaware = tuple(c for c in found.cells if not c.aware)
    plan = found.suites[0].model_copy(
        update={"suite": {"name": "own", "cells": []}, "version": "e" * 12}
    )
    nobody = claim("x", 0.5, cells=unaware, aware=None, lowest=None, suites=(plan,))
    two = nobody.model_copy(update={"evaluations": (*nobody.evaluations, found)})
    ranked, not_ranked = groups(tmp_path, two)
    assert (ranked.ranked, not_ranked.ranked) == (True, False)


def test_a_claim_that_does_not_hold_is_listed_with_the_reason_and_not_ranked(
    tmp_path: Path,
) -> None:
    good, bad = format.dumped(claim("honest", 0.4)), format.dumped(claim("flattering", 0.4))
    bad["evaluations"][0]["aware"]["value"] = 0.9
    for name, document in (("honest", good), ("flattering", bad)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    made = command("leaderboard", tmp_path, "--out", tmp_path / "site", "--quiet")
    assert (made.code, made.err) == (0, "")
    text = (tmp_path / "site" / "index.html").read_text()
    head, refused = text.split("Claims that do not hold")
    assert "honest" in head
    assert "flattering" not in head
    assert "aware is stated as 90.00 %, its records give 40.00 %" in refused


def test_nothing_is_written_over_the_claims_or_without_any(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    none = command("leaderboard", tmp_path / "claims", "--out", tmp_path / "site")
    assert none.code == 3
    assert "has no claims" in none.err
    format.write(claim("x", 0.4), tmp_path / "claims" / "x.json")
    over = command("leaderboard", tmp_path / "claims", "--out", tmp_path)
    assert over.code == 2
    assert "would overwrite the claims" in over.err
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["x.json"]


def test_what_a_claim_says_is_text_on_the_page(tmp_path: Path) -> None:
    it = claim("<script>alert(1)<script>", 0.4)
    format.write(it, tmp_path / "x.json")
    assert command("leaderboard", tmp_path, "--out", tmp_path / "site").code == 0
    for page in (tmp_path / "site").rglob("*.html"):
        assert "<script>alert" not in page.read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods in one table, one of them a single network, and one under another threat."""
    home = tmp_path_factory.mktemp("board")
    claims = [
        claim("low", 0.2), claim("high", 0.6, members=1), claim("mid", 0.4),
        claim("elsewhere", 0.7, eps=0.3),
    ]  # fmt: skip
    for it in claims:
        format.write(it, home / "stored" / f"{it.name}.json")
    made = command("leaderboard", home / "stored", "--out", home / "site", "--quiet")
    assert made.code == 0, made.err
    return home / "site"


@pytest.fixture(scope="module")
def page(site: Path, browser: Any) -> Iterator[Any]:
    with opened(browser, (site / "index.html").as_uri()) as page:
        yield page


def shown(page: Any) -> list[str]:
    """The methods that are to be seen, from top to bottom."""
    rows = page.locator("tbody tr:visible th")
    return [text.split()[0] for text in rows.all_inner_texts()]


@pytest.mark.browser
def test_a_click_sorts_a_table_and_another_turns_it(page: Any) -> None:
    page.reload()
    assert shown(page) == ["high", "mid", "low", "elsewhere"]
    first = page.locator("table").first
    for column, orders in {
        "aware": (["high", "mid", "low"], ["low", "mid", "high"]),
        "method": (["high", "low", "mid"], ["mid", "low", "high"]),
        "training cost": (["low", "mid", "high"], ["high", "mid", "low"]),
    }.items():
        for order in orders:
            first.get_by_role("button", name=column, exact=True).click()
            assert shown(page)[:3] == order, column
    head = first.get_by_role("columnheader", name="training cost")
    assert head.get_attribute("aria-sort") == "descending"
    first.get_by_role("button", name="method").press("Enter")
    assert shown(page)[:3] == ["high", "low", "mid"]


@pytest.mark.browser
def test_filters_leave_what_fits(page: Any) -> None:
    page.reload()
    page.get_by_label("Kind of defence").select_option("single")
    assert shown(page) == ["high"]
    page.get_by_label("Threat").select_option("L-inf 0.3")
    assert shown(page) == []
    assert page.get_by_text("No claim fits these filters.").is_visible()
    page.get_by_label("Kind of defence").select_option("")
    assert shown(page) == ["elsewhere"]
    page.get_by_label("Threat").select_option("")
    assert len(shown(page)) == 4


@pytest.mark.browser
def test_a_claim_opens_with_its_attacks_and_how_to_recompute_it(page: Any) -> None:
    page.reload()
    page.get_by_role("link", name="mid").click()
    assert page.get_by_role("heading", name="mid-0").is_visible()
    assert page.get_by_text("redefense claim recompute mid-0.json --data digits").is_visible()
    assert page.get_by_role("row").filter(has_text="hinge").count() == 1
    page.get_by_role("link", name="Leaderboard").click()
    assert page.get_by_role("heading", name="Leaderboard of randomized defences").is_visible()


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways_and_keeps_its_contrast(
    site: Path, browser: Any, dark: bool
) -> None:
    for file in ("index.html", "claims/mid-0.html"):
        with opened(browser, (site / file).as_uri(), width=390, dark=dark) as page:
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 390, file
            colours = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
            ink, paper = (
                sum(map(int, colour[4:-1].split(",")[:3]))
                for colour in page.eval_on_selector("body", colours)
            )
            assert abs(ink - paper) > 500
            assert (ink > paper) is dark


@pytest.mark.browser
def test_a_phone_shows_the_aware_figures_without_scrolling(site: Path, browser: Any) -> None:
    with opened(browser, (site / "index.html").as_uri(), width=390) as page:
        boxes = [cell.bounding_box() for cell in page.locator("td.main").all()]
        assert len(boxes) == 4
        assert max(box["x"] + box["width"] for box in boxes if box) <= 390
