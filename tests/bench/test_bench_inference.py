"""The latency benchmark: ratios of one run, for every batch size."""

import pytest

from redefense.bench.inference import run, table
from redefense.errors import ConfigError


def test_every_ratio_lies_between_its_extremes_and_is_printed() -> None:
    result = run(model="digits-cnn", num_members=2, batches=(1, 8), rounds=3)
    for key in ("sampled_over_member", "averaged_over_member"):
        assert list(result[key]) == ["1", "8"]
        for ratio in result[key].values():
            assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]
    assert all(
        f"{result['sampled_over_member'][b]['median']:.2f}x" in table(result) for b in ("1", "8")
    )


def test_written_members_are_timed_with_their_kernels_kept_and_written_anew() -> None:
    result = run(model="resnet8", num_members=2, ensemble="hyper", batches=(1,), rounds=1)
    assert result["settings"]["ensemble"] == "hyper"
    for name in ("sampled", "averaged", "cached", "first"):
        assert result[f"{name}_over_member"]["1"]["median"] > 0
        assert f"{name} / member" in table(result)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ensemble": "both"}, "independent or hyper"),
        ({"ensemble": "hyper", "model": "mlp"}, "mlp|convolution"),
    ],
)
def test_what_cannot_be_timed_is_refused(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(rounds=1, **settings)  # type: ignore[arg-type]  # names only
