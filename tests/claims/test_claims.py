"""Published figures: what a claim must hold, and the cheap ones made again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import redefense
from cli_tools import command
from redefense.claims import format, make, tables
from redefense.claims.check import check
from redefense.claims.leaderboard import evaluate_command
from redefense.claims.recompute import differences, recompute
from redefense.config import override
from redefense.errors import DataError
from redefense.evaluation.api import evaluate_run
from redefense.evaluation.suite import Suite
from redefense.recipes import recipe
from redefense.report.tables import percent
from redefense.results.intervals import paired_difference
from redefense.results.join import join
from redefense.results.paired import NO_AWARE, NO_RECORDS
from redefense.train.experiment import train

ROOT = Path(redefense.__file__).resolve().parents[2]
STORED = sorted((ROOT / "claims").glob("*.json"))
CHEAP = 150_000
"""Forward passes of one member that a test may spend on a training."""

MINE: dict[str, Any] = {
    "name": "mine",
    "cells": [
        {"attack": "fgsm", "view": "sampled"},
        {"attack": "hinge", "view": "members", "settings": {"steps": 2}},
    ],
}


def cheap(path: Path) -> bool:
    """Whether a test has the data and the time to make this claim again."""
    claim = format.read(path)
    took = claim.training
    few = (took.passes or 0) * (took.images or 0) < CHEAP
    return few and claim.run["data"]["spec"] == "digits"


SMALL = ("epochs=1", "data.images=64", "ensemble.model=mlp", "ensemble.num_members=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a small run, each under a suite of the library's and one of the user's."""
    out = tmp_path_factory.mktemp("runs")
    (out / "mine.json").write_text(json.dumps(MINE))
    for seed in (0, 1):
        run = override(recipe("digits-vanilla"), [*SMALL, f"seed={seed}"])
        train(run, out / f"tiny-{seed}", quiet=True)
        for suite, name in (("quick", "quick"), (str(out / "mine.json"), "mine-30")):
            target = out / f"tiny-{seed}" / "evaluation" / f"{name}.json"
            evaluate_run(out / f"tiny-{seed}", suite=suite, images=30, out=target)
    return out


def claim_of(runs: Path, seed: int = 0) -> format.Claim:
    return make.claim([runs / f"tiny-{seed}"])


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_claim_holds_and_says_where_it_comes_from(path: Path) -> None:
    claim, text = format.read(path), path.read_text()
    assert [f for f in check(path) if f.severity == "error"] == []
    assert claim.name == path.stem
    assert not re.search(r'"/|\\\\|:/', text), "a path of somebody's machine"
    for plan in (plan for found in claim.evaluations for plan in found.suites):
        assert plan.provenance.keys() >= {"commit", "torch", "machine", "seed", "date"}
        assert re.fullmatch(r"[0-9a-f]{40}", plan.provenance["commit"]), "code without a commit"


@pytest.mark.parametrize(
    "path", [path for path in STORED if cheap(path)], ids=lambda path: path.stem
)
def test_a_cheap_claim_can_be_made_again(path: Path, tmp_path: Path) -> None:
    assert recompute(format.read(path), "digits", tmp_path) == []


def test_there_are_claims_that_a_test_makes_again() -> None:
    assert any(cheap(path) for path in STORED)


def test_a_claim_is_what_the_report_joins(runs: Path, tmp_path: Path) -> None:
    claim = claim_of(runs)
    (result,) = join([runs / "tiny-0"])
    (found,) = claim.evaluations
    assert result.aware is not None
    assert found.aware is not None
    assert found.aware.value == pytest.approx(result.aware.value, abs=1e-6)
    assert {plan.file for plan in found.suites} == {"quick", "mine-30"}
    # a suite of ours travels by name, another one whole
    suites = {plan.file: plan.suite for plan in found.suites}
    assert suites["quick"] == "quick"
    assert Suite.model_validate(suites["mine-30"]) == Suite.model_validate(MINE)
    path = format.write(claim, tmp_path / "claim.json")
    assert format.read(path) == claim.model_copy(update={"sha256": format.dumped(claim)["sha256"]})
    assert [f for f in check(path) if f.severity == "error"] == []
    assert str(runs) not in path.read_text()


