"""Paired differences of runs: over the same images, under the attacks that both met."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from redefense.report import sentences
from redefense.report.differences import format_differences, markdown_differences
from redefense.report.latex import to_latex
from redefense.report.page import write_report
from redefense.report.tables import escape_markdown, points
from redefense.results.intervals import paired_difference
from redefense.results.join import Result, join
from redefense.results.paired import (
    NO_AWARE,
    Gain,
    Records,
    attacks_of,
    differences,
    least,
    records_of,
    worst_case_gain,
)
from report_tools import QUICK, build_run, q_of

SQUARE = ("square", "sampled", False)
PLAN = {"suite": {"cells": []}, "threat": {"norm": "inf", "eps": 0.2}}
UNAWARE = {key: share for key, share in QUICK.items() if not key[2]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs under equal attacks; one of them again with a further, stronger attack."""
    plan = {"plan": PLAN}
    build_run(tmp_path / "one", extra=plan)
    build_run(tmp_path / "two", {k: 0.8 * share for k, share in QUICK.items()}, seed=1, extra=plan)
    build_run(tmp_path / "more", {**QUICK, SQUARE: 0.2}, extra=plan)
    return tmp_path


def joined(runs: Path, *names: str) -> list[Result]:
    return join([runs / name for name in names])


def test_a_difference_is_that_of_the_records_and_changes_its_sign_with_the_order(
    runs: Path,
) -> None:
    one, two = (q_of(runs / name, "quick") for name in ("one", "two"))
    (found,) = differences(joined(runs, "one", "two"))
    assert (found.run.name, found.reference.name) == ("two", "one")
    assert found.worst == Gain(paired_difference(two.min(0), one.min(0)))
    assert found.clean == paired_difference(two[-1], one[-1])
    assert list(found.each.values()) == [
        paired_difference(mine, theirs) for mine, theirs in zip(two[:-1], one[:-1], strict=True)
    ]
    (turned,) = differences(joined(runs, "two", "one"))
    assert found.worst.estimate is not None
    value, low, high = found.worst.estimate
    assert low is not None
    assert high is not None
    assert turned.worst.estimate == pytest.approx((-value, -high, -low))


def test_an_attack_that_only_one_run_met_does_not_count(runs: Path) -> None:
    (known,) = differences(joined(runs, "two", "one"))
    (found,) = differences(joined(runs, "two", "more"))
    assert found.run.aware is not None
    assert known.run.aware is not None
    assert found.run.aware.value < known.run.aware.value  # by the further attack, which is stronger
    # the same weights under the attacks of both
    _, aware = (records_of(result) for result in joined(runs, "one", "more"))
    common = [met for key, met in aware.attacks.items() if key[0] != "square"]
    q = least(aware.clean, common)
    (other,) = joined(runs, "two")
    assert q is not None
    assert other.q_aware is not None
    assert found.worst.estimate == paired_difference(q, other.q_aware)
    assert found.worst.attacks == len(QUICK)
    assert len(found.each) == len(QUICK)


def test_no_image_is_left_out_of_a_worst_case(runs: Path) -> None:
    one, more = (records_of(result) for result in joined(runs, "one", "more"))
    common = [key for key in more.attacks if key[0] != "square"]
    key = next(key for key in common if key[0] == "hinge")

    def skipping(skipped: NDArray[np.bool_]) -> Records:
        met = more.attacks[key]._replace(met=~skipped)
        return replace(more, attacks={**more.attacks, key: met})

    before = least(more.clean, [more.attacks[k] for k in common if k != key])
    square = next(met.q for k, met in more.attacks.items() if k[0] == "square")
    assert before is not None
    assert square is not None
    # what an attack of both had fooled cannot get worse
    known = worst_case_gain(skipping(before == 0), one)
    assert known == worst_case_gain(more, one)
    assert known.estimate is not None
    # without the images that the attack of one run had fooled this run would seem stronger
    fooled = (square == 0) & (before > 0)
    assert fooled.any()
    unknown = worst_case_gain(skipping((square == 0) | (before == 0)), one)
    assert unknown.estimate is None
    assert f"skipped {fooled.sum()} images" in unknown.unknown


