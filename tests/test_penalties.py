"""Regularizers against slow loops from their definitions, and at their limits."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from redefense.penalties import gradient_similarity, lipschitz, squared_lipschitz
from redefense.rng import stream

MEMBERS = [2, 3, 5]


def gradients(num_members: int, num_images: int = 4, pixels: int = 6) -> Tensor:
    rng = stream(0, "gradients", num_members)
    return torch.randn(num_members, num_images, pixels, dtype=torch.float64, generator=rng)


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(u) * float(v) for u, v in zip(a, b, strict=True))
    sizes = [math.sqrt(sum(float(u) ** 2 for u in g)) for g in (a, b)]
    return dot / max(sizes[0] * sizes[1], 1e-12)


@pytest.mark.parametrize("num_members", MEMBERS)
def test_similarity_is_the_mean_absolute_cosine_over_pairs_and_images(num_members: int) -> None:
    g = gradients(num_members)
    pairs = list(itertools.combinations(range(num_members), 2))
    slow = [abs(cosine(g[i, b], g[j, b])) for i, j in pairs for b in range(g.shape[1])]
    assert gradient_similarity(g).item() == pytest.approx(sum(slow) / len(slow))


@pytest.mark.parametrize("num_members", MEMBERS)
def test_lipschitz_is_the_mean_length_over_members_and_images(num_members: int) -> None:
    g = gradients(num_members)
    slow = [math.sqrt(sum(float(u) ** 2 for u in row)) for row in g.flatten(0, 1)]
    assert lipschitz(g).item() == pytest.approx(sum(slow) / len(slow))


@pytest.mark.parametrize("num_members", MEMBERS)
def test_the_released_smoothness_squares_the_gradient_of_the_batch_mean_loss(
    num_members: int,
) -> None:
    g = gradients(num_members)
    batch = g.shape[1]
    slow = sum(
        2 * sum(float((u / batch) ** 2) for u in g[m].flatten()) / batch for m in range(num_members)
    )
    assert squared_lipschitz(g).item() == pytest.approx(slow / num_members)


@pytest.mark.parametrize("num_members", MEMBERS)
def test_similarity_of_known_directions(num_members: int) -> None:
    eye = torch.eye(num_members, dtype=torch.float64).unsqueeze(1)
    assert gradient_similarity(eye).item() == 0
    assert gradient_similarity(torch.ones_like(eye)).item() == pytest.approx(1)
    opposed = torch.ones_like(eye) * torch.tensor([1.0, -1.0] * 5)[:num_members, None, None]
    assert gradient_similarity(opposed).item() == pytest.approx(1)
    simplex = eye - 1 / num_members
    assert gradient_similarity(simplex).item() == pytest.approx(1 / (num_members - 1))


def test_similarity_ignores_scale_and_the_order_of_members() -> None:
    g = gradients(4)
    scaled = g * torch.rand(4, g.shape[1], 1, dtype=torch.float64, generator=stream(1)).add(0.1)
    expected = gradient_similarity(g)
    torch.testing.assert_close(gradient_similarity(scaled), expected)
    torch.testing.assert_close(gradient_similarity(g[[2, 0, 3, 1]]), expected)


def test_one_member_or_no_image_has_nothing_to_resemble() -> None:
    assert gradient_similarity(gradients(1)).item() == 0
    empty = gradients(3)[:, :0]
    assert [f(empty).item() for f in (gradient_similarity, lipschitz, squared_lipschitz)] == [0] * 3


def test_a_zero_gradient_is_orthogonal_and_differentiates_to_zero() -> None:
    g = gradients(2)
    g[0] = 0
    g.requires_grad_()
    value = gradient_similarity(g) + lipschitz(g)
    (grad,) = torch.autograd.grad(value, g)
    assert gradient_similarity(g).item() == 0
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("penalty", [gradient_similarity, lipschitz, squared_lipschitz])
def test_derivatives_equal_finite_differences(penalty) -> None:  # type: ignore[no-untyped-def]  # three functions of one signature
    assert torch.autograd.gradcheck(penalty, gradients(3).requires_grad_())


def test_half_precision_is_computed_in_single() -> None:
    g = 1e-3 * gradients(3).float()
    torch.testing.assert_close(lipschitz(g.bfloat16()), lipschitz(g), rtol=1e-2, atol=0)
    assert lipschitz(g.bfloat16()).dtype == torch.float32
