"""What `evaluate` returns: the headline first, every figure with its interval, and the records."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redefense.config import ThreatConfig
from redefense.errors import ConfigError
from redefense.evaluation.baselines import Baselines
from redefense.evaluation.cells import Cell, as_threat
from redefense.evaluation.figures import UNKNOWN, Figure, figure_of, plot_bars, plot_curve
from redefense.evaluation.headline import interval
from redefense.evaluation.store import write_arrays
from redefense.radius import budget_text
from redefense.results.accuracy import Bools
from redefense.results.escaping import escape_latex
from redefense.results.examples import Examples
from redefense.runtime.files import write_text, writing
from redefense.runtime.folders import BASELINES, EVALUATION, PLAN
from redefense.threat import Threat


@dataclass(frozen=True, slots=True, repr=False)
class BaselineFigure(Figure):
    """A deterministic baseline under the attacks that the suite lists for it.

    Attributes:
        clean: its accuracy on clean images.
    """

    clean: Figure = UNKNOWN

    def __repr__(self) -> str:
        return f"Figure(clean {self.clean}, under attack {self})"


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """An evaluation: its figures, the JSON of schema 1, and the records behind every figure.

    Attributes:
        data: what `DIR/evaluation/SUITE.json` holds.
        cells: per-image records by cell id, including "clean".
        index: (n,) positions of the images in the test split, or in the given images.
        baselines: records of the single members and of the averaged ensemble; None if the suite
            does not attack them.
        images: (n, C, H, W) the attacked images by cell id, if they were saved.
        examples: a few attacked images for display.
    """

    data: dict[str, Any]
    cells: Mapping[str, Cell]
    index: NDArray[np.int64]
    baselines: Baselines | None = None
    images: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    examples: Examples | None = None

    @property
    def headline(self) -> dict[str, Any]:
        """Accuracy of unaware and aware attacks and of the baselines, in [0, 1] or None."""
        return cast(dict[str, Any], self.data["headline"])

    @property
    def clean(self) -> Figure:
        """Accuracy on clean images."""
        return figure_of(self.data["clean"]["expected"], self.data["clean"].get("interval"))

    @property
    def unaware(self) -> Figure:
        """The lowest accuracy under a bounded attack that does not know of the draw."""
        value = self.headline.get("unaware")
        rows = [c for c in self._bounded() if not c["aware"]]
        # the accuracy of one cell, and so its interval
        of = [c.get("interval") for c in rows if c["accuracy"]["expected"] == value]
        if "unaware_interval" in self.headline:  # an estimate: its interval covers the draws
            of = [self.headline["unaware_interval"]]
        return figure_of(value, of[0] if of else None)

    @property
    def aware(self) -> Figure:
        """Accuracy on each image's worst case over all attacks and the clean image."""
        return figure_of(self.headline.get("aware"), self.headline.get("aware_interval"))

    @property
    def members(self) -> tuple[BaselineFigure, ...]:
        """Every single member, under attack and clean."""
        per_member = self.data["clean"]["per_member"]
        # None for a suite that does not attack the members
        robust: Sequence[Any] = self.headline.get("single_members") or [None] * len(per_member)
        attacked = None if self.baselines is None else self.baselines.members
        clean = self.cells["clean"].correct
        return tuple(
            BaselineFigure(
                robust[m],
                *_ends(None if attacked is None else attacked[m]),
                clean=Figure(per_member[m], *_ends(clean[m])),
            )
            for m in range(len(per_member))
        )

    @property
    def average(self) -> BaselineFigure:
        """The averaged ensemble, which is deterministic, under attack and clean."""
        clean = self.cells["clean"].averaged
        figure = figure_of(self.headline.get("averaged"), self.headline.get("averaged_interval"))
        return BaselineFigure(
            figure.value, figure.low, figure.high,
            clean=Figure(self.data["clean"]["averaged"], *_ends(clean)),
        )  # fmt: skip

    @property
    def checks(self) -> list[dict[str, Any]]:
        """The S-checks: "id", "passed" (None where one does not apply) and "detail"."""
        return cast(list[dict[str, Any]], self.data["checks"])

    @property
    def threat(self) -> Threat | None:
        """The threat of the headline; without a headline that of all cells, None if they differ."""
        known = {(c["threat"]["norm"], c["threat"]["eps"]) for c in self._bounded()}
        if len(known) != 1:
            return None
        ((norm, eps),) = known
        return as_threat(ThreatConfig.of(norm, eps))

    def _bounded(self) -> list[dict[str, Any]]:
        """The bounded cells at the headline's threat; without a headline, all bounded cells."""
        cells = [cell for cell in self.data["cells"] if cell["bounded"]]
        aware = [cell["threat"] for cell in cells if cell["aware"]]
        if not aware or any(threat != aware[0] for threat in aware):
            return cells
        return [cell for cell in cells if cell["threat"] == aware[0]]

    @property
    def _single(self) -> bool:
        """Whether the model is one network, for which all figures under attack are equal."""
        return len(self.data["clean"]["per_member"]) == 1

    def figures(self) -> dict[str, Figure]:
        """The figures of the headline; for a single network one figure under attack."""
        if self._single:
            return {"clean": self.clean, "under attack": self.aware}
        found = {"clean": self.clean, "unaware": self.unaware, "aware": self.aware}
        if self.average.value is not None:
            best = figure_of(
                self.headline.get("best_single_member"),
                self.headline.get("best_single_member_interval"),
            )
            found |= {"best single member": best, "averaged": self.average}
        return found

    def _setting(self) -> str:
        threat, count = self.threat, self.data["data"]["num_images"]
        budget = f", {budget_text(threat.norm, threat.eps)}" if threat is not None else ""
        images = f"{count} image{'s' * (count != 1)}"
        return f"suite {self.data['suite']}, {images}{budget}"

    def _red(self) -> list[str]:
        return [check["id"] for check in self.checks if check["passed"] is False]

    def __repr__(self) -> str:
        lines = [f"Report({self._setting()})"]
        lines += [f"  {name:<18}  {figure}" for name, figure in self.figures().items()]
        if self.aware.value is None:
            lines.append("  no headline: the suite has no aware attack")
        red = ", ".join(self._red())
        red = f"{red} (explained in report.checks)" if red else "none"
        return "\n".join([*lines, f"  {'red checks':<18}  {red}"])

    def _repr_html_(self) -> str:  # notebooks show it
        def row(*cells: str, tag: str = "td") -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        head = "".join(row(name, str(figure)) for name, figure in self.figures().items())
        red = row("red checks", ", ".join(self._red()) or "none")
        body = "".join(row(r["attack"], r["view"], r["threat"], _accuracy(r)) for r in self.rows())
        return (
            f"<p>{html.escape(self._setting())}</p><table>{head}{red}</table>"
            f"<table>{row('attack', 'view', 'threat', 'accuracy', tag='th')}{body}</table>"
        )

    def adversarial(self, attack: str) -> Tensor:
        """The attacked images (n, C, H, W) in [0, 1], in the dtype of the given images.

        An image that this attack skipped because an earlier attack had fooled every member is the
        point of that earlier attack. The records of `attack` have the correctness of the members.

        Args:
            attack: its name, its label or the id of its cell.

        Raises:
            ConfigError: if no images were saved, or the name matches no attack or several.
        """
        if not self.images:
            raise ConfigError(
                "no attacked images were saved: evaluate with keep_images=True, or on the command "
                "line with --save-images"
            )
        named = [c["id"] for c in self.data["cells"] if attack in (c["attack"], c["label"])]
        fits = [attack] if attack in self.images else [n for n in named if n in self.images]
        if not fits:
            known = ", ".join(self.images)
            raise ConfigError(f"no attack {attack!r} in this report; choose one of {known}")
        if len(fits) > 1:
            raise ConfigError(f"{attack!r} matches several attacks; choose one: {', '.join(fits)}")
        # the tensor shares memory with its array: changes must not reach the report
        return torch.from_numpy(self.images[fits[0]].copy())

    def rows(self) -> list[dict[str, Any]]:
        """One row for the clean images and for each cell: attack, view, threat and accuracy.

        An attack that did not run on all images has no accuracy; `met` is the number of images.
        """
        count = self.data["data"]["num_images"]
        nothing = {
            "view": "", "threat": "", "norm": None, "eps": None, "aware": None, "met": count,
        }  # fmt: skip
        clean = {"attack": "clean", **nothing, **_values(self.clean)}
        found = [clean]
        for cell in self.data["cells"]:
            threat = cell["threat"]
            met = cell.get("met", count)
            whole = met == count
            figure = figure_of(cell["accuracy"]["expected"], cell.get("interval"))
            found.append(
                {
                    "attack": cell["label"] or cell["attack"],
                    "view": cell["view"],
                    "threat": budget_text(threat["norm"], threat["eps"])
                    if cell["bounded"]
                    else "not bounded",
                    "norm": threat["norm"] if cell["bounded"] else None,
                    "eps": threat["eps"] if cell["bounded"] else None,
                    "aware": cell["aware"],
                    "met": met,
                    # an accuracy on a part of the images would be compared with those on all
                    **_values(figure if whole else Figure(None)),
                }
            )
        return found

    def to_frame(self) -> Any:
        """The `rows` as a `pandas.DataFrame`; accuracies in [0, 1].

        Raises:
            ConfigError: if pandas is not installed.
        """
        return _library("pandas", "to_frame").DataFrame(self.rows())

    def to_latex(self) -> str:
        """The headline and all cells as a LaTeX table for booktabs, in percent."""
        lines = [
            f"% {escape_latex(self._setting())}; percent, with 95 % intervals.",
            "% Needs \\usepackage{booktabs}.",
            r"\begin{tabular}{llr}",
            r"\toprule",
            r"attack & view & accuracy \\",
            r"\midrule",
        ]
        lines += [_latex_row(name, "", str(figure)) for name, figure in self.figures().items()]
        lines.append(r"\midrule")
        for row in self.rows()[1:]:
            lines.append(_latex_row(row["attack"], row["view"], _accuracy(row)))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def plot(self, ax: Any = None) -> Any:
        """Plot the figures with their intervals, or the curve over eps for several radii.

        Args:
            ax: matplotlib axes to draw on; default: new axes.

        Returns:
            The axes.

        Raises:
            ConfigError: if matplotlib is not installed.
        """
        if ax is None:
            _, ax = _library("matplotlib.pyplot", "plot").subplots()
        if len(self.curve) > 1:
            names = ("under attack",) if self._single else ("unaware", "aware")
            plot_curve(ax, self.curve, names)
        else:
            plot_bars(ax, self.figures())
        ax.set_title(self._setting())
        return ax

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The headline at each evaluated radius; empty for a single radius."""
        return cast(list[dict[str, Any]], self.data.get("eps_curve", []))

    def to_json(self) -> str:
        return json.dumps(self.data, indent=1) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write the evaluation with its per-image records, for `redefense report` and `audit`.

        Replaces an earlier evaluation under the same suite that was saved there.

        Args:
            folder: the evaluation is written to `FOLDER/evaluation/SUITE.json`, its records to
                `FOLDER/evaluation/SUITE`.

        Returns:
            The JSON file.

        Raises:
            ConfigError: if the folder has an evaluation that can be resumed.
            WriteError: if a file cannot be written.
        """
        home = Path(folder) / EVALUATION
        target = home / f"{self.data['suite']}.json"
        records = home / self.data["clean"]["per_image"]
        # a plan is written to resume from the records beside it
        if (records.parent / PLAN).exists():
            raise ConfigError(
                f"{target} belongs to an evaluation that can be resumed (by `redefense evaluate`, "
                "or with out) and is not replaced: choose another folder"
            )
        with writing(target):
            target.unlink(missing_ok=True)  # an old report must not remain with new records
        self.cells["clean"].save(records, self.index)
        for cell in (*self.data["cells"], *self.data.get("further_cells", ())):
            self.cells[cell["id"]].save(home / cell["per_image"], self.index)
            if cell["id"] in self.images:
                arrays = {"index": self.index, "images": self.images[cell["id"]]}
                write_arrays(home / cell["images"], arrays)
        if self.examples is not None:
            write_arrays(home / self.data["examples"], self.examples.arrays())
        if self.baselines is not None:
            self.baselines.save(records.with_name(BASELINES))
        write_text(target, self.to_json())  # last, when all that it names is there
        return target


def _ends(right: Bools | None) -> tuple[float | None, float | None]:
    """The interval of an accuracy, from per-image correctness (n,)."""
    if right is None:
        return None, None
    low, high = interval(right.astype(np.float64))
    return low, high


def _values(figure: Figure) -> dict[str, float | None]:
    return {"accuracy": figure.value, "low": figure.low, "high": figure.high}


def _accuracy(row: Mapping[str, Any]) -> str:
    if row["accuracy"] is None:
        return f"met {row['met']} images"
    return str(Figure(row["accuracy"], row["low"], row["high"]))


def _latex_row(*cells: str) -> str:
    return " & ".join(escape_latex(cell) for cell in cells) + r" \\"


def _library(module: str, method: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ConfigError(
            f"Report.{method} needs {package}; install it with: pip install {package}"
        ) from None
