"""Loss surfaces: values of linear members are known everywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redefense.config import override
from redefense.ensembles import Independent
from redefense.errors import ConfigError, DataError
from redefense.recipes import recipe
from redefense.report.landscape import GRID, draw, surface, surface_of, write_landscape
from redefense.train.experiment import train


class Slope(nn.Module):
    def __init__(self, pixel: int) -> None:
        super().__init__()
        self.pixel = pixel

    def forward(self, x: Tensor) -> Tensor:
        z = 4 * (x.flatten(1)[:, self.pixel] - 0.5)
        return torch.stack([z, -z], 1)


X, Y = torch.full((1, 1, 2, 2), 0.6, dtype=torch.float64), torch.tensor([0])


def test_each_member_rises_along_its_own_gradient_only() -> None:
    found = surface(Independent([Slope(0), Slope(1)]), X, Y, radius=0.3)
    assert found.cosine == pytest.approx(0)
    first, second = found.losses
    assert np.allclose(first, first[:, :1])
    assert np.allclose(second, second[:1])
    assert (np.diff(first[:, 0]) > 0).all()
    # the gradient of the loss points to smaller values of the pixel
    assert first[:, 0] == pytest.approx(np.log1p(np.exp(-8 * (0.1 - found.steps))))


def test_equal_members_have_equal_surfaces() -> None:
    found = surface(Independent([Slope(0), Slope(0)]), X, Y, radius=0.3)
    assert found.cosine == pytest.approx(1)
    assert (found.losses[0] == found.losses[1]).all()
    assert found.losses.shape == (2, GRID, GRID)


def test_what_has_no_surface_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the ensemble has 1"):
        surface(Independent([Slope(0)]), X, Y, radius=0.3)

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), 2)

    with pytest.raises(ConfigError, match="gradient is zero at the image"):
        surface(Independent([Slope(0), Flat()]), X, Y, radius=0.3)
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        write_landscape([tmp_path], tmp_path / "a.pdf")


def test_data_may_have_moved_but_must_be_those_of_the_run(tmp_path: Path) -> None:
    def arrays(name: str, seed: int) -> str:
        labels = np.arange(60) % 3
        images = np.random.default_rng(seed).integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / name, x_train=images, y_train=labels, x_test=images, y_test=labels)
        return f"npz:{tmp_path / name}"

    own, run = arrays("own.npz", 0), tmp_path / "run"
    changes = ["epochs=1", "ensemble.num_members=2", "ensemble.model=mlp", f"data.spec={own}"]
    train(override(recipe("digits-vanilla"), changes), run, quiet=True)
    here = surface_of(run, image=0)
    (tmp_path / "own.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(DataError, match="no such file"):
        surface_of(run, image=0)
    there = surface_of(run, image=0, data=f"npz:{tmp_path / 'moved.npz'}")
    assert (there.losses == here.losses).all()
    other = arrays("own.npz", 1)
    for given in (None, other):
        with pytest.raises(DataError, match=f"{own} is not the data that .* was trained on"):
            surface_of(run, image=0, data=given)


def test_the_drawing_is_whole_and_the_same_each_time() -> None:
    found = surface(Independent([Slope(0), Slope(1)]), X, Y, radius=0.3)
    once, again = draw([("one", found)]), draw([("one", found)])
    assert once == again
    assert once.strip().endswith(b"</svg>")
    assert draw([("one", found), ("two", found)], "png").startswith(b"\x89PNG")
