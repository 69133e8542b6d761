"""Help texts of commands: options under headings, examples, and hints at mistaken options."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import typer
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

SETTINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "augment": "data.augment=true",
        "batch-size": "batch_size=64",
        "defence": "defence.name=red",
        "epochs": "epochs=3",
        "eps": "threat.eps=8/255",
        "images": "data.images=500",
        "lr": "optim.lr=0.1",
        "members": "ensemble.num_members=3",
        "model": "ensemble.model=resnet8",
        "norm": "threat.norm=l2",
        "num-members": "ensemble.num_members=3",
        "optimizer": "optim.name=adam",
        "weight-decay": "optim.weight_decay=1e-4",
        "width": "ensemble.width=16",
    }
)
"""Values of --set, by the option that one might try in its place."""

INSTEAD: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "train": {"recipe": "give the recipe without an option: redefense train digits-red"},
        "evaluate": {
            "set": "a trained run keeps its settings: use --eps and --norm, or a --suite FILE.json",
            "recipe": "give the directory of a trained run: redefense evaluate runs/digits-red",
            "attack": "a suite lists the attacks: use --suite NAME, or a --suite FILE.json",
            "attacks": "a suite lists the attacks: use --suite NAME, or a --suite FILE.json",
        },
    }
)
"""What to do instead of a mistaken option, by command and option."""


class HelpfulCommand(TyperCommand):
    """A command whose help has headings and examples, without rich, which is slow to import."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {option for param in self.get_params(ctx) for option in param.opts}
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            name: str | None = getattr(error, "option_name", None)
            # errors about an option of this command have this attribute, too
            if name is not None and name not in known:
                hint = hint_at(ctx, name.lstrip("-"), takes_settings="--set" in known)
                if hint is not None:
                    # in place of the options that are spelled alike
                    error.message, error.possibilities = f"{error.message}: {hint}", None  # type: ignore[attr-defined]  # of an error about an unknown option
            raise

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
    # the outermost context is the program
    while ctx.parent is not None:
        names.append(str(ctx.info_name))
        ctx = ctx.parent
    return " ".join(reversed(names))


def hint_at(ctx: Any, option: str, *, takes_settings: bool) -> str | None:
    """What to use in place of an option that a command does not have; None if unknown.

    Args:
        ctx: of the command.
        option: without its hyphens.
        takes_settings: whether the command has the option --set.
    """
    if hint := INSTEAD.get(command_of(ctx), {}).get(option):
        return hint
    near = difflib.get_close_matches(option, SETTINGS, n=1, cutoff=0.8)
    if takes_settings and near:
        return f"it is a setting of the run: use --set {SETTINGS[near[0]]}"
    others = [
        name for name, options in _options(ctx.find_root().command) if f"--{option}" in options
    ]
    return f"it is an option of redefense {', '.join(others)}" if others else None


def _options(group: Any, above: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every command below a group, with its options."""
    for name, command in getattr(group, "commands", {}).items():  # a command may stand alone
        if hasattr(command, "commands"):
            yield from _options(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", {option for param in command.params for option in param.opts}
