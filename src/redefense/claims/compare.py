"""Comparison of methods under matched attacks, each over all of its seeds.

Claims on the same images may have different attacks. Here each figure is over the attacks that all
claims share, so that rows are comparable. With fewer attacks `aware` is higher than in the claims
themselves. Intervals are 95 %, over images, and over seeds too for methods with several.
"""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redefense.claims.format import Claim, Evaluated, least, records_of, unpacked
from redefense.claims.tables import read_whole, with_brackets
from redefense.errors import ConfigError, DataError
from redefense.report.tables import points, with_interval
from redefense.results.intervals import difference_over_seeds, over_seeds
from redefense.results.paired import Attack, alike

Values = NDArray[np.float64]

COLUMNS: Final = ("method", "seeds", "clean", "unaware", "aware", "of each seed")


class Row(NamedTuple):
    """Per-image expected correctness (seeds, n) of a method.

    Attributes:
        clean: on clean images.
        unaware: under the seed's strongest common unaware attack.
        aware: the lowest over the clean image and all common attacks.
    """

    clean: Values
    unaware: Values
    aware: Values


def seeds_of(name: str, folder: Path, images: int | None = None) -> list[Claim]:
    """All claims `folder/NAME-SEED.json`, lowest seed first.

    Args:
        name: of the method.
        folder: of the claims.
        images: use only results on this number of images; seeds without such results are skipped.

    Raises:
        ConfigError: if there is no claim.
        DataError: as `read_whole`, and if two claims are of the same weights.
    """
    seeds = [path.stem.removeprefix(f"{name}-") for path in folder.glob(f"{name}-*.json")]
    # not decimal: of another method, as `red-at-0.json` is for `red`
    numbers = sorted(int(seed) for seed in seeds if seed.isdecimal())
    if not numbers:
        known = sorted({path.stem.rpartition("-")[0] for path in folder.glob("*-*.json")})
        raise ConfigError(
            f"there is no claim {folder / name}-SEED.json; methods in {folder}: "
            f"{', '.join(known) or 'none'}; --claims names another folder"
        )
    paths = [folder / f"{name}-{seed}.json" for seed in numbers]
    found = [read_whole(path) for path in paths]
    of: dict[str, Path] = {}
    for path, it in zip(paths, found, strict=True):
        # as two seeds they would hide the spread between trainings
        if (other := of.setdefault(it.training.weights, path)) != path:
            raise DataError(
                f"{other} and {path} are claims of the same weights, and each seed must be another "
                "training: remove one of them"
            )
    if not (parts := [part for it in found if (part := it.on(images)) is not None]):
        raise ConfigError(f"no claim {folder / name}-SEED.json was measured on {images} images")
    return parts


def under_common(methods: Mapping[str, Sequence[Claim]]) -> tuple[dict[str, Row], int]:
    """Each method's row under the attacks that all claims share, and the number of attacks.

    Among several common sets of images, the one with the most common attacks is used, then the
    largest.

    Raises:
        DataError: if the claims have different images or threats, no per-image correctness, no
            common attack of either kind, or images that a common attack skipped.
    """
    found = {
        name: [{e.subject: e for e in it.evaluations} for it in seeds]
        for name, seeds in methods.items()
    }
    every = [sets for seeds in found.values() for sets in seeds]
    shared = set.intersection(*map(set, every))
    if not shared:
        raise DataError("the claims are about different images or threats")
    common = {
        subject: set.intersection(*(set(sets[subject].attacks()) for sets in every))
        for subject in shared
    }
    chosen = max(shared, key=lambda subject: (len(common[subject]), subject))
    attacks = common[chosen]
    aware = {c.key for sets in every for c in sets[chosen].cells if c.aware} & attacks
    # without both kinds a column of the table would be empty
    if not aware or aware == attacks:
        raise DataError("the claims must share at least one aware and one unaware attack")
    # the recorded worst case is over further attacks, too, which must be the same for all
    whole = alike(records_of(sets[chosen]) for sets in every)
    rows = {
        name: _row([sets[chosen] for sets in seeds], attacks, attacks - aware, whole=whole)
        for name, seeds in found.items()
    }
    for name, row in rows.items():
        # without these images a method would seem stronger: another attack had fooled them
        if skipped := int(np.isnan(row.aware).any(0).sum()):
            raise DataError(
                f"{name} has no worst case over the {len(attacks)} attacks of all claims on "
                f"{skipped} images, which one of them skipped since another attack had fooled "
                "them: compare claims of the same suites, or evaluate with --no-cascade"
            )
    return rows, len(attacks)


def _row(
    seeds: Sequence[Evaluated], common: Set[Attack], unaware: Set[Attack], *, whole: bool
) -> Row:
    # raises for claims without per-image correctness
    aware = [_worst(e, common, whole=whole) for e in seeds]
    # for each seed the strongest attack: an attacker of one model chooses for this model
    kept = [
        {a: unpacked(c.each) for a, c in e.attacks().items() if c.each is not None} for e in seeds
    ]
    return Row(
        clean=np.stack([unpacked(e.untouched) for e in seeds if e.untouched]),
        unaware=np.stack([min((left[a] for a in unaware), key=np.mean) for left in kept]),
        aware=np.stack(aware),
    )


def _worst(found: Evaluated, common: Set[Attack], *, whole: bool) -> Values:
    """Worst case over the common attacks; the recorded one for `whole`."""
    recorded = found.per_image() if whole else None
    return least(found, common) if recorded is None else recorded


def table(methods: Mapping[str, Sequence[Claim]], against: str | None = None) -> str:
    """A Markdown table in percent, one row per method, with means over seeds.

    Args:
        methods: claims by method, in this order.
        against: the reference method of paired differences of the aware figure.

    Raises:
        ConfigError: if `against` is not one of the methods.
        DataError: as in `under_common`.
    """
    if against not in (None, *methods):
        raise ConfigError(f"--against must be one of {', '.join(methods)}, got {against}")
    found, attacks = under_common(methods)
    lines = []
    for name, row in found.items():
        means = [with_interval(over_seeds(values)) for values in row]
        each = ", ".join(f"{100 * value:.1f}" for value in row.aware.mean(1))
        line = [name, str(len(row.aware)), *means, each]
        if against is not None:
            gained = difference_over_seeds(row.aware, found[against].aware)
            line.append("" if name == against else points(gained))
        lines.append(line)
    heading = [*COLUMNS, *([] if against is None else [f"aware, against {against}"])]
    text = with_brackets(heading, lines)
    images = next(iter(found.values())).aware.shape[1]
    several = any(len(row.aware) > 1 for row in found.values())
    over = "images and seeds" if several else "images"
    return f"{text}\n\n{attacks} matched attacks, {images} images; intervals over {over}"
