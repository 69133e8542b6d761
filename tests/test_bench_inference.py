"""The latency benchmark: ratios of one run, for every batch size."""

from redefense.bench.inference import run, table


def test_every_ratio_lies_between_its_extremes_and_is_printed() -> None:
    result = run(model="resnet8", num_members=4, batches=(1, 8), rounds=3)
    for key in ("sampled_over_member", "averaged_over_member"):
        assert list(result[key]) == ["1", "8"]
        for ratio in result[key].values():
            assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]
    assert all(
        f"{result['sampled_over_member'][b]['median']:.2f}x" in table(result) for b in ("1", "8")
    )
