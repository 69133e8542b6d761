"""What random sampling inference costs: latency of the drawn member, of one member, of all.

Ratios within one run: in every round the three answer the same batch in turn, and each ratio is
taken within its round, so that a drift of the machine's speed cancels.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from redefense.bench.timing import machine, seconds
from redefense.kinds import IndependentKind
from redefense.rng import stream
from redefense.train.run import channels_last

BATCHES = (1, 256)


def run(
    *,
    model: str = "resnet18",
    num_members: int = 8,
    batches: Sequence[int] = BATCHES,
    rounds: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Time the three kinds of inference on random images of 32 x 32 pixels.

    Members are drawn per image from the operating system's entropy, as in deployment.

    Returns:
        `sampled_over_member` and `averaged_over_member`: for each batch size the median ratio of
        seconds, its extremes and the number of rounds; `seconds` of one member; `settings`.
    """
    kind = IndependentKind(model=model, num_members=num_members)
    ensemble = kind.build(num_classes=10, shape=(3, 32, 32), seed=seed).to(device).eval()
    channels_last(ensemble)  # as `load` gives it
    views: dict[str, nn.Module] = {
        "member": ensemble.member(0),
        "sampled": ensemble.sampled(per="image"),
        "averaged": ensemble.averaged(),
    }
    result: dict[str, Any] = {
        "sampled_over_member": {},
        "averaged_over_member": {},
        "seconds": {},
        "settings": {
            "model": model,
            "members": num_members,
            **machine(device),
        },
    }
    for batch in batches:
        x = torch.rand(batch, 3, 32, 32, generator=stream(seed, "bench", batch)).to(device)
        # one image takes milliseconds: as many as make a round worth timing
        repeats = max(1, 64 // batch)
        for view in views.values():
            _seconds(view, x, 1)
        found = [{k: _seconds(v, x, repeats) for k, v in views.items()} for _ in range(rounds)]
        for name in ("sampled", "averaged"):
            ratios = [round_[name] / round_["member"] for round_ in found]
            result[f"{name}_over_member"][str(batch)] = {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "rounds": rounds,
            }
        result["seconds"][str(batch)] = statistics.median(r["member"] for r in found)
    return result


def _seconds(view: nn.Module, x: Tensor, repeats: int) -> float:
    """Seconds of one answer, the mean over `repeats`."""
    with torch.inference_mode():
        return seconds(lambda: view(x), x.device, repeats)


def table(result: Mapping[str, Any]) -> str:
    """The ratios as plain text."""
    it = result["settings"]
    lines = [
        f"{it['model']}, M = {it['members']}, {it['device']}, {it['threads']} thread(s), "
        f"torch {it['torch']}",
        f"{'batch':>6}  {'one member':>12}  {'sampled / member':>24}  {'averaged / member':>24}",
    ]
    for batch, answer in result["seconds"].items():
        ratios = [
            "{median:.2f}x ({lowest:.2f} to {highest:.2f})".format(**result[key][batch])
            for key in ("sampled_over_member", "averaged_over_member")
        ]
        lines.append(f"{batch:>6}  {1e3 * answer:>9.1f} ms  {ratios[0]:>24}  {ratios[1]:>24}")
    return "\n".join(lines)
