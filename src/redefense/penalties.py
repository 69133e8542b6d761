"""Regularizers as pure functions of the members' input gradients or predictions.

Input gradients are those of the **summed** cross-entropy, so the gradient of an image neither
depends on the batch size nor needs rescaling. The member axis comes first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.threat import TINY
from redefense.types import Float, Labels


def _full(grads: Tensor) -> Tensor:
    """At least single precision: norms of half-precision gradients underflow."""
    return grads.float() if grads.dtype.itemsize < 4 else grads


def pairwise_cosines(grads: Float[Tensor, "M B D"]) -> Float[Tensor, "B M M"]:
    """Signed cosine between the gradients of every two members, per image.

    The product of the two norms is clamped at 1e-12, so a zero gradient is orthogonal to all.
    """
    grads = _full(grads).transpose(0, 1)
    length = torch.linalg.vector_norm(grads, dim=-1)
    lengths = length[:, :, None] * length[:, None, :]
    return (grads @ grads.mT).div(lengths.clamp_min(TINY))


def _distinct(cosines: Float[Tensor, "B M M"]) -> Float[Tensor, "B P"]:
    """The entries of the P unordered pairs of distinct members, row by row."""
    num_members = cosines.shape[1]
    rows, columns = torch.triu_indices(num_members, num_members, 1, device=cosines.device)
    # not cosines[:, rows, columns], whose backward pass sorts the indices on an accelerator
    return cosines.flatten(1).index_select(1, rows * num_members + columns)


def gradient_similarity(grads: Float[Tensor, "M B D"]) -> Float[Tensor, ""]:
    """Mean |cosine| between the input gradients of distinct members (RED, Eq. 3; TRS).

    Args:
        grads: gradient of each member's summed loss w.r.t. each image, flattened.

    Returns:
        Scalar in [0, 1]: mean over unordered member pairs and images; 1 where all members agree up
        to sign, 0 where orthogonal. 0 for a single member or an empty batch.
    """
    num_members, num_images = grads.shape[:2]
    if num_members < 2 or num_images == 0:
        return _full(grads).new_zeros(())
    return _distinct(pairwise_cosines(grads)).abs().mean()


def lipschitz(grads: Float[Tensor, "M B D"]) -> Float[Tensor, ""]:
    """Mean L2 norm of the input gradients over members and images (RED, Eq. 12, unhalved).

    Args:
        grads: gradient of each member's summed loss w.r.t. each image, flattened.

    Returns:
        Scalar >= 0, in units of loss per unit of L2 distance; 0 for an empty batch.
    """
    if grads.shape[1] == 0:
        return _full(grads).new_zeros(())
    lengths: Tensor = torch.linalg.vector_norm(_full(grads), dim=-1)
    return lengths.mean()


def squared_lipschitz(grads: Float[Tensor, "M B D"]) -> Float[Tensor, ""]:
    """The smoothness term of the code released with RED and TRS.

    Mean over members of 2 * mean over images of the squared L2 norm of the gradient of the
    **batch-mean** loss, which is 1/B of the summed loss's.
    """
    num_images = grads.shape[1]
    if num_images == 0:
        return _full(grads).new_zeros(())
    return 2 * _full(grads).div(num_images).square().sum(-1).mean()


def gradient_alignment(grads: Float[Tensor, "M B D"]) -> Float[Tensor, ""]:
    """Mean over images of log sum_{i<j} exp cos(g_i, g_j): GAL's gradient alignment loss.

    Args:
        grads: gradient of each member's summed loss w.r.t. each image, flattened.

    Returns:
        Scalar between log P - 1 / (M - 1) and log P + 1 with P = M (M - 1) / 2 pairs: cosines are
        signed, opposed gradients are best. 0 for a single member or an empty batch.
    """
    num_members, num_images = grads.shape[:2]
    if num_members < 2 or num_images == 0:
        return _full(grads).new_zeros(())
    return _distinct(pairwise_cosines(grads)).logsumexp(1).mean()


def ensemble_entropy(logits: Float[Tensor, "M B C"]) -> Float[Tensor, ""]:
    """Mean entropy of the members' mean probability, in nats (ADP's first term).

    Returns:
        Scalar in [0, log C], in float64.
    """
    mean = logits.double().softmax(-1).mean(0)
    # the source's 1e-20 keeps the gradient finite where a probability is 0
    return -(mean * (mean + 1e-20).log()).sum(-1).mean()


def log_det_diversity(logits: Float[Tensor, "M B C"], y: Labels) -> Float[Tensor, ""]:
    """Mean log determinant of the members' Gram matrix of wrong-class predictions (ADP).

    Each member's probabilities without the true class, at unit L2 length, are a column of Mt; the
    value is log det(Mt^T Mt + 1e-6 I) by Cholesky in float64. Only the ratio of the wrong classes'
    probabilities matters, so a softmax over these is equivalent and never vanishes.

    Returns:
        Scalar <= M * 1e-6: about 0 for orthogonal columns, (M - 1) log 1e-6 + log M for equal ones.
        With M >= C it measures the 1e-6 alone, since columns live in C - 1 dimensions.
    """
    mask = y[:, None] == torch.arange(logits.shape[-1], device=y.device)
    wrong = logits.double().masked_fill(mask, -torch.inf).softmax(-1)
    columns = F.normalize(wrong, dim=-1).transpose(0, 1)
    gram = columns @ columns.mT
    jitter = 1e-6 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # unchecked: the check would synchronise with the device; the loss is checked anyway
    factor: Tensor = torch.linalg.cholesky_ex(gram + jitter).L
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()


def margin_cross_entropy(
    logits: Float[Tensor, "B C"], y: Labels, other_weight: float, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """MRBoost's MCE per image: CE(z) + w / (C - 1) * sum over wrong k of -log softmax(-z)_k.

    The second term lowers every wrong class's logit; with w = 0 it is the cross-entropy, the
    only part in which labels are smoothed.
    """
    ce = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
    if other_weight == 0:
        return ce
    low = -(-logits).log_softmax(-1)
    others = low.sum(-1) - low.gather(1, y[:, None]).squeeze(1)
    return ce + other_weight / (logits.shape[-1] - 1) * others
