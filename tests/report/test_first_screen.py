"""The first screen: the question, the verdict in one sentence, and which runs are compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from redefense.report import answers, ranking
from redefense.report import sentences as wording
from redefense.report.page import summary_table, write_report
from redefense.report.tables import percent
from redefense.results.intervals import Estimate, accuracy_interval, paired_difference, wilson
from redefense.results.join import join
from report_tools import QUICK, build_run, q_of


def test_without_an_aware_attack_there_is_no_headline(tmp_path: Path) -> None:
    build_run(tmp_path / "red", {("pgd", "sampled", False): 0.6})
    (row,) = summary_table([tmp_path / "red"])
    assert row["pgd"] is not None
    assert row["aware"] is None
    assert row["unaware"] is None
    (result,) = join([tmp_path / "red"])
    robust, whom, worth = answers.answers([result])
    assert "This is unknown" in robust.text
    # nor is anybody said to have known, or to have compared
    assert whom.lead == "An unaware attacker, linf 0.2"
    assert "does not know how a member is drawn; 1 attack within this budget was run" in whom.text
    assert "knows" not in whom.text
    assert worth.lead == "Not measured"
    assert "needs an aware attack" in worth.text


def test_baselines_without_a_draw_get_wilson_intervals_and_a_paired_verdict(tmp_path: Path) -> None:
    build_run(tmp_path / "weak", single=0.1, averaged=0.05)
    build_run(tmp_path / "strong", single=0.6, averaged=0.05)
    weak, strong = join([tmp_path / "weak", tmp_path / "strong"])
    hits = int(
        np.load(tmp_path / "weak" / "evaluation" / "quick" / "baselines.npz")["single"].sum()
    )
    assert weak.single == Estimate(hits / 360, *wilson(hits, 360))
    assert weak.over_single is not None
    assert weak.over_single.low is not None
    assert weak.over_single.low > 0
    assert wording.verdict(weak).answer == "yes"
    assert wording.verdict(strong).answer == "no"
    sentence = wording.verdict(strong).sentence.replace(wording.PERCENT, " %")
    kept = percent(strong.single)
    assert f"the member chosen on validation images has {kept} % without a draw" in sentence
    assert wording.verdict(strong).short == "no"


def test_a_member_that_was_not_chosen_but_is_better_here_takes_the_yes_away(tmp_path: Path) -> None:
    document = build_run(tmp_path / "red", single=0.1, averaged=0.05, alone=(0.1, 0.6, 0.0))
    # the others err where member 1 does not
    folder, cell = tmp_path / "red" / "evaluation", document["cells"][-1]
    arrays = dict(np.load(folder / cell["per_image"]))
    arrays["correct"][[0, 2]] = False
    np.savez(folder / cell["per_image"], **arrays)
    cell["accuracy"]["expected"] = float(arrays["correct"].mean())
    (folder / "quick.json").write_text(json.dumps(document))
    (result,) = join([tmp_path / "red"])
    assert result.alone[1] == max(result.alone)
    verdict = wording.verdict(result)
    assert verdict.answer == "no"
    assert "the best member alone has" in verdict.sentence
    best = {baseline.name: baseline for baseline in verdict.baselines}["best member alone"]
    assert (best.figure, best.gain) == (result.alone[1], result.over_alone)
    assert "member chosen on validation images" in {baseline.name for baseline in verdict.baselines}


def test_members_that_answer_next_to_nothing_are_named(tmp_path: Path) -> None:
    sentence = wording.members_weak((0.725, 0.1, 1 / 6))
    assert sentence.replace(wording.PERCENT, " %") == (
        "Without an attack, member 1 is correct on 10.0 % and member 2 is correct on 16.7 % of the "
        "images, while the best member is correct on 72.5 %. Queries answered by such a member are "
        "mostly wrong: train it again, or set its probability to 0."
    )
    assert wording.members_weak((0.7, 0.1), (1.0, 0.0)) == ""  # nobody meets it
    document = build_run(tmp_path / "red")
    page, markdown = tmp_path / "page.html", tmp_path / "page.md"
    write_report([tmp_path / "red"], page)
    assert (
        "Queries answered by such" not in page.read_text() + markdown.read_text()
    )  # all are alike
    document["clean"]["per_member"] = [0.725, 0.1, 1 / 6]
    (tmp_path / "red" / "evaluation" / "quick.json").write_text(json.dumps(document))
    write_report([tmp_path / "red"], page)
    assert sentence in page.read_text()
    assert sentence.replace(wording.PERCENT, " %") in markdown.read_text()


def test_baselines_are_compared_each_in_its_own_worst_case(tmp_path: Path) -> None:
    build_run(tmp_path / "red", {**QUICK, ("pgd", "sampled", False): 0.2})
    (result,) = join([tmp_path / "red"])
    lowest = q_of(tmp_path / "red", "quick").min(0)
    beside = np.load(tmp_path / "red" / "evaluation" / "quick" / "baselines.npz")
    for gain, baseline in ((result.over_single, "single"), (result.over_averaged, "averaged")):
        assert gain == paired_difference(lowest, beside[baseline].astype(float))
    assert wording.verdict(result).answer == "no"


def test_one_member_draws_nothing(tmp_path: Path) -> None:
    build_run(tmp_path / "one", members=1)
    (result,) = join([tmp_path / "one"])
    assert wording.verdict(result).short == "nothing is drawn"


def test_the_first_screen_quotes_a_run_where_it_met_most_attacks(tmp_path: Path) -> None:
    build_run(tmp_path / "red", {("hinge", "members", True): 0.9}, suite="small", n=500)
    build_run(tmp_path / "red")
    results = join([tmp_path / "red"])
    weak, strong = sorted(results, key=lambda result: len(result.bounded))
    assert len(weak.bounded) < len(strong.bounded)
    assert weak.aware is not None
    assert strong.aware is not None
    assert weak.aware.value > strong.aware.value
    assert ranking.best(results) is strong


def test_the_first_screen_compares_what_is_about_the_same_data_and_budget(tmp_path: Path) -> None:
    weak = {("pgd", "sampled", False): 0.5, ("hinge", "members", True): 0.2}
    strong = {("pgd", "sampled", False): 0.95, ("hinge", "members", True): 0.9}
    build_run(tmp_path / "mine", weak)
    build_run(tmp_path / "easy", strong, extra={"data": {"name": "other", "num_images": 360}})
    build_run(tmp_path / "small", strong, eps=0.01)
    for number in range(7):
        build_run(tmp_path / f"near-{number}", weak)
    runs = [tmp_path / name for name in ("mine", "easy", "small")]
    runs += [tmp_path / f"near-{number}" for number in range(7)]
    results = join(runs)
    assert ranking.best(results).data.name == "digits"
    assert ranking.best(results).eps == pytest.approx(0.2)
    sentence = answers.answers(results)[0].text
    assert "easy" not in sentence
    assert "small" not in sentence
    assert f", and {8 - 1 - answers.MOST_OTHERS} more below" in sentence
    left = "2 runs on other images, under other attacks or within another budget."
    assert f"Not compared: {left}" in sentence
    # one of two runs cannot be ranked
    assert answers.title(join(runs[:2])) == "How robust is mine under attack?"


def test_runs_that_differ_by_their_seed_alone_are_quoted_by_their_mean(tmp_path: Path) -> None:
    def run(name: str, seed: int, defence: str, share: float) -> Path:
        settings = {"name": name, "seed": seed, "defence": {"name": defence}, "epochs": 3}
        attacks = {("pgd", "sampled", False): 0.8, ("hinge", "members", True): share}
        build_run(tmp_path / name, attacks, extra={"run": settings})
        return tmp_path / name

    shares = {"a": 0.2, "b": 0.45, "c": 0.3}
    runs = [run(name, seed, "red", share) for seed, (name, share) in enumerate(shares.items())]
    runs.append(run("other", 0, "gal", 0.4))
    results = join(runs)
    aware = {r.name: r.aware.value for r in results if r.aware is not None}
    mean = 100 * sum(aware[name] for name in "abc") / 3
    # one run of red is the best of all, but not its mean
    assert max(aware, key=lambda name: aware[name]) == "b"
    assert answers.title(results) == "Which of these 2 methods is the most robust?"
    summary = answers.summary(results).replace(wording.PERCENT, " %")
    assert summary.startswith(f"other classifies {100 * aware['other']:.1f} % of the images")
    assert f"next comes red {mean:.1f} %" in summary
    three = join(runs[:3])
    assert ranking.best(three).name == "c"  # the middle one
    assert answers.title(three) == "How robust is red under attack, over 3 seeds?"
    assert (
        answers.summary(three)
        .replace(wording.PERCENT, " %")
        .startswith(f"red classifies {mean:.1f} % of the images")
    )
    (group,) = ranking.grouped(three)
    spread = group.figures["aware"]
    assert spread is not None
    assert spread.sd == pytest.approx(np.std([aware[name] for name in "abc"], ddof=1))
    # the interval over images is that of the mean over seeds of what each image keeps
    q = np.mean([r.q_aware for r in three if r.q_aware is not None], axis=0)
    assert spread.mean == accuracy_interval(q)
    assert spread.mean.value == pytest.approx(mean / 100)
    first = answers.answers(three)[0]
    assert first.lead == f"{mean:.1f}{wording.PERCENT}"
    assert all(f"{100 * aware[name]:.1f}" in first.text for name in "abc")
    (page, *_) = write_report(runs[:3], tmp_path / "page.html")
    assert f"<h1>{answers.title(three)}</h1>" in page.read_text()


def test_one_network_is_not_said_to_draw(tmp_path: Path) -> None:
    build_run(tmp_path / "one", members=1)
    build_run(tmp_path / "three", members=3)
    one, three = (answers.answers(join([tmp_path / n]))[1].text for n in ("one", "three"))
    assert "knows the network; " in one
    assert "draw" not in one
    assert "knows all 3 members and the probability of each, but not the next draw" in three
