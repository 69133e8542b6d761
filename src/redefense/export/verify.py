"""Verifies a bundle: every member present and unchanged, drawn at random, hashes intact.

Nothing of a bundle is executed before its hash is checked, and its `run.py` only if it is
byte-identical to this version's: a bundle cannot make its own verification succeed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from redefense.checks.check import Check
from redefense.errors import DataError
from redefense.export import runner
from redefense.export.draws import NUM_DRAWS, draw_faults, seed_faults
from redefense.export.rules import graph_faults
from redefense.export.runner import Bundle, BundleError, Floats
from redefense.export.signing import SignatureError, trust_in
from redefense.runtime.folders import WEIGHTS

SHOWN = 3


@dataclass(frozen=True)
class Opened:
    """A bundle with its members' logits of the probes."""

    bundle: Bundle

    @cached_property
    def probes(self) -> tuple[Floats, Floats]:
        return self.bundle.probes()

    @cached_property
    def graphs(self) -> list[bytes]:
        return [self.bundle.member(m) for m in range(self.bundle.num_members)]

    @cached_property
    def sessions(self) -> list[Any]:
        return [runner.open_session(graph) for graph in self.graphs]

    @cached_property
    def answers(self) -> list[Floats]:
        """Logits (64, classes) of each member for the probes."""
        images, stored = self.probes
        answers = []
        for m, session in enumerate(self.sessions):
            # twice, since the logits of a member that draws cannot be compared with stored ones
            answer, again = (runner.logits_of(session, images) for _ in range(2))
            if answer.shape != stored[m].shape or not np.isfinite(answer).all():
                raise BundleError(f"member {m} gives logits of shape {answer.shape}, or not finite")
            if not np.array_equal(answer, again):
                raise BundleError(f"member {m} answers the same images differently")
            answers.append(answer)
        return answers


def verify(
    path: str | Path, *, against: str | Path | None = None, signer: str | Path | None = None
) -> list[Check]:
    """Run all checks of a bundle; it is valid if all pass.

    Args:
        path: the bundle.
        against: a run (or checkpoint) whose members the bundle must hold; needs torch.
        signer: a PEM file with the Ed25519 public key that must have signed the bundle.

    Raises:
        DataError: if there is no bundle at `path`, or no file at `signer`.
        ConfigError: if `signer` is no Ed25519 public key.
        CheckpointError: if `against` is no trained run.
    """
    folder = Path(path)
    if not (folder / runner.MANIFEST).is_file():
        raise DataError(f"no bundle at {folder}: it lacks {runner.MANIFEST}")
    # a checkpoint has a manifest.json, too
    if (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} is a checkpoint, not a bundle: make one of its run with `export`"
        )
    trust = None if signer is None else trust_in(Path(signer))
    try:
        opened = Opened(runner.open_bundle(folder, trust))
    # before its base class
    except SignatureError as error:
        return [Check("signature", False, str(error))]
    except BundleError as error:
        return [Check("records", False, str(error))]
    signed = [] if trust is None else [Check("signature", True, f"signed by the key {signer}")]
    checks = signed + [_check(name, check, opened) for name, check in CHECKS.items()]
    if against is not None:
        from redefense.export.against import compare  # only this part needs torch

        checks.append(_check("checkpoint", compare(Path(against)), opened))
    return checks


def _check(name: str, check: Callable[[Opened], str], opened: Opened) -> Check:
    try:
        return Check(name, True, check(opened))
    except BundleError as error:
        return Check(name, False, str(error))


def _records(opened: Opened) -> str:
    """Every file exists with its size and hash, and no other."""
    bundle = opened.bundle
    # the manifest cannot hold its own hash, nor that of its signature
    known = {*bundle.files, runner.MANIFEST, runner.SIGNATURE}
    for place in sorted(bundle.path.rglob("*")):
        name = place.relative_to(bundle.path).as_posix()
        if place.is_symlink() or (not place.is_dir() and name not in known):
            raise BundleError(f"{name} is not in the manifest, or a link")
    total = sum(len(bundle.read(name)) for name in bundle.files)
    return f"{len(bundle.files)} files, {total:,} bytes, all as in the manifest"


