"""The tables of `redefense bench attacks` as plain text."""

from collections.abc import Mapping
from itertools import chain
from typing import Any, Final

LIBRARY: Final = "torchattacks==3.5.1"
HOW_TO_INSTALL: Final = (
    f"without {LIBRARY} the columns of the library stay empty: "
    # it pins an old `requests`, which it does not import
    f"pip install --no-deps {LIBRARY}; pip install scipy tqdm"
)
THREE: Final = ("default", "preset", "theirs")
SINGLE_HEAD: Final = (
    f"{'':<14}{'accuracy left, %':>27}{'forward + backward passes':>45}{'seconds':>27}\n"
    f"{'attack':<14}"
    + "".join(f"{kind:>{width}}" for width in (9, 15, 9) for kind in THREE)
    + "  faster"
)
RANDOM_HEAD: Final = (
    f"{'attack':<14}{'knows all':>10}{'expected accuracy, %':>22}{'unchanged, %':>14}"
    f"{'forwards':>10}{'backwards':>11}{'seconds':>9}"
)


def single_line(row: Mapping[str, Any]) -> str:
    """A row of the first table as text."""
    cells: list[list[str]] = [[], [], []]
    for kind in THREE:
        if (it := row.get(kind)) is not None:
            accuracy = f"{100 * it['accuracy']:>9.1f}"
            passes = f"{it['forwards']:.1f} + {it['backwards']:.1f}".rjust(15)
            seconds = f"{it['seconds']:>9.2f}"
        else:
            accuracy, passes, seconds = (f"{'-':>{width}}" for width in (9, 15, 9))
        for column, text in zip(cells, (accuracy, passes, seconds), strict=True):
            column.append(text)
    times = row.get("times_faster")
    end = f"{'-':>8}" if times is None else f"{times:>7.1f}x"
    return f"{row['attack']:<14}" + "".join(chain(*cells)) + end


def random_line(row: Mapping[str, Any]) -> str:
    """A row of the second table as text."""
    return (
        f"{row['attack']:<14}{'yes' if row['aware'] else 'no':>10}{100 * row['accuracy']:>22.1f}"
        f"{100 * row['unchanged']:>14.1f}{row['forwards']:>10.1f}{row['backwards']:>11.1f}"
        f"{row['seconds']:>9.2f}"
    )


def tables(result: Mapping[str, Any]) -> str:
    """Both tables as plain text, with the settings of the measurement."""
    it = result["settings"]
    where = (
        f"{it['model']} on {it['data']}, {it['images']} images, L-inf eps {it['eps']:.4g}, "
        f"seed {it['seed']}, {it['threads']} thread(s), torch {it['torch']}"
    )
    if it["train_images"] is not None:
        where += f", {it['train_images']} training images an epoch"
    single, random = result["single"], result["random"]
    lines = [
        f"One network: {where}; clean {100 * single['clean']:.1f} %",
        "theirs: " + (it["library"] or HOW_TO_INSTALL) + "; faster: their seconds over ours",
        SINGLE_HEAD,
        *map(single_line, single["rows"]),
    ]
    if random is not None:
        lines += [
            "",
            f"A random ensemble of {it['members']}: {where}; clean {100 * random['clean']:.1f} %",
            "knows all: no - our preset, a member drawn per call; yes - given all members",
            RANDOM_HEAD,
            *map(random_line, random["rows"]),
        ]
    return "\n".join(lines)
