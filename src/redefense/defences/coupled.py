"""Losses that couple members through their input gradients (RED, GAL, TRS).

`joint` is the definition, with all members in one graph. `parts` computes the same gradient with
one member's graph at a time, as training does. With R the regularizer, a function of the gradients
g_m,

    d/dtheta_m R(g_1, ..., g_M) = d/dtheta_m <g_m(theta_m), v_m>,    v_m = dR/dg_m held constant,

so the detached gradients are computed first, R is differentiated with respect to them (tiny
tensors), and each member is then trained on its cross-entropy plus <g_m, v_m>.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.ensembles import Ensemble, frozen_statistics, frozen_weights
from redefense.models.double_backward import input_gradients
from redefense.networks import differentiable_twice, differentiating
from redefense.runtime.phases import INPUT_GRADIENTS, PENALTY, phase
from redefense.threat import norms, per_image
from redefense.types import Float, Labels, Loss

PerMember = Tensor | Sequence[Tensor]
"""Images for all members, or one batch of images a member."""

DIFFERENTIATE: Final = ("exact", "finite")
"""The two ways to differentiate <g_m, v_m>: double backward, or differences of losses."""

FINITE_STEP = 1.0
"""L2 length of the finite difference, in pixel units: about that of the training adversary's steps.

Of 0.03, 0.1, 0.3, 1 and 2 it agreed best with the exact gradient on ReLU networks (digits: cosine
0.87 to 0.93, against 0.48 to 0.61 at 0.03): a shorter step crosses fewer kinks but gives each more
weight.
"""


def _of(images: PerMember, m: int) -> Tensor:
    return images if isinstance(images, Tensor) else images[m]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupled:
    """A cross-entropy and a regularizer of the members' input gradients at given images.

    Attributes:
        y: labels (B,).
        ce_images: where the cross-entropy is taken.
        ce_weight: weight of each member's batch-mean cross-entropy (1 / M or 1).
        label_smoothing: for that cross-entropy; input gradients are those without smoothing.
        points: images at which input gradients are computed. A point that *is* `ce_images` shares
            its forward pass; only forward passes of the cross-entropy update batch norm's running
            statistics.
        penalty: maps the gradients (M, B, D) at each point to named scalars, without weights.
        weights: weight of each named scalar in the total.
    """

    y: Labels
    ce_images: PerMember
    ce_weight: float
    points: tuple[PerMember, ...]
    penalty: Callable[..., dict[str, Tensor]]
    weights: Mapping[str, float]
    label_smoothing: float = 0.0

    def joint(self, ensemble: Ensemble) -> dict[str, Tensor]:
        """The loss in one graph: `ce`, the penalty's terms, and `total` with the weights."""
        ces: list[Tensor] = []
        grads: list[list[Tensor]] = [[] for _ in self.points]
        for m in range(ensemble.num_members):
            ce, member_grads = self._member(ensemble, m)
            ces.append(ce)
            for collected, grad in zip(grads, member_grads, strict=True):
                collected.append(grad)
        named = self.penalty(*(torch.stack(g) for g in grads))
        ce = torch.stack(ces).sum() * self.ce_weight
        total = ce + cast(Tensor, sum(self.weights[k] * v for k, v in named.items()))
        return {"ce": ce, **named, "total": total}

    def parts(self, ensemble: Ensemble, differentiate: str) -> Iterator[Loss]:
        """One part per member; the sum of their gradients is that of `joint`'s total."""
        cotangents, logged = self._cotangents(ensemble)
        for row, m in enumerate(ensemble.spread.own(ensemble.num_members)):
            # a penalty without a gradient, as the similarity of a single member
            if not cotangents:
                ce = self.ce_weight * self._cross_entropy(ensemble, m)
                coupling = torch.zeros_like(ce)
            elif differentiate == "exact":
                ce, member_grads = self._member(ensemble, m)
                ce = self.ce_weight * ce
                inner = [(g * v[row]).sum() for g, v in zip(member_grads, cotangents, strict=True)]
                coupling = torch.stack(inner).sum()
            else:
                ce = self.ce_weight * self._cross_entropy(ensemble, m)
                # two more passes at other points, which must not update the statistics
                with frozen_statistics(ensemble):
                    coupling = torch.stack(
                        [
                            directional(ensemble, m, _of(p, m), self.y, v[row].to(_of(p, m).dtype))
                            for p, v in zip(self.points, cotangents, strict=True)
                        ]
                    ).sum()
            # logged for one member only: terms of parts are summed
            terms = {"ce": ce.detach(), "total": ce.detach()}
            if m == 0:
                terms = {**logged, **terms, "total": logged["total"] + ce.detach()}
            yield Loss(ce + coupling, terms)

    def _cotangents(self, ensemble: Ensemble) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The cotangents v, one per point, empty if the penalty is constant; and terms for the log.

        Only v is kept after this call, in the precision of the forward passes, to which a member's
        first layer would round it anyway.
        """
        spread = ensemble.spread
        grads = [
            spread.whole(self._detached(ensemble, point)).requires_grad_() for point in self.points
        ]
        with phase(PENALTY):
            named = self.penalty(*grads)
            regularizer = cast(Tensor, sum(self.weights[k] * v for k, v in named.items()))
            logged = {k: v.detach() for k, v in named.items()}
            logged["total"] = regularizer.detach()
            if not any(self.weights[k] != 0 and v.requires_grad for k, v in named.items()):
                return [], logged
            # materialised: a term may not depend on every point, and its gradient there is zero
            cotangents = torch.autograd.grad(regularizer, grads, materialize_grads=True)
            return [_as_forward(spread.local_cotangents(v)) for v in cotangents], logged

    def _cross_entropy(self, ensemble: Ensemble, m: int) -> Tensor:
        logits = ensemble.logits_of(m, _of(self.ce_images, m))
        return F.cross_entropy(logits, self.y, label_smoothing=self.label_smoothing)

    def _member(self, ensemble: Ensemble, m: int) -> tuple[Tensor, list[Tensor]]:
        """Cross-entropy of member m, and its input gradient (B, D) at every point."""
        ce: Tensor | None = None
        grads = []
        for point in self.points:
            # by identity, since comparing values would wait for the device
            shared = point is self.ce_images
            x = _of(point, m).detach().requires_grad_()
            with nullcontext() if shared else frozen_statistics(ensemble), differentiable_twice():
                logits = ensemble.logits_of(m, x)
                # summed: an image's gradient must not depend on the size of the batch
                loss = F.cross_entropy(logits, self.y, reduction="sum")
            if shared:
                ce = loss / len(self.y)
                if smoothing := self.label_smoothing:
                    ce = F.cross_entropy(logits, self.y, label_smoothing=smoothing)
            # kernels of the weights are not needed here: a `Function` cannot know that by itself
            with input_gradients(), differentiating():
                (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            grads.append(grad.flatten(1))
        if ce is None:
            ce = self._cross_entropy(ensemble, m)
        return ce, grads

    def _detached(self, ensemble: Ensemble, point: PerMember) -> Float[Tensor, "O B D"]:
        """Input gradients of the members on this process, without graphs for the weights."""
        grads = []
        with frozen_weights(ensemble), frozen_statistics(ensemble), phase(INPUT_GRADIENTS):
            for m in ensemble.spread.own(ensemble.num_members):
                x = _of(point, m).detach().requires_grad_()
                loss = F.cross_entropy(ensemble.logits_of(m, x), self.y, reduction="sum")
                with differentiating():
                    (grad,) = torch.autograd.grad(loss, x)
                grads.append(grad.flatten(1))
        return torch.stack(grads)


def _as_forward(v: Tensor) -> Tensor:
    kind = v.device.type
    return v.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else v


def directional(
    ensemble: Ensemble,
    m: int,
    x: Tensor,
    y: Labels,
    v: Float[Tensor, "B D"],
    step: float = FINITE_STEP,
) -> Float[Tensor, ""]:
    """<g_m, v> summed over images, by central differences of the losses (Finlay & Oberman, 2021).

    Each image moves by `step` (L2) along its own v / |v|; images with v = 0 contribute nothing.
    The value approximates the inner product, its gradient that of the inner product.
    """
    length = norms(v, 2.0)
    # images with v = 0 stay in place: the clamp only prevents 0 / 0
    unit = (v / length.clamp_min(1e-30)[:, None]).view_as(x)
    loss: list[Tensor] = []
    for sign in (1.0, -1.0):
        logits = ensemble.logits_of(m, x + sign * step * unit)
        loss.append(F.cross_entropy(logits, y, reduction="none"))
    slope = (loss[0] - loss[1]) / (2 * step)
    return (slope * per_image(length, slope)).sum()
