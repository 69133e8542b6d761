"""Descriptions of the self-checks: question, meaning of a failure and next step.

The report and the page of all checks use these texts. Torch is not imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Entry:
    """Description of one check.

    Attributes:
        id: as in a stored evaluation.
        title: a few words.
        asks: the question.
        red: what a failure means for the figures.
        todo: what to do next, as an instruction.
        group: the heading of its section, one of `GROUPS`.
        full: whether it runs only with `--checks full`.
    """

    id: str
    title: str
    asks: str
    red: str
    todo: str
    group: str
    full: bool = False


GROUPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "model": "Can the model be measured?",
        "figures": "Are the figures consistent?",
        "strength": "Are the attacks strong enough?",
        "gradients": "Do gradients increase the attacks' objective?",
        "draw": "Is the random draw handled correctly?",
        "networks": "Networks that draw random numbers themselves",
        "defence": "Does randomization help?",
    }
)
"""Names and headings of the groups of checks, in the order of the page."""

_STRONGER = "Evaluate with `--suite aware`, or with a custom suite of more steps"
_OURS = "This points to a defect of redefense: report it with the run directory"

# in the order of the page; the groups follow `GROUPS`
_ENTRIES: Final = (
    # the model
    Entry("S03", "Same model as trained",
          "Is the clean accuracy on validation images the one that the training logged?",
          "The weights or the data are not those of the training, so the figures describe another "
          "model.",
          "Evaluate the run directory that the training wrote, with the data specification in its "
          "`run.json`.", "model"),
    Entry("S04", "Scale of the images",
          "Do the images use the range from 0 to 1?",
          "The images were probably scaled twice. A perturbation of the stated size is then much "
          "larger than all differences within an image.",
          "Pass images with values in [0, 1] and put the normalisation into the model's first "
          "layer. `redefense data check SPEC` shows the range.", "model"),
    Entry("S05", "Attacks change no state",
          "Are weights, modes, buffers and random generators unchanged after an attack?",
          "An attack changed the model or the random state, so later figures depend on the order "
          "of the attacks.",
          "Remove what the model stores in its forward pass (running statistics, counters, "
          "caches), or find the attack of a plug-in that writes to the model.", "model"),
    Entry("S06", "Draws do not depend on the attack",
          "Are the same members drawn, whatever the attack's own seed is?",
          "The draw of members shares a random generator with the attack. An attack could then "
          "steer or repeat the draw.",
          "Give the sampled view a generator of its own: `ensemble.sampled(rng=...)`.", "model"),
    Entry("S07", "Outputs are logits",
          "Are the outputs finite logits, not probabilities?",
          "Gradients of probabilities vanish for confident predictions, so the accuracy under "
          "attack is too high.",
          "Remove the softmax from the model, or evaluate with `outputs=\"probabilities\"`; fix "
          "outputs that are infinite or NaN.", "model"),
    Entry("S22", "No zero gradients",
          "Does every member have a finite, nonzero gradient on every image?",
          "Gradient attacks cannot change these images, so the accuracy under attack is too high: "
          "the gradients are masked.",
          "Look for rounding, thresholds, `detach` or saturated activations in the model. Compare "
          "with an attack that needs no gradient: `--suite full` contains `square`.", "model"),
    Entry("S41", "Gradients match the outputs",
          "Do finite differences of the loss agree with its gradient?",
          "The backward pass does not match the forward pass. Gradient attacks fail, so the "
          "accuracy under attack is too high.",
          "Remove custom backward passes and operations that stop the gradient, or attack with "
          "`square`, which uses no gradient.", "model"),
    Entry("S42", "Outputs depend on the image alone",
          "Is the output for an image the same in another batch and in another memory format?",
          "The figures hold only for the batches that were measured, not for a single query.",
          "Put the model into eval mode. Replace layers that compute statistics of the batch.",
          "model"),
    Entry("S43", "Outputs stay the same",
          "Are the model's outputs after the attacks equal to those before?",
          "The model changed while it was measured, so the figures describe no single model.",
          "Remove random numbers and stored state from the model's forward pass. A network that is "
          "random by design is evaluated with `--stochastic on`.", "model"),
    # the figures
    Entry("S01", "Inside the budget",
          "Does every attacked image lie within the stated distance of its original?",
          "Images outside the ball were counted, so the accuracy under attack is too low for the "
          "stated budget.",
          "Check the attack named in the detail: an attack of a plug-in must project its result "
          "(`threat.project`). If it is a built-in attack, report it.", "figures"),
    Entry("S07b", "The published CW margin works",
          "Does no published preset of CW run on outputs that are never positive?",
          "The published margin of CW is always zero there. This attack returns the clean images, "
          "and its row shows clean accuracy.",
          "Do not quote that row. Use CW without a preset.", "figures"),
    Entry("S20", "Knowing more does not help the defence",
          "Is the accuracy under aware attacks at most that under unaware attacks?",
          "The worst case is not the minimum over all attacks, so the headline is wrong.",
          f"{_OURS}.", "figures"),
    Entry("S21", "The worst case is per image",
          "Is the headline the minimum over attacks for each image, averaged afterwards?",
          "The stored headline does not follow from the stored records.",
          "Evaluate again into a new folder (`--out`). Do not quote the stored headline.",
          "figures"),
    Entry("S31", "Draws agree with the expectation",
          "Do five random draws give the exact expected accuracy, up to chance?",
          "The draw does not follow the stated probabilities, or the records are mixed up.",
          "Compare the ensemble's `mixture` with the one in the evaluation, then evaluate again.",
          "figures"),
    Entry("S32", "Draws of two seeds agree",
          "Do draws with two different seeds agree up to chance?",
          "Draws are coupled with each other, so their spread is not that of independent queries.",
          f"{_OURS}.", "figures"),
    Entry("S33", "Order of the accuracies",
          "Does this order hold: all members correct, worst member, expected, best member, any "
          "member correct?",
          "The stored figures contradict each other.",
          "Evaluate again into a new folder (`--out`). Do not quote these figures.", "figures"),
    Entry("S34", "Attacks change every image",
          "Does every bounded attack change every correctly classified image?",
          "For some images an attack found no better point than the clean image and returned it. "
          "Its own row is too high; the worst case over all attacks still counts.",
          "Quote the worst case and not this row. If all attacks return images unchanged, check "
          "S22 and S41.", "figures"),
    Entry("S37", "Attacks never help",
          "Is no image's expected correctness higher after an aware attack than before?",
          "An attack that should return its best point returned a worse one, often by rounding on "
          "single images.",
          "One or two images do not matter, as the clean image counts in the headline. With more, "
          "compare precisions: S10 (`--checks full`).", "figures"),
    Entry("B1", "Within the bounds of the members",
          "Does the aware accuracy lie within the bounds given by the single members?",
          "An attack on a single member was stronger than those on all members: the aware attacks "
          "have not converged.",
          f"{_STRONGER}.", "figures"),
    # strength of attacks
    Entry("S11", "Accuracy falls with the radius",
          "Does accuracy fall to zero as the allowed perturbation grows?",
          "If it rises, or some images stay correct at every radius, the attacks fail on them.",
          "Check S22 and S41 first, then add attacks without gradients (`--suite full`).",
          "strength"),
    Entry("S16", "Many steps beat one step",
          "Is accuracy under iterated attacks (PGD, APGD) at most that under FGSM?",
          "The iterated attack has not converged, or its step size is too small.",
          f"Quote the lower figure. {_STRONGER}.", "strength"),
    Entry("S17", "White box beats black box",
          "Is no image fooled by a black-box attack alone?",
          "An attack that uses only outputs is stronger than those that use gradients, so the "
          "gradients are masked.",
          "Check S22 and S41. Quote the worst case, which includes the black box.", "strength"),
    Entry("S18", "White box beats transfer",
          "Are attacks on the ensemble at least as strong as those transferred from one member?",
          "The attacks on the whole ensemble have not converged.",
          f"{_STRONGER}. Quote the worst case over all attacks.", "strength"),
    Entry("S44", "Twice the budget changes little",
          "Do twice the steps lower accuracy by at most one point on the first 100 images?",
          "The attacks of this suite have not converged. The aware figure is only a loose upper "
          "bound.",
          "Evaluate with `--suite aware`. If that is red, too, write a suite with more steps.",
          "strength", full=True),
    Entry("S02", "Zero budget, no effect",
          "Does an attack with eps 0 give the clean predictions?",
          "Attacked and clean images do not go through the same preprocessing.",
          "Move all preprocessing into the model, then evaluate again.", "strength", full=True),
    Entry("S08", "Batch mates do not matter",
          "Is the attack on an image independent of the other images in its batch?",
          "Attacks on this model depend on the batch, so the figures depend on the batch size.",
          "Put the model into eval mode. Replace layers that compute statistics of the batch.",
          "strength", full=True),
    Entry("S09", "Same seed, same result",
          "Does an attack with the same seed give the same bits?",
          "The figures cannot be repeated exactly.",
          "Use deterministic kernels, one thread or the CPU. On a GPU small differences are "
          "expected.", "strength", full=True),
    Entry("S10", "Precision does not matter",
          "Is accuracy under attack the same in double precision?",
          "Some predictions depend on rounding.",
          "Evaluate in float32 with TF32 and autocast switched off.", "strength", full=True),
    Entry("S12", "Grey images are guessed",
          "Is accuracy at eps 0.5, where any image can become grey, at most chance level?",
          "The attack fails where it cannot fail, so it fails at smaller radii, too.",
          "Check S22 and S41, then add attacks without gradients (`--suite full`).", "strength",
          full=True),
    Entry("S13", "Zero accuracy without a bound",
          "Is accuracy zero when pixels may take any value (eps 1)?",
          "The attack fails where it cannot fail, so it fails at smaller radii, too.",
          "Check S22 and S41, then add attacks without gradients (`--suite full`).", "strength",
          full=True),
    Entry("S14", "Twice the steps",
          "Do 100 steps lower accuracy by at most one point compared with 50?",
          "The attack has not converged, so the accuracy is too high.",
          f"{_STRONGER}.", "strength", full=True),
    Entry("S15", "Twice the restarts",
          "Do four restarts lower accuracy by at most half a point compared with two?",
          "The result depends on the random start, so the accuracy is too high.",
          "Evaluate with `--suite aware`, or with a custom suite of more restarts.",
          "strength", full=True),
    Entry("S17b", "White box beats a short black box",
          "Is no image of the sample fooled by 200 queries of Square alone?",
          "An attack that uses only outputs is stronger than those that use gradients, so the "
          "gradients are masked.",
          "Check S22 and S41. Evaluate with `--suite full`, which contains `square` with its "
          "whole budget.", "strength", full=True),
    Entry("S19", "Attacks beat noise",
          "Is no image fooled by random noise alone?",
          "Random noise fools images that the attacks do not: they have not converged.",
          f"{_STRONGER}. Check S22 and S41.", "strength", full=True),
    Entry("S39", "Agreement with TorchAttacks",
          "Do this package's APGD and TorchAttacks' APGD give equal accuracy on one member?",
          "The two implementations disagree on this model.",
          f"Quote the lower of the two figures. {_OURS}.", "strength", full=True),
    Entry("S40", "Attacked images survive storing",
          "Do attacked images fool the model as often after rounding to 8 bits?",
          "Part of the effect is smaller than one grey level and is lost in image files.",
          "State that attacked images are floats, or attack at an eps that is a whole number of "
          "levels.", "strength", full=True),
    # gradients
    Entry("S23", "The attack has converged",
          "Do the last 10 of 50 steps contribute at most 5 % of the gain?",
          "The attack was still improving when it stopped.",
          f"{_STRONGER}.", "gradients", full=True),
    Entry("S24", "The best point is returned",
          "Is no visited point better than the one that the attack returned?",
          "The attack found a better point and did not return it.",
          f"{_OURS}.", "gradients", full=True),
    Entry("S25", "Smooth surroundings",
          "Does the loss change by less than 10 % under random noise of 8/255?",
          "The loss is not smooth, so single gradients are unreliable.",
          "Use attacks with many steps and restarts, and `square`. Do not quote FGSM.",
          "gradients", full=True),
    Entry("S26", "The objective rises",
          "Is the final objective above the initial one on 99 % of the images?",
          "The attack does not increase its objective: the gradients are wrong.",
          "Check S41, then lower the step size.", "gradients", full=True),
    Entry("S27", "Planted points are found",
          "Does PGD find an adversarial point that was planted inside the ball?",
          "PGD misses known adversarial points, so it misses more on the real task.",
          "Check S22 and S41, and use attacks without gradients (`square`).", "gradients",
          full=True),
    # the draw
    Entry("S28", "Copies equal one member",
          "Do three copies of one member give the result of that single member?",
          "The evaluation credits randomness where there is none.",
          f"{_OURS}.", "draw", full=True),
    Entry("S29", "A fixed draw equals that member",
          "Is an attack on the view with a fixed draw bit-identical to the attack on that member?",
          "The view differs from the member, for example by other preprocessing.",
          "Check the ensemble's `logits_of` and `member` for differences.", "draw", full=True),
    Entry("S30", "Two planes",
          "Do the aware attacks solve a toy problem of two linear members with known worst case?",
          "The aware attacks miss the known worst case.",
          f"{_OURS}.", "draw", full=True),
    Entry("S35", "Mean of many draws",
          "Does the mean gradient of 64 draws have the direction of the exact one?",
          "The draws do not follow the stated probabilities, or gradients of single draws are "
          "unreliable.",
          "Compare the ensemble's `mixture` with the draws, then check S41.", "draw", full=True),
    # networks that draw
    Entry("D1", "Equal seeds, equal outputs",
          "Does the network return the same output for the same seed?",
          "The network has a separate generator. The figures cannot be repeated, and attacks had "
          "fresh draws at every step.",
          "Draw from torch's global generator in the network.", "networks"),
    Entry("D2", "Twice the attack seeds",
          "Do twice the attack seeds lower accuracy by at most one point?",
          "The attacks used too few draws, so the accuracy is too high.",
          "Use more seeds in attacks: `redefense.Stochastic(model, draws=32)`.", "networks"),
    Entry("D3", "Not below the certificate",
          "Is accuracy under attack at least the certified accuracy of one draw?",
          "The certificate and the attack contradict each other: one of them is wrong.",
          "Certify and attack the same network on the same images, norm and eps.", "networks"),
    # the defence
    Entry("S36", "Aware attacks gain little",
          "Do aware attacks lower accuracy by at most 5 points compared with unaware ones?",
          "The measurement is sound. The unaware figure holds only if the attacker does not know "
          "the ensemble.",
          "Report the aware figure, together with the unaware one.", "defence"),
    Entry("S38", "The draw beats every single member",
          "Is the draw better than every single member, each in its own worst case?",
          "The measurement is sound. These images do not show that drawing a member helps.",
          "Measure more images if the interval is wide. Otherwise deploy the best single member, "
          "or the average if its accuracy is higher.", "defence"),
)  # fmt: skip

CATALOGUE: Final[Mapping[str, Entry]] = MappingProxyType({entry.id: entry for entry in _ENTRIES})
"""Every check by its id. Stored evaluations may have further ids, of older versions."""


def explained(check: str, detail: str) -> str:
    """One line about a failed check: its figure, its meaning and the next step."""
    entry = CATALOGUE.get(check)
    return f"{check}: {detail}." + (f" {entry.red} {entry.todo}" if entry else "")
