"""What `evaluate` returns: every attribute is a figure of its JSON, the headline first."""

import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import redefense
from redefense.attacks import FGSM, PGD
from redefense.errors import ConfigError, WriteError
from redefense.evaluation.figures import Figure
from redefense.evaluation.report_object import Report
from redefense.results.intervals import wilson
from redefense.rng import stream
from redefense.threat import Threat

COUNT = 30


def linear(seed: int) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=stream(seed, "linear"))
    return net.eval()


def images() -> tuple[Tensor, Tensor]:
    x = torch.rand(COUNT, 1, 8, 8, generator=stream(0, "x"))
    return x, linear(0)(x).argmax(1)


@pytest.fixture(scope="module")
def report() -> Report:
    return redefense.evaluate([linear(0), linear(1)], images(), threat=Threat(eps="5/255"))


def test_a_report_cannot_be_saved_below_a_file(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(WriteError, match=r"cannot write .*quick\.json: Not a directory"):
        report.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_attributes_are_the_figures_of_the_json(report: Report) -> None:
    head, clean = report.headline, report.data["clean"]
    assert report.clean == Figure(clean["expected"], *clean["interval"])
    assert report.aware == Figure(head["aware"], *head["aware_interval"])
    assert report.unaware.value == head["unaware"]
    assert report.average.value == head["averaged"]
    assert [report.average.low, report.average.high] == head["averaged_interval"]
    assert [member.value for member in report.members] == head["single_members"]
    assert [member.clean.value for member in report.members] == clean["per_member"]
    assert report.checks is report.data["checks"]
    assert report.threat == Threat(norm="linf", eps=5 / 255)
    for figure in (report.clean, report.unaware, report.aware, *report.members, report.average):
        assert figure.value is not None
        assert figure.low is not None
        assert figure.high is not None
        assert 0 <= figure.low <= figure.value <= figure.high <= 1


def test_in_a_notebook_figures_read_as_percentages_and_radii_as_fractions(report: Report) -> None:
    member = report.members[0]
    assert repr(report.aware) == f"Figure({report.aware})"
    assert repr(member) == f"Figure(clean {member.clean}, under attack {member})"
    assert "L-inf eps 5/255" in repr(report)
    assert report.rows()[1]["threat"] == "L-inf eps 5/255"


def test_intervals_of_members_are_wilsons(report: Report) -> None:
    for member in report.members:
        assert member.value is not None
        ends = wilson(round(COUNT * member.value), COUNT)
        assert (member.low, member.high) == pytest.approx(ends)


def test_the_headline_comes_first(report: Report) -> None:
    text = repr(report)
    assert text.splitlines()[0] == "Report(suite quick, 30 images, L-inf eps 5/255)"
    order = ["clean", "unaware", "aware", "best single member", "averaged", "red checks"]
    assert [line[2:20].strip() for line in text.splitlines()[1:]] == order
    page = report._repr_html_()
    assert page.index("aware") < page.index("PGD-10")
    assert str(report.aware) in text
    assert str(report.aware) in page


def test_one_network_has_one_figure() -> None:
    report = redefense.evaluate(linear(0), images(), [FGSM(), PGD()], Threat(eps=0.02))
    assert list(report.figures()) == ["clean", "under attack"]
    assert report.figures()["under attack"] == report.aware
    assert report.aware.value == min(c["accuracy"]["expected"] for c in report.data["cells"])


def test_what_a_suite_cannot_know_is_said() -> None:
    report = redefense.evaluate([linear(0), linear(1)], images(), FGSM(), Threat(eps=0.02))
    assert report.aware == report.unaware == Figure(None)
    assert "no headline: the suite has no aware attack" in repr(report)
    assert report.average.value is None
    assert report.average.clean.value == report.data["clean"]["averaged"]


def test_a_table_for_latex_holds_every_figure(report: Report) -> None:
    table = report.to_latex()
    assert table.count(r"\\") == 1 + len(report.figures()) + len(report.data["cells"])
    figure = str(report.aware).replace("%", r"\%")
    assert f"aware &  & {figure} \\\\" in table


class Frame(list[Any]):
    """In pandas' place: keeps the rows."""


def test_a_frame_has_a_row_for_each_attack(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"Report\.to_frame needs pandas; install it with"):
        report.to_frame()
    stand_in = type(sys)("pandas")
    stand_in.DataFrame = Frame  # type: ignore[attr-defined]  # a module made here
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    clean, *rows = report.to_frame()
    assert clean["accuracy"] == report.clean.value
    assert [row["accuracy"] for row in rows] == [
        cell["accuracy"]["expected"] for cell in report.data["cells"]
    ]


def test_a_plot_shows_the_figures(report: Report) -> None:
    matplotlib.use("Agg")
    axes = report.plot()
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths, [100 * (f.value or 0) for f in report.figures().values()])
    plt.close(axes.figure)
