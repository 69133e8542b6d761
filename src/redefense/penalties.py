"""Regularizers as pure functions of the members' input gradients or predictions.

Input gradients are those of the **summed** cross-entropy, so the gradient of an image neither
depends on the batch size nor needs rescaling. The member axis comes first.
"""

import torch
from torch import Tensor

from redefense.types import Float

TINY = 1e-12


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
    rows, columns = torch.triu_indices(num_members, num_members, 1, device=grads.device)
    return pairwise_cosines(grads)[:, rows, columns].abs().mean()


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
