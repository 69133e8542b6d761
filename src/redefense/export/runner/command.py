"""Classify images with a bundle: numpy and onnxruntime alone (pillow to read PNG and JPEG).

This file travels in every bundle as run.py. Each image is answered by a member of its own, drawn
from the operating system's entropy; which one answered is neither printed nor kept.

    python run.py IMAGE...            label of each image (.npy, or PNG and JPEG with pillow)
    python run.py --scores IMAGE...   all scores, which reveal more to an attacker
    python run.py --check             compare every member with the stored probes
    python run.py materialise [OUT]   write the members of a compact bundle out as a plain one

A `.npy` file holds one image (C, H, W) or several (B, C, H, W): floats in [0, 1], or bytes.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from redefense.export.runner.errors import BundleError
from redefense.export.runner.images import read_image
from redefense.export.runner.records import Bundle, aside, open_bundle, write_records
from redefense.export.runner.sessions import (
    classify,
    differs,
    draw_members,
    logits_of,
    need_numbers,
)


def check(bundle: Bundle) -> list[str]:
    """What is wrong with the members when they answer the probes; empty if nothing is."""
    images, stored = bundle.probes()
    found = (logits_of(bundle.open(m), images) for m in range(bundle.num_members))
    faults = [
        differs(mine, own, bundle.config["precision"])
        for mine, own in zip(found, stored, strict=True)
    ]
    return [f"member {m} {fault}" for m, fault in enumerate(faults) if fault]


def materialise(bundle: Bundle, out: Path) -> None:
    """Write a compact bundle out as the plain bundle `out`, which needs it no longer.

    Raises:
        BundleError: if the bundle is plain, `out` is not free, or a member has other outputs.
    """
    if bundle.config["kind"] == "plain":
        raise BundleError("the members of this bundle are plain already")
    if wrong := check(bundle):
        raise BundleError(wrong[0])
    config = {key: value for key, value in bundle.config.items() if key != "compact"}
    if config.get("ensemble"):
        kept = ("model", "num_members", "width", "activation")
        config["ensemble"] = {"name": "independent", **{k: config["ensemble"][k] for k in kept}}
    left = {
        "config.json",
        bundle.config["compact"]["template"],
        bundle.config["compact"]["weights"],
    }
    with aside(out) as folder:
        (folder / "members").mkdir()
        for m, name in enumerate(config["members"]):
            (folder / name).write_bytes(bundle.member(m))
        for name in set(bundle.files) - left:
            (folder / name).write_bytes(bundle.read(name))
        write_records(folder, {**config, "kind": "plain"})


def main(words: Sequence[str], folder: Path) -> int:
    """The command line of a bundle at `folder`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description="Classify images with this bundle.")
    parser.add_argument("images", nargs="*", metavar="IMAGE | materialise [OUT]")
    parser.add_argument("--scores", action="store_true", help="print the score of every class")
    parser.add_argument("--check", action="store_true", help="compare members with the probes")
    options = parser.parse_args(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of classes may be in any script
            stream.reconfigure(errors="backslashreplace")
    write = sys.stdout.write
    try:
        bundle = open_bundle(folder)
        if options.check:
            wrong = check(bundle)
            write(
                "".join(f"{line}\n" for line in wrong)
                or "all members give their recorded outputs\n"
            )
            return int(bool(wrong))
        if options.images[:1] == ["materialise"]:
            out = (
                Path(options.images[1])
                if options.images[1:]
                else folder.with_name(f"{folder.name}-plain")
            )
            materialise(bundle, out)
            write(f"wrote {out}\n")
            return 0
        if not options.images:
            parser.error("name an image, --check or materialise")
        sessions = [bundle.open(m) for m in range(bundle.num_members)]
        for word in options.images:
            images = read_image(Path(word), bundle.shape)
            logits = classify(sessions, images, draw_members(bundle.mixture, len(images)))
            for row in logits:
                need_numbers(row, word)
                shown = [bundle.classes[int(row.argmax())]]
                if options.scores:
                    odds = np.exp(row - row.max())
                    pairs = zip(bundle.classes, odds / odds.sum(), strict=True)
                    shown += [f"{name}={score:.4f}" for name, score in pairs]
                write("\t".join([word, *shown]) + "\n")
    except (BundleError, OSError) as error:
        sys.stderr.write(f"run.py: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))
