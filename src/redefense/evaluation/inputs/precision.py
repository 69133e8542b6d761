"""Precision of an evaluation, and the copies of its networks that attacks query."""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial
from io import StringIO
from itertools import chain
from typing import Final

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from redefense.attacks.base import input_gradient
from redefense.checks.sample import spread
from redefense.ensembles import Ensemble, Independent, MemberOf, evaluating, frozen_weights
from redefense.ensembles.batches import InBatches
from redefense.ensembles.views import mean_log_probs
from redefense.evaluation.suite import AttackPrecision
from redefense.models import double_backward
from redefense.networks import Queried, copied
from redefense.threat import TINY
from redefense.types import Float, Images, Logits

NEAR: Final = 0.08
"""Outputs whose two largest logits are closer, in standard deviations of the image's logits, are
recomputed in full precision. On nine kinds of ResNet-8, bfloat16 changed this distance by at most
0.057 on 200 images."""

SMALL: Final = 12
"""Fewer images than this are computed in single precision: recomputing the outputs of a few of them
would take longer than bfloat16 saves."""


def computed_in(ensemble: Ensemble, x: Images) -> tuple[Ensemble, Images]:
    """Networks and images for attacks, in single precision, or in double if the images are double.

    Half precision would round the steps of an attack away. Networks of another dtype get images
    cast to theirs, as a deployed half-precision network rounds its input.

    Returns:
        The ensemble, with networks of another dtype wrapped, and the images.
    """
    at = x.to(torch.promote_types(x.dtype, torch.float32))
    if not isinstance(ensemble, Independent):
        return ensemble, at
    members = [ensemble.member(m) for m in range(ensemble.num_members)]
    taken = [_taken(network, at, x.dtype) for network in members]
    # the networks would round double images anyway
    if at.dtype == torch.float64 and all(dtype == torch.float32 for dtype in taken):
        return ensemble, at.float()
    if all(dtype == at.dtype for dtype in taken):
        return ensemble, at
    wrapped = [
        network if dtype == at.dtype else Queried(network, dtype)
        for network, dtype in zip(members, taken, strict=True)
    ]
    found = Independent(wrapped, ensemble.mixture)
    found.origin = ensemble.origin
    return found, at


def _taken(network: nn.Module, x: Images, given: torch.dtype) -> torch.dtype:
    """The input dtype of a network: that of the images, else of its weights, else the given one.

    It is that of the images, too, for a network that fails on all; its error is reported later. The
    network is called only if its weights have another dtype.
    """
    values = chain(network.parameters(), network.buffers())
    own = Counter(value.dtype for value in values if value.is_floating_point())
    if own.keys() <= {x.dtype}:
        return x.dtype
    for dtype in dict.fromkeys((x.dtype, *(dtype for dtype, _ in own.most_common()), given)):
        with suppress(Exception), torch.no_grad(), evaluating(network):  # may raise anything
            network(x[:1].to(dtype))
            return dtype
    return x.dtype


PLAIN: Final[dict[type[nn.Module], type[nn.Module]]] = {
    double_backward.Conv2d: nn.Conv2d,
    double_backward.BatchNorm2d: nn.BatchNorm2d,
}
"""Layers of this package and those of torch that they extend by a second derivative."""


class InBfloat16(Ensemble):
    """A view for attacks in bfloat16, except where that could change a prediction.

    Gradients are computed in bfloat16. Outputs near a decision boundary are recomputed in full
    precision, so that an attack selects points by the predictions that are recorded later.

    Args:
        ensemble: recomputes outputs near a decision boundary.
        approximate: from `attack_copy`; queried in bfloat16, with few images in single precision.
    """

    def __init__(self, ensemble: Ensemble, approximate: Ensemble) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble, self.approximate = ensemble, approximate

    def logits_of(self, m: int, x: Images) -> Logits:
        if len(x) < SMALL:
            return self.approximate.logits_of(m, x)
        # no cache, as in training: weights cast without a graph would have no gradient later
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.approximate.logits_of(m, x).to(x.dtype)
        return self._exact_near(logits, x, logits, partial(self.ensemble.logits_of, m))

    def member_logits(self, x: Images) -> Float[Tensor, "M B C"]:
        logits = super().member_logits(x)
        if self.num_members == 1 or len(x) < SMALL:
            return logits
        # the average can be near its boundary where no member is near its own
        average = mean_log_probs(logits.detach(), self.mixture)
        return self._exact_near(average, x, logits, self.ensemble.member_logits)

    @staticmethod
    def _exact_near(
        answers: Logits, x: Images, logits: Tensor, exact: Callable[[Images], Tensor]
    ) -> Tensor:
        """The logits, with exact ones of the images whose answers are near a boundary."""
        rows = (gap(answers) < NEAR).nonzero().flatten()
        if len(rows) == 0:
            return logits
        # added as constants: these values become exact, their gradients remain those of bfloat16
        with torch.no_grad():
            shift = exact(x.detach()[rows]) - logits.index_select(-2, rows)
        return logits.index_add(-2, rows, shift)


