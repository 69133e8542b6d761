"""The report: figures joined image by image, and a page that is whole, offline and escaped."""

import csv
import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from redefense.errors import ConfigError, DataError
from redefense.report import answers, charts, ranking, tables
from redefense.report import sentences as wording
from redefense.report.card import card
from redefense.report.latex import to_latex
from redefense.report.page import format_table, summary_table, write_report
from redefense.report.tables import DASH, labels, with_interval
from redefense.results.intervals import (
    Estimate,
    accuracy_interval,
    wilson,
)
from redefense.results.join import join
from report_tools import QUICK, build_run, full_report, q_of


def test_headlines_are_recomputed_per_image(tmp_path: Path) -> None:
    build_run(tmp_path / "red")
    (result,) = join([tmp_path / "red"])
    q = q_of(tmp_path / "red", "quick")
    assert result.aware == accuracy_interval(q.min(0))
    assert result.unaware == accuracy_interval(q[1])  # PGD, the lower of the two unaware ones
    assert result.aware.value <= q.mean(1).min()  # the mean of minima, not the least mean


def test_suites_of_a_run_join_and_the_worst_case_can_only_fall(tmp_path: Path) -> None:
    run = tmp_path / "red"
    build_run(run)
    before = summary_table([run])
    build_run(run, {("arc", "all members", True): 0.39, ("square", "sampled", False): 0.8},
              suite="aware", seed=5)  # fmt: skip
    after = summary_table([run])
    assert len(before) == len(after) == 1
    expected = np.concatenate([q_of(run, "aware"), q_of(run, "quick")]).min(0).mean()
    assert after[0]["aware"].value == pytest.approx(expected)
    assert after[0]["aware"].value < before[0]["aware"].value


