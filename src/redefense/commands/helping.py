"""Help texts of commands: options under headings, and examples."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from typer.core import TyperCommand

HEADINGS: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "Data": ("data", "images", "train_images", "download", "calibration"),
        "Attacks": (
            "suite", "eps", "norm", "attack", "seeds", "checks", "no_cascade", "stochastic",
            "sigma", "draws", "alpha",
        ),
        "Draws": ("policy", "key", "epoch", "client_header", "mode", "scores", "research"),
        "Batches and limits": (
            "grouped", "max_batch", "max_delay", "max_queue", "deadline", "max_body", "max_pixels",
            "tick", "grace",
        ),
        "Random numbers and machine": ("seed", "device", "threads", "mesh", "batch_size", "replay"),
        "Output": ("out", "save_images", "profile", "strict", "as_json", "quiet"),
    }
)  # fmt: skip
"""Headings and their parameters; all other parameters are listed under "Options"."""

EXAMPLES: Final[Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "train": (
            "redefense train digits-red",
            "redefense train cifar10-mini-red --data cifar10:PATH --set epochs=3",
            "redefense train digits-red --resume",
        ),
        "evaluate": (
            "redefense evaluate runs/digits-red",
            "redefense evaluate runs/digits-red --suite aware --images 500",
            "redefense evaluate runs/digits-red --eps 2/255,4/255,8/255 --save-images",
        ),
        "certify": ("redefense certify runs/digits-red --sigma 0.25 --eps 0.1,0.25",),
        "report": (
            "redefense report runs/ --out report.html",
            "redefense report runs/digits-red runs/digits-gal --out table.tex",
        ),
        "audit": ("redefense audit runs/digits-red", "redefense audit table.csv --json"),
        "landscape": ("redefense landscape runs/digits-red --out surfaces.svg",),
        "card": ("redefense card runs/digits-red --license apache-2.0",),
        "list": ("redefense list recipes", "redefense list attacks --json"),
        "show": ("redefense show digits-red", "redefense show cifar10-ps-red --parameters"),
        "check-plugin": ("redefense check-plugin my_attack.py",),
        "materialise": ("redefense materialise runs/digits-ps-red --out runs/plain",),
        "export": ("redefense export runs/digits-red --out bundle",),
        "verify": ("redefense verify bundle --against runs/digits-red",),
        "serve": (
            "redefense serve bundle --port 8000",
            "redefense serve bundle --research --seed 0",
            "redefense serve bundle --audit",
        ),
        "claim make": ("redefense claim make runs/digits-red --out claims/red-0.json",),
        "claim check": ("redefense claim check claims/red-0.json --json",),
        "claim recompute": ("redefense claim recompute claims/red-0.json --data digits",),
        "claim compare": ("redefense claim compare red vanilla --against vanilla",),
        "claim table": ("redefense claim table claims/red-0.json --attacks",),
        "leaderboard": ("redefense leaderboard claims --out site",),
        "data check": ("redefense data check cifar10:PATH",),
        "bench attacks": ("redefense bench attacks --images 128 --attack pgd",),
        "bench inference": ("redefense bench inference --members 8 --json",),
        "bench train": ("redefense bench train --model resnet8 --members 3",),
        "bench memory": ("redefense bench memory --members 2 --members 8",),
        "bench scaling": ("redefense bench scaling digits-red --processes 2",),
    }
)
"""Examples, by name of the command."""


class HelpfulCommand(TyperCommand):
    """A command whose help has headings and examples, without rich, which is slow to import."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                heading = "Arguments"
                if param.param_type_name != "argument":
                    heading = _heading(str(param.name))
                groups.setdefault(heading, []).append(record)
        order = ("Arguments", "Options", *HEADINGS)
        for heading in sorted(groups, key=order.index):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if examples := EXAMPLES.get(command_of(ctx)):
            with formatter.section("Examples"):
                for line in examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def _heading(name: str) -> str:
    return next((heading for heading, names in HEADINGS.items() if name in names), "Options")


def command_of(ctx: Any) -> str:
    """The command's name without the program's, e.g. "bench train"."""
    names = []
    while ctx.parent is not None:
        names.append(str(ctx.info_name))
        ctx = ctx.parent
    return " ".join(reversed(names))