@pytest.mark.parametrize("change", [{"seeds": 3}, {"checks": "full"}, {"suite": {"cells": [{}]}}])
def test_repeats_and_checks_of_one_run_do_not_count_either(
    runs: Path, change: dict[str, object]
) -> None:
    build_run(runs / "further", extra={"plan": {**PLAN, **change}})
    (found,) = differences(joined(runs, "further", "two"))
    assert found.worst.attacks == len(QUICK)
    one, further = (records_of(result) for result in joined(runs, "one", "further"))
    assert one.lowest is not None
    lower = replace(further, lowest=0 * one.lowest)
    assert worst_case_gain(lower, one) == Gain(paired_difference(one.lowest, one.lowest), 4)
    assert worst_case_gain(replace(lower, protocol=one.protocol), one) == Gain(
        paired_difference(0 * one.lowest, one.lowest)
    )
    # unknown ones, as of older evaluations, are equal to none
    older = replace(lower, protocol=None)
    assert worst_case_gain(older, older).attacks == len(QUICK)


def test_attacks_of_equal_names_have_a_difference_each(runs: Path) -> None:
    for name, seed in (("one", 4), ("two", 5)):
        document = build_run(runs / name, suite="second", seed=seed, extra={"plan": PLAN})
        for cell in document["cells"]:
            cell["repr"] = cell["repr"].replace("10", "20")
        (runs / name / "evaluation" / "second.json").write_text(json.dumps(document))
    (found,) = differences(joined(runs, "one", "two"))
    names = attacks_of([found])
    assert len(set(names.values())) == len(names) == len(found.each) == 2 * len(QUICK)
    by_name = {names[key]: estimate for key, estimate in found.each.items()}
    for suite in ("quick", "second"):
        one, two = (q_of(runs / name, suite) for name in ("one", "two"))
        assert by_name[f"FGSM, sampled, suite {suite}"] == paired_difference(two[0], one[0])


def test_runs_without_a_common_aware_attack_or_common_images_are_not_compared(
    runs: Path,
) -> None:
    build_run(runs / "other", {**UNAWARE, ("arc", "all members", True): 0.3})
    (found,) = differences(joined(runs, "one", "other"))
    assert found.worst == Gain(None, unknown=NO_AWARE)
    assert len(found.each) == len(UNAWARE)
    build_run(runs / "fewer", n=180)
    build_run(runs / "larger", eps=0.3)
    assert differences(joined(runs, "one", "fewer", "larger")) == []
    assert format_differences(joined(runs, "one", "fewer")) is None
    assert list(markdown_differences(joined(runs, "one"))) == []
    assert to_latex(joined(runs, "one")).count(r"\toprule") == 1


def test_the_first_run_with_records_is_the_reference(runs: Path) -> None:
    (known,) = differences(joined(runs, "one", "two"))
    build_run(runs / "bare")
    shutil.rmtree(runs / "bare" / "evaluation" / "quick")
    (found,) = differences(joined(runs, "bare", "one", "two"))
    assert (found.run.name, found.reference.name) == ("two", "one")
    assert found.clean == known.clean


def test_every_form_of_the_report_has_the_differences(runs: Path) -> None:
    page = write_report([runs / "one", runs / "two"], runs / "report.html")[0]
    (found,) = differences(joined(runs, "one", "two"))
    worst = found.worst.estimate
    assert worst is not None
    assert worst.low is not None
    html = page.read_text()
    assert f"<small>minus one</small></th>\n<td>{sentences.points(found.clean)[0]}<small>" in html
    assert f"<td>{sentences.points(worst)[0]}<small>{sentences.points(worst)[1]}</small>" in html
    assert escape_markdown(points(worst)) in page.with_suffix(".md").read_text()
    rows = csv.DictReader(io.StringIO(page.with_suffix(".csv").read_text()))
    (row,) = [row for row in rows if row["attack"] == "difference: worst case"]
    assert (row["run"], row["against"]) == ("two", "one")
    assert (row["accuracy"], row["num_images"]) == ("", "360")
    assert float(row["difference"]) == pytest.approx(100 * worst.value, abs=1e-4)
    assert float(row["low"]) == pytest.approx(100 * worst.low, abs=1e-4)
    (stored,) = json.loads(page.with_suffix(".json").read_text())["differences"]
    assert stored["worst_case"] == worst._asdict()
    (line,) = to_latex(joined(runs, "one", "two")).partition("llrrl")[2].splitlines()[4:-2]
    latex = [points(end).replace("-", "$-$") for end in (found.clean, worst)]
    assert line == rf"two & one & {latex[0]} & {latex[1]} & the same \\"
    table = format_differences(joined(runs, "one", "two"))
    assert table is not None
    assert points(worst) in table.columns[3]._cells
