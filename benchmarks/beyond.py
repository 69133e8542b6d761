"""An attack that no suite has, with a multiple of the passes of a whole evaluation.

    redefense evaluate RUN --suite aware --save-images
    python benchmarks/beyond.py RUN --times 10 --seed 1

It attacks the images on which the evaluation leaves a member right, for as many passes as all
attacks of the evaluation had together, times `--times`, and prints what this takes from the worst
case. Each round draws settings for each image: a subset of members that are to be fooled by one
point, no target, one for all or one each, a temperature, a step size, a start (a random point, a
corner of the ball, or the best point so far); and for the round one of three losses, the number of
steps and the momentum. It shares no code with `redefense.attacks`. L-inf only.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import redefense
from redefense.data import load_dataset, test_indices
from redefense.ensembles import Ensemble
from redefense.evaluation.inputs.precision import attack_copy
from redefense.report.tables import points
from redefense.results.intervals import paired_difference
from redefense.results.records import load

BATCH = 256


@dataclass
class Victim:
    """Test images, the networks, and the worst point of each image so far.

    Attributes:
        ensemble: judges every point; `fast` answers alike but for rounding, and is attacked.
        low: (n,) least probability that a drawn member is right.
    """

    ensemble: Ensemble
    fast: Ensemble
    x: Tensor
    y: Tensor
    eps: float
    points: Tensor
    low: Tensor

    def expected(self, points: Tensor, rows: Tensor) -> Tensor:
        """Probability that a drawn member is right at these points."""
        parts = []
        with torch.no_grad():
            for part, y in zip(points.split(BATCH), self.y[rows].split(BATCH), strict=True):
                right = self.ensemble.member_logits(part).argmax(2) == y
                parts.append(right.double().t() @ self.ensemble.mixture.double())
        return torch.cat(parts)

    def offer(self, points: Tensor, rows: Tensor) -> None:
        """Keep the points that fool more than the best ones so far."""
        found = self.expected(points, rows)
        better = found < self.low[rows] - 1e-6
        self.low[rows[better]], self.points[rows[better]] = found[better], points[better]

    def inside(self, points: Tensor, rows: Tensor) -> Tensor:
        x = self.x[rows]
        return (x + (points - x).clamp(-self.eps, self.eps)).clamp(0, 1)


def stored_points(victim: Victim, folder: Path) -> float:
    """Offer the points that all attacks of an evaluation left; return the passes these took."""
    passes, rows = 0.0, torch.arange(len(victim.x))
    for file in sorted(folder.glob("*.npz")):
        arrays = np.load(file)
        if "images" in arrays and len(arrays["images"]) == len(rows):
            victim.offer(victim.inside(torch.from_numpy(arrays["images"]).float(), rows), rows)
        elif "forwards" in arrays and arrays["forwards"].ndim == 0:
            met = arrays["met"].sum() if "met" in arrays else len(rows)
            passes += float(arrays["forwards"] + arrays["backwards"]) * float(met)
    return passes


def one_round(
    victim: Victim, rows: Tensor, clean: Tensor, rng: torch.Generator, limit: float
) -> float:
    """Attack some images with settings drawn anew; return the passes spent."""
    count, members, classes = clean[rows].shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    def one_of(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=rng))]

    y, scale = victim.y[rows], clean[rows].std(2)
    fooled = (members * (1 - victim.low[rows])).round().long()
    larger = (fooled + 1).clamp(max=members)
    size = torch.where(
        uniform(count) < 0.6, larger, torch.randint(1, members + 1, (count,), generator=rng)
    )
    subset = uniform(count, members).argsort(1).argsort(1) < size[:, None]
    wrong = clean[rows].softmax(2).scatter(2, y[:, None, None].expand(-1, members, 1), -1)
    likely = wrong.argsort(2, descending=True)
    few = min(4, classes - 1)
    own = likely.gather(2, (uniform(count, members, 1) ** 2 * few).long()).squeeze(2)
    common = likely[:, 0].gather(1, (uniform(count, 1) ** 1.5 * (classes - 1)).long())
    kind = uniform(count, 1)
    target = torch.where(kind < 0.7, common.expand(-1, members), own)
    temperature = 0.02 * 50 ** uniform(count, 1)
    loss, steps, momentum = one_of(0, 1, 2), int(one_of(30, 60, 150)), one_of(0.0, 0.75, 0.95)
    rate = victim.eps * 0.15 * (10 ** uniform(count, 1, 1, 1))
    noise = (2 * uniform(*victim.x[rows].shape) - 1) * victim.eps
    start, near = uniform(count, 1, 1, 1), uniform(count, 1, 1, 1) < 0.5
    point = torch.where(
        start < 0.3, victim.x[rows] + noise,
        torch.where(start < 0.55, victim.x[rows] + noise.sign() * victim.eps,
                    victim.points[rows] + 0.2 * noise * near),
    )  # fmt: skip
    point, speed, spent = victim.inside(point, rows), torch.zeros_like(noise), 0.0
    for step in range(steps + 1):
        at = point.detach().requires_grad_()
        with torch.enable_grad():
            logits = victim.fast.member_logits(at)
            labels = y.expand(members, -1)
            true = logits.gather(2, labels[..., None]).squeeze(2)
            gap = true - logits.scatter(2, labels[..., None], -math.inf).amax(2)
            aimed = true - logits.gather(2, target.t()[..., None]).squeeze(2)
            if loss == 2:
                aimed = -logits.log_softmax(2).gather(2, target.t()[..., None]).squeeze(2)
            targeted = (kind.t() >= 0.4) & (gap > 0)
            value = torch.where(targeted, aimed / (1 if loss == 2 else scale.t()), gap / scale.t())
            if loss == 0:
                scaled = (value.t() / temperature).masked_fill(~subset, -math.inf)
                total = (temperature[:, 0] * scaled.logsumexp(1)).sum()
            else:
                kept = value.t() + (temperature if loss == 1 else 0.1)
                total = (kept.clamp_min(0) * subset).sum()
        right = (gap.detach() >= 0).double().t() @ victim.ensemble.mixture.double()
        better = (right < victim.low[rows] - 1e-6).nonzero().flatten()
        if len(better):
            victim.offer(at.detach()[better], rows[better])
        spent += 2 * members * count
        if step == steps or spent > limit:
            break
        (slope,) = torch.autograd.grad(total, at)
        slope = slope / slope.abs().flatten(1).mean(1).clamp_min(1e-20).view(-1, 1, 1, 1)
        speed = momentum * speed + slope
        pace = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        point = victim.inside(point - rate * pace * speed.sign(), rows)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--suite", default="aware", help="name of the evaluation")
    parser.add_argument("--data", help="data specification; default: that of the run")
    parser.add_argument("--times", type=float, default=10.0, help="passes, in evaluations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    options = parser.parse_args()
    folder = options.run / "evaluation" / options.suite
    if not list(folder.glob("*.images.npz")):
        parser.error(f"{folder} has no attacked images: evaluate with --save-images")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    loaded = redefense.load(options.run)
    assert loaded.origin is not None
    loaded.requires_grad_(requires_grad=False)
    (stored,) = load(options.run / "evaluation" / f"{options.suite}.json")
    threat = loaded.origin.run.threat
    if threat.norm != "inf":
        parser.error(f"the run's threat must be L-inf, got norm {threat.norm}")
    data = load_dataset(options.data or loaded.origin.run.data.spec)
    index = test_indices(len(data.test), stored.evaluation.data.num_images)
    x, y = data.test.float(index), data.test.labels[index]
    x = x.contiguous(memory_format=torch.channels_last)
    rows, eps = torch.arange(len(x)), threat.eps
    fast = attack_copy("auto", loaded, x) or loaded
    victim = Victim(loaded, fast, x, y, eps, x.clone(), torch.full((len(x),), math.inf).double())
    victim.offer(x, rows)
    passes = stored_points(victim, folder)
    before = victim.low.clone()
    sys.stderr.write(f"{passes / len(x):.0f} passes per image; {100 * before.mean():.2f} % left\n")
    with torch.no_grad():
        clean = torch.cat([loaded.member_logits(part) for part in x.split(BATCH)], 1).transpose(
            0, 1
        )
    rng, spent, begun = torch.Generator().manual_seed(options.seed), 0.0, time.monotonic()
    budget, until = options.times * passes, begun + 60 * options.minutes
    while spent < budget and time.monotonic() < until:
        left = (victim.low > 1e-6).nonzero().flatten()
        if not len(left):
            break
        some = left[torch.randperm(len(left), generator=rng)[:BATCH]].sort().values
        spent += one_round(victim, some, clean, rng, budget - spent)
        sys.stderr.write(f"\r{spent / passes:.2f} times, {100 * victim.low.mean():.2f} % left ")
    taken = points(paired_difference(victim.low.numpy(), before.numpy()))
    sys.stdout.write(
        f"\n{len(x)} images, seed {options.seed}: {100 * before.mean():.2f} % under "
        f"{options.suite}, {100 * victim.low.mean():.2f} % after {spent / passes:.1f} times its "
        f"passes, {taken} points, on {int((before - victim.low > 1e-6).sum())} images; "
        f"{time.monotonic() - begun:.0f} s\n"
    )


if __name__ == "__main__":
    main()
