"""Latency of random sampling inference, of a single member and of the averaged ensemble.

In every round all views classify the same batch in turn, and each ratio is computed within its
round, so that a drift of the machine's speed cancels. For hypernetworks the plain member is a
materialised one. It is compared with a member with cached kernels and with a first answer, which
generates them.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from redefense.bench.timing import machine, seconds
from redefense.ensembles import Ensemble, Hyper, channels_last, kernels_kept
from redefense.ensembles.configs import EnsembleConfig, HyperConfig, IndependentConfig
from redefense.errors import ConfigError
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.runtime.device import check_device, computing
from redefense.train.loading import resolve

BATCHES = (1, 256)
HYPER: Final = ("cifar10-ps-red", "cifar10-mini-ps-red")
"""Hypernetworks of the members: the first whose units tile the network."""

WARM_UP: Final = 64
"""Warm-up calls of an accelerator: its libraries initialise for each new number of images per
member, of which random draws make many.
"""

View = Callable[[Tensor], Tensor]
Log = Callable[[str], None]


@computing()
def run(
    *,
    model: str = "resnet18",
    num_members: int = 8,
    ensemble: str = "independent",
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
    device: str = "cpu",
    seed: int = 0,
    log: Log = lambda _: None,
) -> dict[str, Any]:
    """Time the kinds of inference on random images of 32 x 32 pixels.

    Members are drawn per image from the operating system's entropy, as in deployment.

    Args:
        model: a name in `MODELS`.
        num_members: M.
        ensemble: "independent", or "hyper" with the hypernetworks of a PS-RED recipe.
        batches: batch sizes.
        rounds: number of timings of each.
        device: torch device.
        seed: seed of weights and images.
        log: called with each log line.

    Returns:
        `sampled_over_member` and `averaged_over_member`, and for "hyper" `cached_over_member` and
        `first_over_member`: for each batch size the median ratio of seconds, its extremes and the
        number of rounds; `seconds` of one member; `settings`.

    Raises:
        ConfigError: for another ensemble or device, or a network that no units tile.
    """
    place = check_device(device)
    kind = named_kind(ensemble, model, num_members)
    built = kind.build(num_classes=10, shape=(3, 32, 32), seed=seed).to(place).eval()
    views = _views(channels_last(built))  # as `load` gives it
    log(f"timing {num_members} members of {model}, {rounds} rounds")
    others = [name for name in views if name != "member"]
    result: dict[str, Any] = {
        **{f"{name}_over_member": {} for name in others},
        "seconds": {},
        "settings": {
            "ensemble": ensemble,
            "model": model,
            "members": num_members,
            **machine(device),
        },
    }
    # as deployed, with constant weights; only the view "first" generates kernels
    with kernels_kept(built):
        for batch in batches:
            # the time does not depend on the values of weights and images, so neither is real
            x = torch.rand(batch, 3, 32, 32, generator=stream(seed, "bench", batch)).to(place)
            # one image takes milliseconds: repeated until a round is long enough to time
            repeats = max(1, 64 // batch)
            for view in views.values():
                _seconds(view, x, 1 if place.type == "cpu" else WARM_UP)
            found = [{k: _seconds(v, x, repeats) for k, v in views.items()} for _ in range(rounds)]
            for name in others:
                ratios = [round_[name] / round_["member"] for round_ in found]
                result[f"{name}_over_member"][str(batch)] = {
                    "median": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "rounds": rounds,
                }
            result["seconds"][str(batch)] = statistics.median(r["member"] for r in found)
    return result


def named_kind(ensemble: str, model: str, num_members: int) -> EnsembleConfig:
    if ensemble == "independent":
        return IndependentConfig(model=model, num_members=num_members)
    if ensemble != "hyper":
        raise ConfigError(f"ensemble must be independent or hyper, got {ensemble}")
    refusals = []
    for name in HYPER:
        _, kind, _ = resolve(recipe(name))
        assert isinstance(kind, HyperConfig)
        try:
            # one member shows whether the units tile the network
            replace(kind, model=model, num_members=1).build(
                num_classes=10, shape=(3, 32, 32), seed=0
            )
        except ConfigError as error:
            refusals.append(error)
            continue
        return replace(kind, model=model, num_members=num_members)
    raise refusals[-1]


def _views(ensemble: Ensemble) -> dict[str, View]:
    """The timed views; each first answer generates the kernels of member 0."""
    views: dict[str, View] = {
        "member": ensemble.member(0),
        "sampled": ensemble.sampled(per="image"),
        "averaged": ensemble.averaged(),
    }
    if isinstance(ensemble, Hyper):
        another = copy.deepcopy(ensemble)  # without cached kernels
        views |= {
            "cached": lambda x: ensemble.logits_of(0, x),
            "first": lambda x: another.logits_of(0, x),
        }
    return views


def _seconds(view: View, x: Tensor, repeats: int) -> float:
    """Seconds of one call, the mean over `repeats`."""
    with torch.inference_mode():
        return seconds(lambda: view(x), x.device, repeats)


def table(result: Mapping[str, Any]) -> str:
    """The ratios as plain text."""
    it = result["settings"]
    names = [key.removesuffix("_over_member") for key in result if key.endswith("_over_member")]
    lines = [
        f"{it['model']} ({it['ensemble']}), M = {it['members']}, {it['device']}, "
        f"{it['threads']} thread(s), torch {it['torch']}",
        f"{'batch':>6}  {'one member':>12}" + "".join(f"  {n + ' / member':>24}" for n in names),
    ]
    for batch, answer in result["seconds"].items():
        ratios = [
            "{median:.2f}x ({lowest:.2f} to {highest:.2f})".format(
                **result[f"{name}_over_member"][batch]
            )
            for name in names
        ]
        columns = "".join(f"  {ratio:>24}" for ratio in ratios)
        lines.append(f"{batch:>6}  {1e3 * answer:>9.1f} ms{columns}")
    return "\n".join(lines)
