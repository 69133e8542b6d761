"""Published randomized defences around trained networks, under attacks that average over draws.

    python benchmarks/randomized.py RUN... --images 500 --out randomized/

Measured are the five wrappers of `redefense.stochastic` around member 0 of each run: accuracy on
clean images, under PGD-10 that sees one draw a step (`unaware`), under TorchAttacks' PGD, under the
two attacks of AutoAttack's `rand` mode (20 draws a gradient), and the worst case of each image over
all of these and over attacks on many draws (`aware`). The same fresh draws judge all. With the
default steps an image takes up to 8,000 passes forward and backward in each row; with
`--steps 20 --rand-steps 25` up to 2,300. An image takes fewer once an attack has found a point that
32 draws, of which none judges, all answer wrongly: AutoAttack's second attack and those on many
draws then leave it out, as a cascade does.

Images are measured in blocks, each block in all rows before the next. A measurement that was
stopped goes on where it was. The table is made of the blocks that are complete in all rows.
`settings.json` in the folder says what its blocks were measured with, and others are refused; more
runs and wrappers may be added.
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import redefense
from redefense.attacks import APGD, ATTACKS, Attack
from redefense.attacks.adaptive import Hinge, MeanProbAPGD
from redefense.config import ThreatConfig
from redefense.data import load_dataset, test_indices
from redefense.ensembles import Independent, Origin
from redefense.evaluation.cells import Subject, as_threat
from redefense.evaluation.inputs.precision import attack_copy
from redefense.evaluation.stochastic.cells import (
    Draws,
    attack_drawn,
    ratings,
    scored,
    undecided,
)
from redefense.evaluation.stochastic.recognise import check_draws
from redefense.results.draws import interval, worst_per_image
from redefense.rng import stream
from redefense.runtime.files import write_json
from redefense.stochastic import (
    ActivationPruning,
    GaussianNoise,
    NoiseLayers,
    ResizeAndPad,
    Stochastic,
    TestTimeDropout,
    seeds_of,
)
from redefense.stochastic.certificates import certificate
from redefense.train.api import weights_digest

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Gaussian noise 0.05": lambda net: GaussianNoise(net, sigma=0.05),
    "noise layers 0.05, 0.05": lambda net: NoiseLayers(net, first=0.05, inner=0.05),
    "resize and pad": ResizeAndPad,
    "dropout 0.5": TestTimeDropout,
    "activation pruning": ActivationPruning,
}

SETTINGS: Final = "settings.json"
OPTIONS: Final = ("images", "eps", "draws", "score", "steps", "rand_steps", "block")
"""Those that change what a block holds."""


def attacks(rand_steps: int, steps: int) -> dict[str, tuple[Attack, str]]:
    """The attacks of a row and their views; `base` attacks the network without its wrapper."""
    return {
        "unaware": (ATTACKS["pgd"](steps=10, keep_best=False), "sampled"),  # type: ignore[call-arg]  # the mapping knows attacks alone
        "torchattacks": (ATTACKS["pgd"](preset="torchattacks-3.5.1"), "sampled"),  # type: ignore[call-arg]  # the mapping knows attacks alone
        "rand ce": (APGD(steps=rand_steps, loss="cross_entropy", draws=20), "sampled"),
        "rand dlr": (APGD(steps=rand_steps, loss="dlr", draws=20), "sampled"),
        "hinge": (Hinge(steps=steps), "members"),
        "meanprob": (MeanProbAPGD(steps=steps), "members"),
    }


def measure(
    network: Stochastic, base: nn.Module, block: Subject, seed: int, options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """(S, n) correctness under every attack, and seconds of each.

    An attack that leaves an image out has the correctness of the clean image there.
    """
    threat, found = ThreatConfig(eps=options.eps), {}
    draws = Draws(score=options.score, attack=options.draws)
    judge = network.at(seeds_of(seed, "lost", draws.select))

    def survives(x: Tensor) -> np.ndarray:
        return undecided(ratings(judge, x, block.y)).cpu().numpy()

    numbers = seeds_of(seed, "score", draws.score)
    found["clean"] = scored(network, block.x, block.x, block.y, numbers)["correct"]
    begun = time.perf_counter()
    point = APGD(steps=100)(base, block.x, block.y, as_threat(threat), rng=stream(seed, "base"))
    found["base seconds"] = np.array(time.perf_counter() - begun)
    found["base"] = scored(network, point, block.x, block.y, numbers)["correct"]
    left = survives(point)  # images that some draw still answers correctly under all attacks
    left_by_rand = np.ones_like(left)
    for name, (attack, view) in attacks(options.rand_steps, options.steps).items():
        rows = np.flatnonzero(left if view == "members" else left_by_rand)
        if not len(rows):
            found |= {name: found["clean"], f"{name} seconds": np.zeros(())}
            continue
        points = block.x.clone()
        cell = attack_drawn(
            block.some(rows), network, attack, threat, view, draws,
            seed=seed, name=name, keep=kept_in(points, rows),
        )  # fmt: skip
        found |= {name: found["clean"].copy(), f"{name} seconds": np.array(cell.seconds)}
        found[name][:, rows] = cell.correct
        now = survives(points)
        left &= now
        if name == "rand ce":
            left_by_rand = now
    return found


def kept_in(points: Tensor, rows: np.ndarray) -> Callable[..., None]:
    """A callback of attacks on some rows, which writes what they find into `points`."""

    def keep(_: slice, part: np.ndarray, found: Tensor, *__: object) -> None:
        points[rows[part]] = found

    return keep


def kept_settings(out: Path) -> dict[str, Any] | None:
    """What the blocks of a folder were measured with; None if it has no such file."""
    place = out / SETTINGS
    return json.loads(place.read_text()) if place.exists() else None


def conflict(out: Path, old: dict[str, Any] | None, new: dict[str, Any]) -> str | None:
    """Why blocks of the settings `new` must not join those of the folder; None if they may."""
    if old is None:
        if not any(out.glob("*.npz")):
            return None
        return f"{out} has blocks but no {SETTINGS} that says what of: choose another --out"
    for name, value in new["options"].items():
        if (had := old["options"].get(name)) != value:
            option = "--" + name.replace("_", "-")
            return f"{out} is for {option} {had}, not {value}: choose another --out"
    if (had := old["data"])["checksum"] != new["data"]["checksum"]:
        return (
            f"{out} is for other data ({had['spec']}, SHA-256 {had['checksum'][:12]}; now "
            f"{new['data']['spec']}, {new['data']['checksum'][:12]}): choose another --out"
        )
    for name, digest in new["runs"].items():
        if (had := old["runs"].get(name, digest)) != digest:
            return (
                f"{out} is for another run named {name} (member 0 has SHA-256 {had[:12]}, "
                f"now {digest[:12]}): choose another --out, or rename the run"
            )
    return None


def table(out: Path, rows: list[tuple[str, str]], sizes: list[int], eps: float, pixels: int) -> str:
    """The table as Markdown, from the blocks that every row has."""
    stored = [[out / f"{run}-{name}-{k}.npz" for k in range(len(sizes))] for run, name in rows]
    whole = [k for k in range(len(sizes)) if all(files[k].exists() for files in stored)]
    if not whole:
        return "no block is complete in all rows yet"
    lines = [
        f"{sum(sizes[k] for k in whole)} images, eps {eps:g}, percent [95 % interval over images "
        "and draws]",
        "",
        "| network | wrapper | clean | unaware | TorchAttacks PGD | AutoAttack rand | aware "
        "| certified | minutes | lowest attack |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (run, name), files in zip(rows, stored, strict=True):
        parts = [np.load(files[k]) for k in whole]
        got = {k: np.concatenate([p[k] for p in parts], 1) for k in parts[0] if "seconds" not in k}
        minutes = sum(float(p[k]) for p in parts for k in p if "seconds" in k) / 60
        rand = np.stack([got["rand ce"], got["rand dlr"]])
        cells = [
            said(got["clean"]), said(got["unaware"]), said(got["torchattacks"]),
            said(worst_per_image(rand), folded=True),
            said(worst_per_image(np.stack(list(got.values()))), folded=True),
        ]  # fmt: skip
        proven = "-"
        if name.startswith("Gaussian"):
            right, count = got["clean"].sum(0), len(got["clean"])
            radius = eps * math.sqrt(pixels)
            proven = f"{100 * certificate(right, count, sigma=0.05, radius=radius).single:.1f}"
        lowest = min(got, key=lambda attack: got[attack].mean())
        lowest = f"{lowest} {100 * got[lowest].mean():.1f}"
        cells += [proven, f"{minutes:.1f}", lowest]
        lines.append(f"| {run} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def said(correct: np.ndarray, *, folded: bool = False) -> str:
    low, high = interval(correct, folded=folded)
    return f"{100 * correct.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--eps", type=float, default=0.03)
    parser.add_argument("--draws", type=int, default=16, help="seeds of the aware attacks")
    parser.add_argument("--score", type=int, default=64, help="fresh draws that judge every attack")
    parser.add_argument("--steps", type=int, default=50, help="steps of the aware attacks")
    parser.add_argument("--rand-steps", type=int, default=100, help="steps of AutoAttack's rand")
    parser.add_argument("--block", type=int, default=50, help="images measured together")
    parser.add_argument("--wrappers", nargs="+", choices=WRAPPERS, default=list(WRAPPERS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    until, rows, found = time.monotonic() + 60 * options.minutes, [], {}
    bases: dict[str, nn.Module] = {}
    origins: dict[str, Origin] = {}
    for run in options.runs:
        name = run.absolute().name  # that of . is empty
        if name in bases:
            parser.error(f"two runs are named {name}, and so would be their blocks: rename one")
        loaded = redefense.load(run)
        assert loaded.origin is not None
        bases[name], origins[name] = loaded.member(0).eval(), loaded.origin
    spec = next(iter(origins.values())).run.data.spec
    data = load_dataset(spec)
    for origin in origins.values():
        if origin.data["checksum"] != data.checksum():
            parser.error(f"{origin.path} was not trained on {spec}: give runs of one data set")
    index = test_indices(len(data.test), options.images)
    settings = {
        "options": {name: getattr(options, name) for name in OPTIONS},
        "data": {"spec": spec, "checksum": data.checksum()},
        "runs": {name: weights_digest([network], 64) for name, network in bases.items()},
    }
    kept = kept_settings(options.out)
    if (reason := conflict(options.out, kept, settings)) is not None:
        parser.error(reason)
    runs = ({} if kept is None else kept["runs"]) | settings["runs"]
    write_json(options.out / SETTINGS, settings | {"runs": runs})
    x, y = data.test.float(index), data.test.labels[index]
    x = x.contiguous(memory_format=torch.channels_last)
    blocks = [slice(start, start + options.block) for start in range(0, len(x), options.block)]
    for run_name, network in bases.items():
        folded = attack_copy("auto", Independent([network]), x)
        base = network if folded is None else folded.member(0)
        for name in options.wrappers:
            wrapped = Stochastic(WRAPPERS[name](base), draws=options.draws)
            rows.append((run_name, name))
            found[rows[-1]] = (wrapped, base)
    checked: set[tuple[str, str]] = set()
    for k, part in enumerate(blocks):
        for row in rows:
            place = options.out / f"{row[0]}-{row[1]}-{k}.npz"
            if place.exists() or time.monotonic() > until:
                continue
            network, base = found[row]
            if row not in checked:
                check_draws(network, x[:10])
                checked.add(row)
            block = Subject(network, x[part], y[part], np.arange(len(x[part])), data.name)
            begun = time.perf_counter()
            values = measure(network, base, block, k, options)
            np.savez(place.with_suffix(".tmp.npz"), allow_pickle=False, **values)
            place.with_suffix(".tmp.npz").rename(place)
            seconds = time.perf_counter() - begun
            sys.stderr.write(f"images {part.start} on, {' '.join(row)}: {seconds:.0f} s\n")
    sys.stdout.write(
        table(options.out, rows, [len(x[b]) for b in blocks], options.eps, x[0].numel()) + "\n"
    )


if __name__ == "__main__":
    main()
