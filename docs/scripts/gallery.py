"""Draws the gallery of the documentation: `python docs/scripts/gallery.py`.

It writes docs/pictures/*.svg. Figures come from the claims, so the pictures change only where those
do. Colours are variables of the pages with a fallback, so that one file serves both themes.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
INK, PAPER, GREY = "#1f2328", "#fefefe", "#818b98"
BLUE, ORANGE = "#3b7dd8", "#d9822b"
METHODS = ["vanilla-1", "gal-1", "adp-1", "dverge-1", "ps-red-1", "trs-0", "red-1", "mrboost-1",
           "red-at-0", "barre-1", "at-1", "swift-1", "swift-one-1"]  # fmt: skip
CURRENT = ["vanilla-1", "dverge-1", "mrboost-1", "ps-red-1", "trs-0", "red-1", "barre-1", "at-1",
           "swift-1", "swift-one-1", "fork-subset-1", "red-at-1", "one-24-1",
           "fork-20-1"]  # fmt: skip
EARLIER = ["long-at-0", "long-swift-0", "long-swift-one-0"]
LABELS = {"vanilla": "undefended", "mrboost": "MRBoost", "swift": "one-step AT",
          "swift-one": "one-step AT, one network", "fork-subset": "late fork",
          "one-24": "one-step AT, one network", "fork-20": "late fork",
          "red-at": "RED and AT"}  # fmt: skip
VARIABLES = {INK: "--color-foreground-primary", PAPER: "--color-background-primary"}


def label_of(name: str) -> str:
    """A label for the claim of that name, whose last part is the seed."""
    method = name.rpartition("-")[0].removeprefix("long-")
    return LABELS.get(method, method.upper())


def claim_of(name: str) -> dict[str, Any]:
    claim: dict[str, Any] = json.loads((ROOT / "claims" / f"{name}.json").read_text())
    return claim


def headline(name: str, images: int = 1000) -> dict[str, Any]:
    """The evaluation of a claim on so many images that has both headlines."""
    claim = claim_of(name)
    found: list[dict[str, Any]] = [
        it
        for it in claim["evaluations"]
        if it["data"]["num_images"] == images and it["aware"] is not None
    ]
    return found[-1]


def dots(
    axes: Axes, figures: Sequence[dict[str, float]], *, shift: float, color: str, **style: Any
) -> None:
    """One dot with its 95 % interval a row."""
    values = [100 * figure["value"] for figure in figures]
    reach = [
        [100 * (figure["value"] - figure["low"]) for figure in figures],
        [100 * (figure["high"] - figure["value"]) for figure in figures],
    ]
    rows = [row + shift for row in range(len(figures))]
    axes.errorbar(values, rows, xerr=reach, linestyle="none", color=color, capsize=2, **style)


def picture(names: Sequence[str], x_label: str, title: str) -> tuple[Any, Axes]:
    figure, axes = plt.subplots(figsize=(4.6, 0.34 * len(names) + 1.6), layout="constrained")
    axes.set_yticks(range(len(names)), [label_of(name) for name in names])
    axes.set_xlabel(x_label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", color=GREY, alpha=0.3)
    axes.margins(y=0.03)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    return figure, axes


def legend(figure: Any) -> None:
    """Names of the two kinds of dots, below the plot: beside it, a phone has no room."""
    figure.legend(frameon=False, loc="outside lower center", ncols=2, handletextpad=0.2)


def save(figure: Any, name: str, label: str) -> None:
    """Write the figure with its colours as variables and a text for screen readers.

    Its class `narrow` says that a phone can show it whole.
    """
    held, narrow = io.StringIO(), 'class="narrow" ' if figure.get_figwidth() < 6 else ""
    figure.savefig(held, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = held.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable},{color})")
    text = text.replace("<svg ", f'<svg {narrow}role="img" aria-label="{label}" ', 1)
    (PICTURES / name).write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def methods() -> None:
    """Unaware and aware accuracy of every method."""
    found = [headline(name) for name in METHODS]
    figure, axes = picture(
        METHODS, "accuracy in percent, 95 % intervals", "CIFAR-10, eps 0.03, 1,000 images"
    )
    dots(axes, [it["unaware"] for it in found], shift=0.12, color=BLUE, fmt="o", label="unaware")
    dots(axes, [it["aware"] for it in found], shift=-0.12, color=ORANGE, fmt="D", label="aware")
    axes.set_xlim(left=0)
    legend(figure)
    save(figure, "methods.svg", "Accuracy of thirteen methods, unaware and aware")


def worth() -> None:
    """What the draw keeps more than the best member and than the average, paired."""
    names = [name for name in METHODS if name != "swift-one-1"]
    found = [headline(name) for name in names]
    figure, axes = picture(
        names, "points that the draw keeps more, 95 % intervals", "Is the draw worth it?"
    )
    axes.axvline(0, color=INK, linewidth=1)
    best = [it["over_alone"] or it["over_single"] for it in found]
    dots(axes, best, shift=0.12, color=BLUE, fmt="o", label="than the best member")
    average = [it["over_averaged"] for it in found]
    dots(axes, average, shift=-0.12, color=ORANGE, fmt="D", label="than the average")
    legend(figure)
    save(
        figure,
        "worth.svg",
        "Paired differences of the draw from the best member and from the average",
    )


def cost() -> None:
    """Aware accuracy against the cost of training, networks that draw and single networks.

    Markers of about equal cost are drawn side by side.
    """
    drawn: list[float] = []
    labels: list[tuple[str, float, float]] = []
    figure, axes = plt.subplots(figsize=(5.4, 3.9), layout="constrained")
    kinds = {True: (ORANGE, "D", "one network"), False: (BLUE, "o", "draw of three members")}
    for names, prefix, style in (
        (CURRENT, "aware-", {}), (EARLIER, "", {"markerfacecolor": PAPER}),
    ):  # fmt: skip
        for name in names:
            claim = claim_of(prefix + name)
            aware = headline(prefix + name, 500)["aware"]
            members = claim["run"]["ensemble"]["num_members"]
            trained = claim["training"]
            passes = trained["passes"] * members * trained["images"] / 1e6
            while any(abs(passes / other - 1) < 0.025 for other in drawn):
                passes *= 1.028
            drawn.append(passes)
            color, marker, _ = kinds[members == 1]
            low, value, high = (100 * aware[key] for key in ("low", "value", "high"))
            axes.errorbar(
                passes, value, yerr=[[value - low], [high - value]], color=color, fmt=marker,
                capsize=2, **style,
            )  # fmt: skip
            # a band over the seeds, where a training was repeated
            method = name.rpartition("-")[0]
            seeds = [
                100 * headline(path.stem, 500)["aware"]["value"]
                for path in sorted((ROOT / "claims").glob(f"{prefix}{method}-[0-9].json"))
            ]
            if len(seeds) > 1:
                axes.vlines(passes, min(seeds), max(seeds), color=color, alpha=0.35, linewidth=9)
            # the marker shows that it is one network
            labels.append((label_of(name).removesuffix(", one network"), passes, value))
    for label, passes, value in labels:
        # the labels of their neighbours are on both sides
        below = {("BARRE", True): (0, -28), ("late fork", False): (0, -34)}
        if (place := below.get((label, passes < 4))) is not None:
            axes.annotate(label, (passes, value), place, textcoords="offset points",
                          ha="center", va="center", fontsize=9)  # fmt: skip
            continue
        free = label == "one-step AT" and (value < 24 or passes > 8)
        beside = not free and any(1 < other / passes < 1.07 for other in drawn)
        axes.annotate(
            label, (passes, value), (-7 if beside else 7, 0), textcoords="offset points",
            ha="right" if beside else "left", va="center", fontsize=9,
        )  # fmt: skip
    for color, marker, label in kinds.values():
        axes.plot([], [], marker, color=color, label=label)
    axes.plot([], [], "o", color=GREY, markerfacecolor=PAPER, label="longer training, older suite")
    axes.set_xscale("log")
    axes.set_xlim(0.4, 22)
    axes.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.set_xlabel("training cost, millions of forward passes")
    axes.set_ylabel("aware accuracy, %")
    axes.set_title("CIFAR-10, eps 0.03, 500 images, 95 % intervals", loc="left", fontsize=11)
    axes.set_ylim(0, 45)
    axes.grid(color=GREY, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    save(figure, "cost.svg", "Aware accuracy against the cost of training")


def main() -> None:
    mpl.rcParams |= {
        "svg.fonttype": "none", "svg.hashsalt": "redefense", "font.family": "sans-serif",
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.facecolor": PAPER, "figure.facecolor": PAPER,
    }  # fmt: skip
    methods()
    worth()
    cost()


if __name__ == "__main__":
    main()