def test_a_changed_figure_is_noticed_and_an_equal_one_is_not(runs: Path) -> None:
    claim = claim_of(runs)
    assert differences(claim, claim) == []
    (found,) = claim.evaluations
    better = found.model_copy(update={"aware": format.Figure(value=0.99, low=0.98, high=1.0)})
    (line,) = differences(claim.model_copy(update={"evaluations": (better,)}), claim)
    assert line.startswith("tiny-0, 30 images, aware: 99.0 [98.0, 100.0], now ")
    far = format.Figure(value=0.99, low=0.98, high=1.0)
    alone = (found.alone[0], far)
    other = found.model_copy(update={"over_single": far, "over_averaged": None, "alone": alone})
    lines = differences(claim.model_copy(update={"evaluations": (other,)}), claim)
    assert [line.split(":")[0].split(", ")[-1] for line in lines] == [
        "over_single", "over_averaged", "member 1 alone",
    ]  # fmt: skip
    # in older claims the members were under other attacks
    older = other.model_copy(update={"further": None})
    assert differences(claim.model_copy(update={"evaluations": (older,)}), claim) == []


def test_a_claim_is_not_trained_again_on_data_of_another_name(runs: Path, tmp_path: Path) -> None:
    it = claim_of(runs)
    (found,) = it.evaluations
    renamed = found.model_copy(update={"data": {**found.data, "name": "numbers"}})
    it = it.model_copy(update={"evaluations": (renamed,)})
    # another name is another validation split, so that the weights would differ
    with pytest.raises(DataError, match="digits is named digits, and the data of tiny-0 numbers"):
        recompute(it, "digits", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_claim_under_a_suite_that_fixes_its_threat_is_recomputed(
    runs: Path, tmp_path: Path
) -> None:
    run, suite = tmp_path / "tiny", tmp_path / "fixed.json"
    shutil.copytree(runs / "tiny-0", run, ignore=shutil.ignore_patterns("evaluation"))
    fixed = [{**cell, "threat": {"eps": 0.05}} for cell in MINE["cells"]]
    suite.write_text(json.dumps({"name": "fixed", "cells": fixed}))
    evaluate_run(run, suite=str(suite), images=10)
    it = make.claim([run])
    (found,) = it.evaluations
    assert (found.eps, found.suites[0].eps) == (0.05, 0.2)
    assert recompute(it, "digits", tmp_path / "again", weights=run) == []
    assert evaluate_command(found.suites[0]) == (
        "redefense evaluate DIR --suite fixed.json --images 10"
    )


@pytest.mark.parametrize("option", [{"precision": "auto"}, {"cascade": True}], ids=str)
def test_options_of_an_evaluation_make_no_other_suite(
    runs: Path, tmp_path: Path, option: dict[str, Any]
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(runs / "tiny-0", run, ignore=shutil.ignore_patterns("evaluation"))
    evaluate_run(run, images=10, **option)
    it = make.claim([run])
    (found,) = it.evaluations
    (plan,) = found.suites
    assert (plan.suite, plan.cascade, plan.precision) == (
        "quick", option.get("cascade"), option.get("precision"),
    )  # fmt: skip
    assert ("--precision auto" in evaluate_command(plan)) == ("precision" in option)
    assert recompute(it, "digits", tmp_path / "again", weights=run) == []


def test_a_claim_is_recomputed_from_the_named_run(runs: Path, tmp_path: Path) -> None:
    it = claim_of(runs)
    path = format.write(it, tmp_path / "claim.json")
    words = ("claim", "recompute", path, "--data", "digits", "--out", tmp_path / "again")
    held = command(*words, "--run", runs / "tiny-0")
    assert (held.code, held.out) == (0, f"{path}: holds\n")
    assert "quick" in held.err  # says what it does
    checked = command("claim", "check", path, "--quiet")
    assert (checked.code, checked.out, checked.err) == (0, "", "")
    (found,) = it.evaluations
    better = found.model_copy(update={"aware": format.Figure(value=0.99, low=0.98, high=1.0)})
    format.write(it.model_copy(update={"evaluations": (better,)}), path)
    outside = command(*words, "--run", runs / "tiny-0", "--quiet")
    assert outside.code == 1
    assert outside.err == ""
    first, last = outside.out.splitlines()
    assert first.startswith("tiny-0, 30 images, aware: 99.0 [98.0, 100.0], now ")
    assert last == f"{path}: does not hold"
    other = command(*words, "--weights", runs / "tiny-1", "--quiet")
    assert other.code == 3
    assert "the claim is of" in other.err


@pytest.mark.parametrize("part", ["lowest", "further"])
def test_a_claim_is_whole_with_its_worst_case_and_all_attacks(
    runs: Path, tmp_path: Path, part: str
) -> None:
    it = claim_of(runs)
    (found,) = it.evaluations
    cell = found.cells[0].model_copy(update={"each": format.packed(np.zeros(3))})
    change = {"lowest": found.lowest[:-5] if found.lowest else None, "further": (cell,)}[part]
    damaged = found.model_copy(update={part: change})
    path = tmp_path / "tiny-0.json"
    format.write(it.model_copy(update={"evaluations": (damaged,)}), path)
    named = {"lowest": "the worst case", "further": cell.id}[part]
    with pytest.raises(DataError, match=f"the records of {named} are damaged"):
        tables.read_whole(path)


@pytest.mark.parametrize("records", ["", "broken", None])
def test_tables_of_damaged_records_are_one_line(
    runs: Path, tmp_path: Path, records: str | None
) -> None:
    it = claim_of(runs)
    (found,) = it.evaluations
    few = format.packed(np.zeros(3)) if records is None else records
    cell = found.cells[0].model_copy(update={"each": few})
    damaged = found.model_copy(update={"cells": (cell, *found.cells[1:])})
    path = tmp_path / "tiny-0.json"
    format.write(it.model_copy(update={"evaluations": (damaged,)}), path)
    for words in (("table", path, "--attacks"), ("compare", "tiny", "--claims", tmp_path)):
        done = command("claim", *words)
        assert (done.code, done.out) == (3, "")
        assert done.err.strip() == (
            f"redefense: {path}: the records of {cell.id} are damaged; "
            f"see `redefense claim check {path}`"
        )


def test_the_table_shows_the_claims_and_paired_differences(runs: Path) -> None:
    both = [claim_of(runs, seed) for seed in (0, 1)]
    heading, _, first, second = tables.table(both, against="tiny-0").splitlines()
    assert [cell.strip() for cell in heading.split("|")[1:-1]] == [
        *tables.COLUMNS, "aware, against tiny-0",
    ]  # fmt: skip
    clean = both[0].headline.clean
    assert clean is not None
    assert f"| tiny-0 | 30 | {100 * clean.value:.1f} [" in first
    assert first.endswith("|  |")
    one, other = (c.headline.per_image() for c in both)
    assert one is not None
    assert other is not None
    gain = paired_difference(other, one)
    assert f"| {100 * gain.value:+.1f} [" in second
    assert np.allclose(100 * (other - one).mean(), 100 * gain.value)


def test_the_table_of_attacks_shows_the_least_that_each_left(runs: Path) -> None:
    both = [claim_of(runs, seed) for seed in (0, 1)]
    heading, _, views, clean, *rows, _, note = tables.attacks_table(both).splitlines()
    assert heading == "| attack | tiny-0 | tiny-1 |"
    assert views == "| views | sampled | sampled |"
    assert clean.startswith("| clean |")
    columns = {
        row.split(" | ")[0].strip("| ").replace("\\", ""): row.split(" | ")[1] for row in rows
    }
    found = both[0].headline
    cells = [cell for cell in found.cells if not cell.aware]
    least: dict[str, float] = {}
    for c in cells:
        assert c.expected is not None
        least[c.attack] = min(c.expected.value, least.get(c.attack, 1.0))
    least["least of these"] = min(least.values())
    assert found.aware is not None
    worst = format.least(found, [cell.key for cell in cells])
    least["worst of these for each image"] = worst.mean()
    assert found.aware.value - 1e-5 <= worst.mean() <= least["least of these"] + 1e-5
    least["with attackers who know"] = found.aware.value
    assert columns == {attack: f"{100 * value:.1f}" for attack, value in least.items()}
    shown = [c.expected for it in both for c in it.headline.cells if not c.aware]
    widest = max((figure.high or 1) - figure.value for figure in shown if figure)
    assert float(note.split()[-5]) >= round(100 * widest, 1)


def test_the_table_of_the_draw_shows_what_the_report_joins(runs: Path) -> None:
    both = [claim_of(runs, seed) for seed in (0, 1)]
    heading, _, first, _ = tables.draw_table(both).splitlines()
    named = [cell.strip() for cell in heading.split("|")[1:-1]]
    assert named == list(tables.DRAW_COLUMNS)
    (joined,) = join([runs / "tiny-0"])
    assert joined.aware is not None
    assert joined.over_alone is not None
    assert joined.best_alone is not None
    cells = dict(zip(named, (cell.strip() for cell in first.split("|")[1:-1]), strict=True))
    assert cells["drawn"].startswith(f"{100 * joined.aware.value:.1f} [")
    assert cells["best member"] == percent(joined.best_alone)
    assert cells["draw over best member"].startswith(f"{100 * joined.over_alone.value:+.1f} [")
    drawn = joined.aware.value - joined.best_alone.value
    assert joined.over_alone.value == pytest.approx(drawn)
    one = both[0].headline.model_copy(update={"alone": both[0].headline.alone[:1]})
    assert len(tables.draw_table([both[0].model_copy(update={"evaluations": (one,)})])) < 200


def test_the_table_of_attacks_shows_paired_differences(runs: Path) -> None:
    both = [claim_of(runs, seed) for seed in (0, 1)]
    *rows, _, note = tables.attacks_table(both, against="tiny-0").splitlines()
    assert note.endswith("paired differences from tiny-0")
    row = next(r for r in rows if "who know" in r)
    one, other = (c.headline.per_image() for c in both)
    assert one is not None
    assert other is not None
    (value, low, high) = (f"{100 * (v or 0):+.1f}" for v in paired_difference(other, one))
    cells = f"{100 * one.mean():.1f} | {100 * other.mean():.1f} ({value} [{low}, {high}])"
    assert row == f"| with attackers who know | {cells} |"


def test_attackers_who_know_are_counted_on_the_same_images_of_a_larger_evaluation(
    runs: Path,
) -> None:
    whole = claim_of(runs)
    (found,) = whole.evaluations

    def first(q: str | None) -> str:
        assert q is not None
        return format.packed(format.unpacked(q)[:20]) or ""

    unaware = tuple(
        c.model_copy(update={"each": first(c.each)})
        for c in found.cells
        if c.bounded and not c.aware
    )
    changes = {
        "data": {**found.data, "num_images": 20}, "cells": unaware, "aware": None,
        "untouched": first(found.untouched),
    }  # fmt: skip
    part = found.model_copy(update=changes)
    q = found.per_image()
    assert q is not None
    joined = whole.model_copy(update={"evaluations": (part, found)})
    row = next(r for r in tables.attacks_table([joined], 20).splitlines() if "who know" in r)
    assert row == f"| with attackers who know | {100 * q[:20].mean():.1f} |"
    # other images: of another name, or given in another call
    for data in ({"name": "numbers"}, {"split": "given", "sha256": "0" * 64}):
        larger = found.model_copy(update={"data": {**found.data, **data}})
        given = part.model_copy(update={"data": {**part.data, "split": larger.data["split"]}})
        both = whole.model_copy(update={"evaluations": (given, larger)})
        row = next(r for r in tables.attacks_table([both], 20).splitlines() if "who know" in r)
        assert row == f"| with attackers who know | {percent(None)} |"
    alone = whole.model_copy(update={"evaluations": (part,)})
    row = next(r for r in tables.attacks_table([alone], 20).splitlines() if "who know" in r)
    assert row == f"| with attackers who know | {percent(None)} |"


def test_the_table_of_one_number_of_images_leaves_others_out(runs: Path, tmp_path: Path) -> None:
    paths = [format.write(claim_of(runs, seed), tmp_path / f"{seed}.json") for seed in (0, 1)]

    def table(*options: str) -> Any:
        return command("claim", "table", *paths, *options)

    both = list(map(format.read, paths))
    shown = table("--images", "30", "--against", "tiny-0")
    assert (shown.code, shown.out) == (0, tables.table(both, against="tiny-0") + "\n")
    for options, message in (
        (("--images", "31"), "no claim was measured on --images 31; there are results on 30"),
        (("--against", "tiny-2"), "(tiny-0, tiny-1), got tiny-2"),
        (("--draw", "--against", "tiny-0"), "remove --against"),
        (("--draw", "--attacks"), "use one of them"),
    ):
        refused = table(*options)
        assert (refused.code, refused.out) == (2, "")
        assert message in refused.err


def test_runs_that_met_other_attacks_are_compared_under_those_of_both(runs: Path) -> None:
    base, other = (claim_of(runs, seed).headline for seed in (0, 1))
    fewer = tuple(c for c in other.cells if c.attack != "hinge")
    assert 0 < len(fewer) < len(other.cells)
    part = other.model_copy(update={"cells": fewer})
    common = part.attacks().keys()
    mine, theirs = (format.least(e, common) for e in (part, base))
    assert mine is not None
    assert theirs is not None
    said = tables._paired(part, base)
    assert said.startswith(f"{100 * (mine - theirs).mean():+.1f} ")
    assert said.endswith(f", {len(common)} attacks of both")
    # over all attacks this is the worst case that the report joins
    everything = format.least(other, other.attacks().keys())
    whole = other.per_image()
    assert everything is not None
    assert whole is not None
    np.testing.assert_array_equal(everything, whole)
    unkept = tuple(c.model_copy(update={"each": None}) for c in fewer)
    old = part.model_copy(update={"cells": unkept})
    assert tables._paired(old, base) == NO_RECORDS
    unaware = tuple(c for c in other.cells if not c.aware)
    assert tables._paired(other.model_copy(update={"cells": unaware}), base) == NO_AWARE
    assert tables._paired(other.model_copy(update={"eps": 2 * other.eps}), base) == ""


def test_what_is_no_claim_is_named(runs: Path, tmp_path: Path) -> None:
    good = format.dumped(claim_of(runs))

    def refused(change: dict[str, Any], match: str) -> None:
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match=match):
            format.read(bad)
        (finding,) = check(bad)
        assert (finding.id, finding.severity) == ("schema", "error")
        assert match in finding.why

    refused({"schema": 2}, "schema")
    refused({"evaluations": []}, "evaluations")
    refused({"note": "best ever"}, "note")
    refused({"link": "javascript:alert(1)"}, "link")
    found = good["evaluations"][0]
    refused({"evaluations": [{**found, "aware": {"value": 41.2}}]}, "aware.value")
    nowhere = command("claim", "make", tmp_path / "nowhere", "--out", tmp_path / "x.json")
    assert nowhere.code == 3
    assert "there is no run at" in nowhere.err
    assert not (tmp_path / "x.json").exists()


def test_one_network_gains_nothing_over_itself() -> None:
    """Its draw, average and only member are one: equal attacks leave them equal, up to luck."""
    alone = [c for c in map(format.read, STORED) if c.run["ensemble"]["num_members"] == 1]
    known = [e for claim in alone for e in claim.evaluations if e.aware is not None]
    assert known
    for found in known:
        for gain in (found.over_single, found.over_averaged, found.over_alone):
            assert gain is not None
            assert gain.low is not None
            assert gain.high is not None
            assert gain.low <= 0 <= gain.high