def _graphs(opened: Opened) -> str:
    """Members are fixed functions of the images."""
    bundle = opened.bundle
    for m, graph in enumerate(opened.graphs):
        faults = graph_faults(graph, bundle.shape, len(bundle.classes))
        if faults:
            more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
            raise BundleError(f"member {m}: {'; '.join(faults[:SHOWN])}{more}")
    return "one input, one output, known operators, no random operator, no external data"


def _members(opened: Opened) -> str:
    """Every member reproduces its logits in torch, and is nearest to its own."""
    precision, (images, stored) = opened.bundle.config["precision"], opened.probes
    worst = 0.0
    for m, answer in enumerate(opened.answers):
        distances = [_distance(answer, logits) for logits in stored]
        # a swapped file would answer well, with the probability of another member
        if distances[m] > min(distances):
            nearest = distances.index(min(distances))
            raise BundleError(
                f"member {m} does not give its recorded outputs, but those of member {nearest}"
            )
        if fault := runner.differs(answer, stored[m], precision):
            raise BundleError(f"member {m} does not give its recorded outputs: it {fault}")
        alone = runner.logits_of(opened.sessions[m], images[:1])
        if fault := runner.differs(alone, answer[:1], precision):
            raise BundleError(
                f"member {m} depends on the other images of a batch: for a single image it {fault}"
            )
        worst = max(worst, runner.deviation(answer, stored[m])[0])
    most = runner.TOLERANCE[precision]
    return (
        f"{len(stored)} members give their recorded outputs, up to {worst:.1e} ({most:g} allowed)"
    )


def _distance(answer: Floats, stored: Floats) -> float:
    return float(np.square(answer - stored, dtype=np.float64).sum())


def _distinct(opened: Opened) -> str:
    """No two members are equal by mistake, and those of positive probability are not all equal."""
    _, stored = opened.probes
    answering = np.flatnonzero(opened.bundle.mixture > 0)
    if len(answering) > 1 and all(
        np.array_equal(stored[answering[0]], stored[m]) for m in answering
    ):
        raise BundleError("all members are equal, also in the probes: nothing is random")
    pairs = list(combinations(range(len(stored)), 2))
    twins = [(i, j) for i, j in pairs if np.array_equal(stored[i], stored[j])]
    for i, j in set(pairs) - set(twins):
        if opened.graphs[i] == opened.graphs[j] or np.array_equal(
            opened.answers[i], opened.answers[j]
        ):
            raise BundleError(f"members {i} and {j} are the same, but their probes differ")
    if not twins:
        return f"{len(stored)} different members"
    return f"members {_listed(twins)} are equal, and so are their probes: they were exported equal"


def _listed(pairs: list[tuple[int, int]]) -> str:
    return ", ".join(f"{i} and {j}" for i, j in pairs)


def _runner(opened: Opened) -> str:
    """`run.py` is byte-identical to this version's runner."""
    if opened.bundle.read("run.py") != runner.text().encode():
        version = opened.bundle.config.get("version")
        raise BundleError(
            f"run.py is not the runner of this version of redefense (the bundle names {version}): "
            "it is not run, and its draws are not checked"
        )
    return "run.py is the runner of this version of redefense"


def _draws(opened: Opened) -> str:
    """Members are drawn with the mixture's probabilities, from the operating system's entropy."""
    _runner(opened)
    bundle = opened.bundle
    answering = int((bundle.mixture > 0).sum())
    if bundle.config.get("randomized") is not (answering > 1):
        raise BundleError(f"by the mixture {answering} of {bundle.num_members} members answer")
    # ours, not that of the bundle: both are the same text, as checked above
    faults = draw_faults(runner.draw_members, bundle.mixture)
    if faults := faults or seed_faults(runner.text()):
        raise BundleError(faults[0])
    drawn = f"{NUM_DRAWS:,} draws of {answering} members" if answering > 1 else "nothing is drawn"
    return f"{drawn}: with the stated probabilities, independently, and whatever the seeds"


# in this order: the hashes of files before what they contain
CHECKS: dict[str, Callable[[Opened], str]] = {
    "records": _records,
    "graphs": _graphs,
    "members": _members,
    "distinct": _distinct,
    "runner": _runner,
    "draws": _draws,
}
