"""Methods side by side: only attacks that all have met, means over seeds, paired differences."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cli_tools import command
from redefense.claims import compare, format
from redefense.errors import ConfigError, DataError
from redefense.results.intervals import difference_over_seeds

Left = Mapping[str, NDArray[np.float64]]
AWARE = {"hinge", "arc"}
N = 200
RUN = {
    "data": {"spec": "digits"}, "defence": {"name": "at"},
    "ensemble": {"name": "independent", "num_members": 3},
}  # fmt: skip


def claim(name: str, clean: NDArray[np.float64], left: Left, eps: float = 0.03) -> format.Claim:
    """A claim of which only what is compared is filled in."""
    cells = tuple(
        format.Attacked(
            id=attack, attack=attack, view="members" if attack in AWARE else "sampled",
            aware=attack in AWARE, bounded=True, repr=f"{attack}()",
            expected=format.Figure(value=float(q.mean())), each=format.packed(q),
        )
        for attack, q in left.items()
    )  # fmt: skip
    found = format.Evaluated(
        data={"name": "digits", "num_images": len(clean)}, norm="inf", eps=eps, suites=(),
        clean=None, unaware=None, aware=None,
        best_single_member=None, averaged=None, over_single=None, over_averaged=None,
        cells=cells, red_checks=(), untouched=format.packed(clean), lowest=None,
    )  # fmt: skip
    training = format.Training(epochs=1, images=1, passes=1, minutes=None, weights=name)
    return format.Claim(schema=1, name=name, run=RUN, training=training, evaluations=(found,))


def draws(seed: int, p: float) -> NDArray[np.float64]:
    return (np.random.default_rng(seed).random(N) < p).astype(float)


@pytest.fixture
def at() -> list[format.Claim]:
    return [
        claim(f"at-{s}", draws(s, 0.9), {"fgsm": draws(10 + s, 0.8), "hinge": draws(20 + s, 0.7)})
        for s in (0, 1)
    ]


def test_only_attacks_that_all_have_met_count(at: list[format.Claim]) -> None:
    zero = np.zeros(N)
    clean, fgsm, hinge = draws(5, 0.8), draws(6, 0.7), draws(7, 0.6)
    other = claim("red-0", clean, {"fgsm": fgsm, "hinge": hinge, "arc": zero, "pgd": zero})
    found, attacks = compare.under_common({"at": at, "red": [other]})
    assert attacks == 2
    np.testing.assert_array_equal(found["red"].clean, [clean])
    np.testing.assert_array_equal(found["red"].unaware, [fgsm])  # not the clean image as well
    np.testing.assert_array_equal(found["red"].aware, [clean * fgsm * hinge])
    alone, attacks = compare.under_common({"red": [other]})
    assert attacks == 4
    assert not alone["red"].aware.any()


def test_no_image_is_left_out_and_the_recorded_worst_case_is_for_equal_suites(
    at: list[format.Claim],
) -> None:
    zero = np.zeros(N)
    it = claim("red-0", np.ones(N), {"fgsm": np.ones(N), "hinge": np.ones(N)})
    (found,) = it.evaluations
    (base,) = at[0].evaluations
    lower = found.model_copy(update={"lowest": format.packed(zero, deflate=False)})

    def aware(plain: format.Evaluated, other: format.Evaluated) -> NDArray[np.float64]:
        both = {
            name: [it.model_copy(update={"evaluations": (e,)})]
            for name, e in (("at", plain), ("red", other))
        }
        return compare.under_common(both)[0]["red"].aware

    plan = format.Plan(
        file="quick", suite="quick", norm="inf", eps=0.03, images=N, seed=0, seeds=1,
        checks="quick", provenance={},
    )  # fmt: skip
    repeated = plan.model_copy(update={"seeds": 3})
    alone = base.model_copy(update={"suites": (plan,)})
    assert not aware(alone, lower.model_copy(update={"suites": (plan,)})).any()
    assert aware(alone, lower.model_copy(update={"suites": (repeated,)})).all()
    # an attack of this claim alone fooled images, which an attack of both then skipped
    met = format.packed((np.arange(N) >= 30).astype(float))
    fgsm, hinge = found.cells
    arc = claim("x", zero, {"arc": zero}).evaluations[0].cells
    cells = (fgsm, hinge.model_copy(update={"met": met}), *arc)
    with pytest.raises(DataError, match=r"red has no worst case .* on 30 images"):
        aware(base, found.model_copy(update={"cells": cells}))


def test_figures_are_means_over_seeds_and_differences_are_paired(
    at: list[format.Claim],
) -> None:
    better = [claim("red-3", np.ones(N), {"fgsm": np.ones(N), "hinge": np.ones(N)})]
    found, _ = compare.under_common({"at": at, "red": better})
    each = found["at"].aware.mean(1)
    heading, _, first, second, _, note = compare.table({"at": at, "red": better}, "at").split("\n")
    assert heading.endswith("aware, against at |")
    assert f"| 2 | {100 * np.mean([draws(0, 0.9), draws(1, 0.9)]):.1f} [" in first
    assert f"| {100 * each.mean():.1f} [" in first
    assert first.endswith(f"| {100 * each[0]:.1f}, {100 * each[1]:.1f} |  |")
    gain = difference_over_seeds(np.ones(N), found["at"].aware)
    assert gain.value == pytest.approx(1 - each.mean())
    assert f"| {100 * gain.value:+.1f} [{100 * (gain.low or 0):+.1f}," in second
    over = "intervals over images and seeds"
    assert note == f"2 matched attacks, {N} images; {over}"


def test_the_images_under_most_attacks_are_compared_and_of_these_the_most(
    at: list[format.Claim], tmp_path: Path
) -> None:
    def on(images: int) -> format.Evaluated:
        left = {"fgsm": np.full(images, 0.5), "hinge": np.full(images, images / 1000)}
        if images == 900:  # the only set without the third attack
            return claim("x", np.ones(images), left).evaluations[0]
        left["arc"] = np.ones(images)
        return claim("x", np.ones(images), left).evaluations[0]

    def measured(*images: int) -> format.Claim:
        return at[0].model_copy(update={"evaluations": tuple(map(on, images))})

    for one, other, best in [((300, 500), (500, 300), 500), ((900, 100), (100, 200, 900), 100)]:
        found, attacks = compare.under_common({"at": [measured(*one)], "red": [measured(*other)]})
        assert attacks == 3
        left = np.full((1, best), best / 1000)
        np.testing.assert_allclose(found["red"].aware, left, atol=1e-5)
    with pytest.raises(DataError, match="different images"):
        compare.under_common({"at": [measured(300)], "red": [measured(500)]})
    format.write(measured(300, 500), tmp_path / "at-0.json")
    second = at[1].model_copy(update={"evaluations": (on(300),)})
    format.write(second, tmp_path / "at-7.json")
    only = compare.seeds_of("at", tmp_path, 500)
    assert [[e.data["num_images"] for e in it.evaluations] for it in only] == [[500]]
    shown = command("claim", "compare", "at", "--images", 300, "--claims", tmp_path)
    assert shown.code == 0
    assert "| at | 2 |" in shown.out
    refused = command("claim", "compare", "at", "--images", 9, "--claims", tmp_path)
    assert refused.code == 2
    assert "was measured on 9 images" in refused.err


def test_a_claim_made_anew_keeps_what_other_images_said_of_the_same_weights(
    at: list[format.Claim],
) -> None:
    (found,) = at[0].evaluations
    better = found.model_copy(update={"unaware": format.Figure(value=0.5)})
    fewer = claim("x", np.ones(9), {"hinge": np.ones(9)}).evaluations[0]
    new = at[0].model_copy(update={"evaluations": (better,)})
    older = at[0].model_copy(update={"evaluations": (found, fewer)})
    assert new.keeping(older).evaluations == (fewer, better)
    trained = older.training.model_copy(update={"weights": "others"})
    assert new.keeping(older.model_copy(update={"training": trained})) == new


def test_what_cannot_be_compared_is_refused(at: list[format.Claim]) -> None:
    both = {"fgsm": draws(6, 0.7), "hinge": draws(7, 0.6)}

    def refused(other: format.Claim, match: str) -> None:
        with pytest.raises(DataError, match=match):
            compare.under_common({"at": at, "red": [other]})

    refused(claim("red-0", np.ones(N), both, eps=0.05), "different images or threats")
    refused(claim("red-0", np.ones(9), {k: np.ones(9) for k in both}), "different images")
    refused(claim("red-0", np.ones(N), {"fgsm": both["fgsm"]}), "must share at least one")
    refused(claim("red-0", np.ones(N), {"hinge": both["hinge"]}), "must share at least one")
    (found,) = claim("red-0", np.ones(N), both).evaluations
    unkept = found.model_copy(update={"untouched": None})
    refused(at[0].model_copy(update={"evaluations": (unkept,)}), "no per-image correctness")


def test_a_method_is_all_its_seeds_and_a_missing_one_is_named(
    at: list[format.Claim], tmp_path: Path
) -> None:
    written = [
        format.read(format.write(it, tmp_path / f"{it.name}.json"))
        for it in (*at, claim("at-m5-0", np.ones(N), {}))
    ]
    assert compare.seeds_of("at", tmp_path) == written[:2]
    with pytest.raises(ConfigError, match="gal-SEED"):
        compare.seeds_of("gal", tmp_path)
    format.write(at[0].model_copy(update={"name": "at-9"}), tmp_path / "at-9.json")
    # no second training, whose spread would count
    again = command("claim", "compare", "at", "--claims", tmp_path)
    assert again.code == 3
    assert f"{tmp_path / 'at-0.json'} and {tmp_path / 'at-9.json'} are claims of the" in again.err
    (tmp_path / "at-9.json").unlink()
    missing = command("claim", "compare", "at", "gal", "--claims", tmp_path)
    assert missing.code == 2
    assert "there is no claim" in missing.err
    shown = command("claim", "compare", "at", "--claims", tmp_path)
    assert (shown.code, shown.out) == (0, compare.table({"at": at}) + "\n")
    other = command("claim", "compare", "at", "--against", "red", "--claims", tmp_path)
    assert other.code == 2
    assert "must be one of" in other.err