def gap(logits: Logits) -> Float[Tensor, " B"]:
    """Difference of the two largest logits, in standard deviations of an image's logits."""
    top = logits.detach().topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]) / logits.detach().std(1).clamp_min(TINY)


def attack_copy(wanted: AttackPrecision, ensemble: Ensemble, x: Images) -> Ensemble | None:
    """What aware attacks query in place of the ensemble; None for the ensemble itself.

    For "auto" a copy with folded batch norms, which answers alike but for rounding, and faster. For
    "bf16" the same, or the ensemble itself, to be queried in bfloat16 by `InBfloat16`.

    Warns:
        UserWarning: if "bf16" is wanted and does not agree on some images: the distance of the two
            largest logits changes by more than three quarters of `NEAR`, or the gradients of the
            largest logit have a mean cosine below 0.9 for a member.
    """
    if wanted == "fp32" or x.dtype != torch.float32:
        return None
    folded, some = _folded(ensemble), x[spread(x)]
    if wanted == "auto":
        return folded if _agrees(ensemble, folded, some, moved=1e-4, cosine=0.999) else None
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
        if _agrees(ensemble, folded, some, moved=0.75 * NEAR, cosine=0.9):
            return folded
    warnings.warn(
        "the model answers differently in bfloat16 and in single precision: attacks in "
        "bfloat16 may be weaker, and the accuracy too high. Use precision fp32 or auto",
        stacklevel=2,
    )
    return ensemble


def _folded(ensemble: Ensemble) -> Ensemble:
    """A copy whose batch norms are part of the convolutions before them, where torch can trace it.

    Folding changes outputs by rounding only, far less than bfloat16 does, and saves a fifth of the
    time of a gradient on a ResNet-8.
    """
    if not isinstance(ensemble, Independent):
        return ensemble
    members = [_fused(ensemble.member(m)) for m in range(ensemble.num_members)]
    found = Independent(members, ensemble.mixture)
    found.origin = ensemble.origin
    return found


def _fused(network: nn.Module) -> nn.Module:
    if isinstance(network, InBatches):
        return InBatches(_fused(network.network), network.batch_size)
    if isinstance(network, MemberOf):  # its copy would be one of the whole ensemble
        return network
    # tracing runs the network's own code, and copying may fail: the network itself always works
    with suppress(Exception), evaluating(network):
        other = copied(network)
        for module in other.modules():
            # the same layers for first derivatives, and the only ones that torch can fuse
            if type(module) in PLAIN:
                module.__class__ = PLAIN[type(module)]
        return _fused_graph(fx.symbolic_trace(other)).eval().requires_grad_(False)
    return network


def _fused_graph(traced: fx.GraphModule) -> fx.GraphModule:
    layers = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or {node.op, before.op} != {"call_module"}:
            continue
        conv, norm = layers[str(before.target)], layers[str(node.target)]
        once = len(before.users) == calls[before.target] == 1
        if once and type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _agrees(ensemble: Ensemble, other: Ensemble, x: Images, *, moved: float, cosine: float) -> bool:
    """Whether another ensemble, under the current autocast, answers as this one without it.

    Folding moves the distance of the two largest logits by less than 1e-6 standard deviations.
    """
    for m in range(ensemble.num_members):
        with torch.autocast(x.device.type, enabled=False):
            exact, slope = _answer(ensemble, m, x)
        # a traced network may fail in any way, and torch then prints its code
        try:
            with redirect_stderr(StringIO()):
                given, coarse = _answer(other, m, x)
        except Exception:  # noqa: BLE001 - as said
            return False
        alike = torch.cosine_similarity(slope, coarse, dim=1).mean()
        if not (bool(((gap(given) - gap(exact)).abs() <= moved).all()) and float(alike) >= cosine):
            return False
    return True


def _answer(ensemble: Ensemble, m: int, x: Images) -> tuple[Logits, Float[Tensor, "B D"]]:
    """Logits, and the gradient of each image's largest logit."""
    x = x.detach().requires_grad_()
    with frozen_weights(ensemble), torch.enable_grad():
        logits = ensemble.logits_of(m, x)
        grad = input_gradient(logits.float().amax(1), x)
    return logits.detach().float(), grad.flatten(1)