@pytest.mark.parametrize("change", [{"eps": 0.1}, {"n": 200}])
def test_other_threats_and_other_images_are_never_joined(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    build_run(tmp_path / "red")
    build_run(tmp_path / "red", suite="other", **change)
    rows = summary_table([tmp_path / "red"])
    assert len(rows) == 2
    assert len({(row["threat"], row["num_images"]) for row in rows}) == 2


def test_suites_on_different_choices_of_as_many_images_are_not_joined(tmp_path: Path) -> None:
    run = tmp_path / "red"
    build_run(run)
    build_run(run, suite="other")
    for path in (run / "evaluation" / "other").glob("*.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **{k: v + 1 if k == "index" else v for k, v in arrays.items()})
    assert len(summary_table([run])) == 2


def test_an_evaluation_under_another_name_has_records_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "red" / "evaluation"
    document = build_run(tmp_path / "red", suite="quick-2", n=500, single=0.2)
    document |= {"suite": "quick", "clean": document["clean"] | {"per_image": "quick-2/clean.npz"}}
    (folder / "quick-2.json").write_text(json.dumps(document))
    build_run(tmp_path / "red", n=360, single=0.3)
    (other,) = join([folder / "quick-2.json"])
    hits = np.load(folder / "quick-2" / "baselines.npz")["single"]
    assert other.single == accuracy_interval(hits.astype(np.float64))
    assert [result.num_images for result in join([tmp_path / "red"])] == [500, 360]


def test_unbounded_attacks_enter_no_headline(tmp_path: Path) -> None:
    build_run(tmp_path / "a")
    build_run(tmp_path / "b", {**QUICK, ("cw", "sampled", False): 0.01})
    a, b = summary_table([tmp_path / "a", tmp_path / "b"])
    assert (a["aware"], a["unaware"]) == (b["aware"], b["unaware"])


def test_a_mixture_weighs_the_members(tmp_path: Path) -> None:
    mixture = [0.7, 0.2, 0.1]
    document = build_run(tmp_path / "red", extra={"mixture": mixture})
    for cell in document["cells"]:
        correct = np.load(tmp_path / "red" / "evaluation" / cell["per_image"])["correct"]
        cell["accuracy"]["expected"] = float((np.array(mixture) @ correct).mean())
    clean = np.load(tmp_path / "red" / "evaluation" / "quick" / "clean.npz")["correct"]
    document["clean"]["expected"] = float((np.array(mixture) @ clean).mean())
    path = tmp_path / "red" / "evaluation" / "quick.json"
    path.write_text(json.dumps(document))
    (result,) = join([tmp_path / "red"])
    for scored in result.cells:
        assert scored.q is not None
        assert scored.q.mean() == pytest.approx(scored.cell.accuracy.expected)


def test_summary_of_loaded_json_takes_the_stored_headline(tmp_path: Path) -> None:
    document = build_run(tmp_path / "red")
    (row,) = summary_table([document])
    assert row["aware"] == Estimate(0.3, 0.25, 0.35)
    assert row["unaware"] == Estimate(0.5)
    assert row["best_single_member"] == Estimate(0.3)


def test_an_unaware_headline_without_records_has_the_interval_of_its_cell(tmp_path: Path) -> None:
    document = build_run(tmp_path / "red")
    weak, strong = document["cells"][:2]
    assert strong["accuracy"]["expected"] < weak["accuracy"]["expected"]
    document["headline"]["unaware"] = strong["accuracy"]["expected"]
    (tmp_path / "own.json").write_text(json.dumps(document))
    (result,) = join([tmp_path / "own.json"])
    assert result.unaware == Estimate(strong["accuracy"]["expected"], *strong["interval"])
    assert result.unaware_label == strong["label"]
    # an aware cell of the same figure is none of it
    for cell in document["cells"]:
        cell["aware"] = cell is not weak
    (result,) = join([document])
    assert result.unaware == Estimate(strong["accuracy"]["expected"])


def test_tables_show_the_best_member_alone_and_say_which_was_chosen(tmp_path: Path) -> None:
    run = tmp_path / "red"
    build_run(run, single=0.3, alone=(0.2, 0.3, 0.4))  # member 1 was chosen, member 2 is better
    (result,) = join([run])
    (row,) = rows = summary_table([run])
    best, chosen = row["best_member_alone"], row["best_single_member"]
    assert best == max(result.alone) == result.alone[2]
    assert chosen == result.single == result.alone[1]
    html, md, table, data = (p.read_text() for p in write_report([run], tmp_path / "report.html"))
    members = ", ".join(f"{100 * estimate.value:.1f}" for estimate in result.alone)
    sentence = f"Accuracy of the single members: {members}"
    for text in (html, md, card(run)):
        assert "best member alone" in text
        assert "best single member" not in text
        assert sentence in text
        assert "The one chosen on validation images is member 1, counting from 0." in text
    assert "best member alone (member 2)" in html
    assert f"| {with_interval(best)} |" in md.replace("\\", "")
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(format_table(rows))
    beside = f"the one chosen beforehand: red {100 * chosen.value:.1f}"
    assert beside in " ".join(console.export_text().split())
    (stored,) = json.loads(data)["results"]
    assert stored["best_single_member"]["value"] == chosen.value
    assert stored["best_member_alone"]["value"] == best.value
    (line,) = [r for r in csv.DictReader(io.StringIO(table)) if r["attack"] == "best-member-alone"]
    assert float(line["accuracy"]) == pytest.approx(100 * best.value, abs=1e-3)


def test_where_one_member_alone_is_known_no_table_claims_more(tmp_path: Path) -> None:
    build_run(tmp_path / "red", single=0.3)
    (result,) = join([tmp_path / "red"])
    assert result.best_alone == result.single
    assert wording.members_alone(result) == (
        "Only the member chosen on validation images was attacked."
    )
    # JSON without records says what every member keeps, and of how many images
    document = build_run(tmp_path / "own")
    document["headline"]["single_members"] = [0.3, 0.2, 0.25]
    (result,) = join([document])
    assert result.alone[2] == Estimate(0.25, *wilson(90, 360))
    assert (result.best_alone, result.best_index) == (result.alone[0], 0)


def test_members_alone_stand_where_they_stand_in_every_suite(tmp_path: Path) -> None:
    run = tmp_path / "red"
    build_run(run, alone=(0.5, 0.2, 0.3))
    build_run(run, suite="aware", alone=(0.4, 0.3, 0.3))
    (result,) = join([run])
    members = [
        np.load(run / "evaluation" / f"{s}/baselines.npz")["members"] for s in ("quick", "aware")
    ]
    # points of attacks on the draw count for the members, too
    points = [cell.correct for cell in (*result.cells, *(s.clean for s in result.suites))]
    lowest = np.min([*members, *points], axis=0)
    assert [e.value for e in result.alone] == lowest.mean(1).tolist()
    assert lowest.sum() < np.logical_and(*members).sum()


def test_what_was_run_besides_counts_and_cells_that_met_few_images_have_no_figure(
    tmp_path: Path,
) -> None:
    document = build_run(tmp_path / "red")
    folder = tmp_path / "red" / "evaluation"
    before = q_of(tmp_path / "red", "quick").min(0)
    hinge = document["cells"][-1]
    arrays = dict(np.load(folder / hinge["per_image"]))
    # an attack that met half of the images, and made every member err there
    half = np.arange(len(before)) % 2 == 0
    lost = arrays["correct"] & ~half
    np.savez(folder / "quick" / "member-0.npz", correct=lost, met=half)
    further = {**hinge, "id": "member-0", "per_image": "quick/member-0.npz", "met": int(half.sum())}
    further["accuracy"] = {"expected": float(lost.mean())}
    # and the last cell met what is left
    np.savez(folder / hinge["per_image"], **arrays | {"met": arrays["correct"].any(0)})
    hinge["met"] = int(arrays["correct"].any(0).sum())
    document["further_cells"] = [further]
    (folder / "quick.json").write_text(json.dumps(document))
    (result,) = join([tmp_path / "red"])
    assert result.q_aware is not None
    assert result.q_aware.tolist() == np.where(half, 0, before).tolist()
    assert result.cells[-1].expected is None
    assert result.cells[-2].expected is not None
    assert "part of the worst case" in "".join(result.notes)
    html, md, table, _ = (
        p.read_text() for p in write_report([tmp_path / "red"], tmp_path / "r.html")
    )
    assert "part of the worst case" in html
    assert "part of the worst case" in md
    (line,) = [r for r in csv.DictReader(io.StringIO(table)) if r["attack"] == "hinge"]
    assert line["accuracy"] == ""
    assert line["met"] == str(hinge["met"])
    # without the records of one the stored headline is all there is
    (folder / "quick" / "member-0.npz").unlink()
    (result,) = join([tmp_path / "red"])
    assert result.q_aware is None
    assert "records of 1 of 1 further attacks are missing" in "".join(result.notes)
    assert [suite.missing for suite in result.suites] == [("quick/member-0.npz",)]


def test_bars_and_lines_stand_where_their_figures_say() -> None:
    bar = charts.bar(Estimate(0.5, 0.4, 0.7), "aware")
    assert 'class="fill aware" x="0" y="3" width="50.00"' in bar
    assert 'x="40.00" y="5.2" width="30.00"' in bar
    lines = [charts.Line(label="a<b", points=[(0.0, 1.0), (1.0, 0.0)])]
    drawn = charts.line_chart(lines, title="t", x_label="x", y_label="y", x_ticks=[0.0, 1.0])
    (path,) = re.findall(r'class="line s0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', drawn)
    x0, y0, x1, y1 = map(float, path)
    assert x0 < x1
    assert y0 < y1  # the picture's y runs downwards
    assert charts.legend(lines).count("a&lt;b") == 1
    columns = charts.histogram([1, 3], title="t", x_label="x", y_label="y")
    low, high = (float(v) for v in re.findall(r'class="column".*?height="([\d.]+)"', columns))
    assert high == pytest.approx(3 * low, abs=0.2)


def test_without_jinja_the_page_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_run(tmp_path / "red")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"needs jinja2; .* -e '\.\[report\]'"):
        write_report([tmp_path / "red"], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_histogram_and_tries_follow_from_the_worst_case(tmp_path: Path) -> None:
    build_run(tmp_path / "red")
    (result,) = join([tmp_path / "red"])
    q = q_of(tmp_path / "red", "quick").min(0)
    assert result.fooled is not None
    assert result.fooled.tolist() == np.bincount(np.rint(3 * (1 - q)).astype(int)).tolist()
    assert result.tries_aware is not None
    assert result.tries_aware[0] == pytest.approx(1 - q.mean())
    assert (np.diff(result.tries_aware) >= 0).all()


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (lambda d: d["cells"][0]["accuracy"].update(expected=0.99), "per-image records give"),
        (lambda d: d.update(schema=2), "schema 2"),
        (lambda d: d["data"].pop("name"), "data.name"),
        (lambda d: d["cells"][0].update(per_image="../../secret.npz"), "points outside"),
        (lambda d: d.update(mixture=[0.5, 0.5]), "not a distribution over 3 members"),
    ],
)
def test_a_damaged_evaluation_is_refused_and_nothing_is_written(
    tmp_path: Path, damage: Any, rule: str
) -> None:
    document = build_run(tmp_path / "red")
    damage(document)
    (tmp_path / "red" / "evaluation" / "quick.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=rule):
        write_report([tmp_path / "red"], tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_a_report_never_writes_over_what_it_is_about(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(text := json.dumps(build_run(tmp_path / "red")))
    with pytest.raises(ConfigError, match=r"would overwrite .*own\.json"):
        write_report([own], tmp_path / "own.html")
    assert own.read_text() == text
    assert not (tmp_path / "own.html").exists()
    # nor over a run's record, or an evaluation that lies in the run
    (tmp_path / "red" / "run.json").write_text("{}")
    for name in ("run", "evaluation/quick"):
        before = (tmp_path / "red" / f"{name}.json").read_text()
        with pytest.raises(ConfigError, match=rf"would overwrite .*{name}\.json"):
            write_report([tmp_path / "red"], tmp_path / "red" / f"{name}.html")
        assert (tmp_path / "red" / f"{name}.json").read_text() == before
    # its own older self it may
    write_report([tmp_path / "red"], tmp_path / "report.html")
    write_report([tmp_path / "red"], tmp_path / "report.html")


def test_missing_runs_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run at .*nowhere: run `redefense train"):
        summary_table([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="holds no evaluation"):
        summary_table([tmp_path])
    build_run(tmp_path / "red")
    record = tmp_path / "red" / "evaluation" / "quick" / "clean.npz"
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(DataError, match=r"clean\.npz"):
        summary_table([tmp_path / "red"])
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "report.html")


class Page(HTMLParser):
    """Collects what a browser would act on, and checks that tags nest."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.tags: Counter[str] = Counter()
        self.sortable = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags[tag] += 1
        if tag == "button" and self.open[-1] == "th":
            self.sortable += 1
        if values.get("id"):
            self.ids[str(values["id"])] += 1
        self.references += [
            str(values[k]) for k in ("src", "href", "srcset", "data", "action") if values.get(k)
        ]
        assert not any(name.startswith("on") for name in values), "inline event handler"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_offline_and_sortable(tmp_path: Path) -> None:
    _, text = full_report(tmp_path)
    page = Page(text)
    assert page.open == []
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert all(ref.startswith(("#", "data:")) for ref in page.references)
    assert all(ref[1:] in page.ids for ref in page.references if ref.startswith("#"))
    assert set(page.ids.values()) == {1}
    assert page.sortable == text.count('aria-sort="none"><button type="button"><span>') > 10
    assert page.tags["h1"] == page.tags["main"] == page.tags["title"] == 1
    assert page.tags["caption"] >= 3
    for needed in ('name="viewport"', "prefers-color-scheme: dark", "@media print",
                   "default-src 'none'", 'lang="en"'):  # fmt: skip
        assert needed in text


def test_page_answers_the_three_questions_with_the_joined_figures(tmp_path: Path) -> None:
    _, text = full_report(tmp_path)
    row = summary_table([tmp_path / "digits-red"])[0]
    for question in ("How robust is it?", "Against whom?", "Does the randomness help?"):
        assert question in text
    for key in ("clean", "unaware", "aware", "best_member_alone", "averaged"):
        estimate = row[key]
        assert f"{100 * estimate.value:.1f}" in text
        assert f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}" in text
    assert "✗ FAIL" in text
    assert "✓ pass" in text
    assert "redefense evaluate digits-red --suite quick" in text
    assert "transfer between members" in text
    assert "Accuracy over the size" in text


def test_aware_is_defined_as_it_is_joined(tmp_path: Path) -> None:
    # an attacker who knows nothing of the draw is the worst of all: the headline counts him
    build_run(tmp_path / "red", {**QUICK, ("pgd", "sampled", False): 0.2})
    html, md, *_ = write_report([tmp_path / "red"], tmp_path / "report.html")
    (words,) = re.findall("<dt>Aware</dt><dd>(.*?)</dd>", html.read_text())
    assert "left untouched, or attacked by anybody" in words
    for text in (html.read_text(), md.read_text()):
        assert wording.HOW_COMPARED in text


def test_checks_of_the_defence_stand_apart_on_the_page_and_in_markdown(tmp_path: Path) -> None:
    checks = [
        {"id": "S34", "passed": False, "detail": "untouched"},
        {"id": "S36", "passed": False, "detail": "a gap"},
        {"id": "S37", "passed": True, "detail": "no image"},
        {"id": "S38", "passed": None, "detail": "no member"},
    ]
    build_run(tmp_path / "red", extra={"checks": checks})
    html, md, *_ = write_report([tmp_path / "red"], tmp_path / "report.html")
    for text in (html.read_text(), md.read_text(), card(tmp_path / "red")):
        measured, _, said = text.partition(wording.SAID)
        assert "FAIL" in measured
        assert "S37" in measured
        assert not re.search("S36|S38", measured)
        assert "beware" in said
        assert not re.search("FAIL|S37|S38", said)
    assert "1 of 2 checks passed" in html.read_text()


def test_names_cannot_inject_markup_or_formulas(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|=1+1"
    document = build_run(tmp_path / "red")
    document["run"]["name"] = evil
    document["cells"][0] |= {"label": evil, "repr": evil, "view": evil}
    document["checks"][0]["detail"] = evil
    document["provenance"] |= {"machine": evil, "command": "=cmd|' /C calc'!A0"}
    html, md, table, _ = write_report([document], tmp_path / "report.html")
    text = html.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script>") == 1
    assert Page(text).open == []
    prose = [line for line in md.read_text(encoding="utf-8").split("\n") if line[:4] != "    "]
    assert not any("<script" in line.replace("\\<", "") for line in prose)
    assert not any(
        cell.startswith(("=", "+", "@"))
        for row in csv.reader(io.StringIO(table.read_text(encoding="utf-8")))
        for cell in row
    )


def test_a_missing_figure_is_a_dash_never_a_zero(tmp_path: Path) -> None:
    document = build_run(tmp_path / "red")
    document["headline"] = {"unaware": None, "aware": None}
    document["cells"][0]["accuracy"] = {"expected": None}
    document["cells"][0]["interval"] = None
    html, md, table, _ = write_report([document], tmp_path / "report.html")
    assert DASH in html.read_text(encoding="utf-8")
    assert f"| {DASH} |" in md.read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert next(r for r in rows if r["attack"] == "headline-aware")["accuracy"] == ""


def test_csv_holds_every_figure_in_percent(tmp_path: Path) -> None:
    path, _ = full_report(tmp_path)
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text())))
    row = summary_table([tmp_path / "digits-red"])[0]
    (aware,) = [r for r in rows if r["run"] == "digits-red" and r["attack"] == "headline-aware"]
    assert float(aware["accuracy"]) == pytest.approx(100 * row["aware"].value, abs=1e-3)
    # two runs: headlines and cells of each; differences of clean, worst case and common attacks
    assert len(rows) == 2 * 6 + 5 + 4 + 2 + 4


def test_terminal_table_shows_every_column_with_its_interval(tmp_path: Path) -> None:
    full_report(tmp_path)
    rows = summary_table([tmp_path / "digits-red", tmp_path / "digits-vanilla"])
    console = Console(width=130, file=io.StringIO(), record=True)
    console.print(format_table(rows))
    text = console.export_text()
    for word in ("digits-red", "clean", "FGSM", "PGD", "unaware", "aware", "averaged"):
        assert word in text
    aware = rows[0]["aware"]
    assert f"{100 * aware.low:.1f} to {100 * aware.high:.1f}" in text


def test_evaluations_of_one_run_are_told_apart_by_as_little_as_needed(tmp_path: Path) -> None:
    run = tmp_path / "red"
    build_run(tmp_path / "plain")
    build_run(run)
    build_run(run, suite="mine", n=200)
    rows = summary_table([tmp_path / "plain", run])
    assert sorted(labels(rows)) == ["plain", "red (200 images)", "red (360 images)"]
    build_run(run, suite="wide", n=360, eps=0.3)
    rows = summary_table([tmp_path / "plain", run])
    assert sorted(labels(rows)) == [
        "plain (linf 0.2)", "red (linf 0.2, 200 images)", "red (linf 0.2, 360 images)",
        "red (linf 0.3)",
    ]  # fmt: skip
    # of a run the first screen quotes one result: here all met as many attacks
    sentence = answers.answers(join([tmp_path / "plain", run]))[0].text
    assert {name for name in labels(rows) if name in sentence} == {
        "plain (linf 0.2)", "red (linf 0.2, 360 images)",
    }  # fmt: skip
    write_report([tmp_path / "plain", run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "red (linf 0.2, 200 images), aware" in page
    assert "<h1>Which of these 2 runs is the most robust?</h1>" in page
    assert len(set(found := re.findall(r"<summary>(.*): each attack", page))) == len(found) == 4


def test_rows_of_other_data_are_called_by_it(tmp_path: Path) -> None:
    build_run(tmp_path / "red")
    build_run(tmp_path / "large", extra={"data": {"name": "cifar10", "num_images": 360}})
    runs = [tmp_path / "red", tmp_path / "large"]
    rows = summary_table(runs)
    assert labels(rows) == ["red (digits)", "large (cifar10)"]
    assert labels(rows[:1]) == ["red"]
    html, md, *_ = write_report(runs, tmp_path / "report.html")
    (head,) = re.findall(r"^\| run .*$", md.read_text(), re.MULTILINE)[:1]
    assert head.startswith("| run | data | threat |")
    assert "| large | cifar10 | linf 0.2 |" in md.read_text()
    page = html.read_text()
    assert '<th scope="row" data-value="large">large <small>cifar10</small></th>' in page
    assert "cifar10, linf 0.2, 360 images, 3 members" in page
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(format_table(rows))
    assert "large (cifar10)" in console.export_text()


@pytest.mark.parametrize("ending", [".md", ".csv", ".json", ".tex", ".html", ".HTML", ".htm"])
def test_a_report_is_what_its_ending_says(tmp_path: Path, ending: str) -> None:
    build_run(tmp_path / "red_1")
    write_report([tmp_path / "red_1"], tmp_path / "all" / "page.html")
    files = write_report([tmp_path / "red_1"], tmp_path / "one" / f"page{ending}")
    beside = [".md", ".csv", ".json"] if ending.lower().startswith(".htm") else []
    assert [path.suffix for path in files] == [ending, *beside]
    assert sorted((tmp_path / "one").iterdir()) == sorted(files)
    text = files[0].read_text()
    if ending == ".tex":
        (aware,) = [row["aware"] for row in summary_table([tmp_path / "red_1"])]
        lines = text.splitlines()
        (row,) = [line for line in lines if line.startswith(r"red\_1 & ")]
        assert row.count(" & ") == len(tables.COLUMNS)
        assert f"{100 * aware.value:.1f} " in row
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    elif not beside and ending != ".md":  # a page names its own file among its commands
        assert text == (tmp_path / "all" / f"page{ending}").read_text()


@pytest.mark.parametrize("name", ["page", "page.txt", "page.pdf", "page.xlsx", ".html"])
def test_a_report_of_another_ending_is_refused(tmp_path: Path, name: str) -> None:
    build_run(tmp_path / "red")
    with pytest.raises(ConfigError, match=r"--out must have the suffix .*\.html.*\.tex; got"):
        write_report([tmp_path / "red"], tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()


def test_names_and_missing_figures_in_latex(tmp_path: Path) -> None:
    name = "a&b 50% $x$ #1 ~^{y}"
    build_run(tmp_path / name, {("fgsm", "sampled", False): 0.5})
    text = to_latex(join([tmp_path / name]))
    assert r"a\&b 50\% \$x\$ \#1 \textasciitilde{}\textasciicircum{}\{y\} & " in text
    assert " & -- & " in text  # no aware attack: no headline


def test_other_images_of_one_number_are_told_apart_by_their_suites(tmp_path: Path) -> None:
    for suite in ("quick", "mine"):
        build_run(tmp_path / "red", suite=suite, extra={"data": {
            "name": "digits", "num_images": 360, "sha256": suite,
        }})  # fmt: skip
    rows = summary_table([tmp_path / "red"])
    assert sorted(labels(rows)) == ["red (360 images, suite mine)", "red (360 images, suite quick)"]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    first, text = full_report(tmp_path)
    assert full_report(tmp_path)[1] == text
    assert not list(first.parent.glob(".*.part"))


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    build_run(tmp_path / "a" / "red")
    build_run(tmp_path / "b" / "red", seed=3)
    rows = summary_table([tmp_path / "a" / "red", tmp_path / "b" / "red"])
    assert [row["run"] for row in rows] == ["red #1", "red #2"]


def test_the_report_does_not_import_torch() -> None:
    code = "import redefense.report.page, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_points_of_one_suite_count_for_the_baselines_of_another(tmp_path: Path) -> None:
    easy = {("pgd", "sampled", False): 0.9, ("hinge", "members", True): 0.85}
    hard = {("pgd", "sampled", False): 0.5, ("hinge", "members", True): 0.3}
    build_run(tmp_path / "run", easy, suite="one", alone=(0.95, 0.95, 0.95), single=0.95)
    (before,) = join([tmp_path / "run"])
    build_run(tmp_path / "run", hard, suite="two", alone=())
    (tmp_path / "run" / "evaluation" / "two" / "baselines.npz").unlink()
    (after,) = join([tmp_path / "run"])
    records = [
        np.load(tmp_path / "run" / "evaluation" / cell.cell.per_image)["correct"]
        for cell in after.cells
        if cell.cell.per_image is not None
    ]
    clean = np.load(tmp_path / "run" / "evaluation" / "one" / "clean.npz")["correct"]
    members = np.load(tmp_path / "run" / "evaluation" / "one" / "baselines.npz")["members"]
    expected = np.min([*records, clean, members], axis=0).mean(1)
    assert [it.value for it in after.alone] == pytest.approx(expected)
    assert after.single is not None
    assert after.single.value == pytest.approx(expected[1])
    assert max(it.value for it in after.alone) < max(it.value for it in before.alone)


def test_suites_of_different_weights_are_not_joined(tmp_path: Path) -> None:
    for suite, weights in (("one", "a" * 64), ("two", "b" * 64)):
        threat = {"norm": "inf", "eps": 0.2}
        plan = {"suite": {"name": suite, "cells": []}, "threat": threat, "weights": weights}
        build_run(tmp_path / "run", suite=suite, extra={"plan": plan})
    with pytest.raises(DataError, match=r"two\.json is an evaluation of other weights than"):
        join([tmp_path / "run"])


def test_runs_under_other_attacks_are_not_ranked_together(tmp_path: Path) -> None:
    weak = {("pgd", "sampled", False): 0.7, ("hinge", "members", True): 0.6}
    build_run(tmp_path / "many", {**QUICK, ("arc", "members", True): 0.2})
    build_run(tmp_path / "few", weak)
    results = join([tmp_path / "many", tmp_path / "few"])
    assert [result.name for result in ranking.ranked(results)] == ["many"]
