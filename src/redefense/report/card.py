"""The model card of a run, written from its stored evaluation.

A card is a README.md with a YAML header for model hubs. All figures come from the same joined
records as the report. Needs neither torch nor jinja2.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml

from redefense.errors import ConfigError
from redefense.report import reproduce, tables
from redefense.report.markdown import markdown
from redefense.results.intervals import Estimate
from redefense.results.join import Result, join
from redefense.runtime.files import write_text

HUB_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cifar10": "uoft-cs/cifar10",
        "cifar100": "uoft-cs/cifar100",
        "tiny-imagenet": "zh-plus/tiny-imagenet",
    }
)
"""Names of data sets on the hub; others keep their name."""

METRICS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "clean": "accuracy, clean images",
        "unaware": "robust accuracy, unaware attacks",
        "aware": "robust accuracy, aware attacks",
        "best_member_alone": "robust accuracy, best member alone",
        "averaged": "robust accuracy, averaged ensemble",
    }
)
"""Rows of the card's summary, by the keys of `tables.summary_table`."""


def write_card(run_dir: Path, out: Path | None = None, *, license_name: str = "mit") -> Path:
    """Write the card of a run to `out` (default: `RUN/README.md`) and return its path.

    Args:
        run_dir: a run with at least one stored evaluation.
        out: the file to write.
        license_name: of the weights, as an SPDX identifier in lower case.

    Raises:
        DataError: if the run has no evaluation or a file is damaged; then nothing is written.
        ConfigError: if the licence is not an SPDX identifier.
    """
    # complete before the file is opened, so that an error leaves an old card as it is
    text = card(run_dir, license_name=license_name)
    path = out if out is not None else run_dir / "README.md"
    write_text(path, text)
    return path


def card(
    run_dir: Path, *, license_name: str = "mit", opened_by: str = "load", name: str | None = None
) -> str:
    """The card's text; see `write_card`.

    Args:
        run_dir: a run with at least one stored evaluation.
        license_name: of the weights, as an SPDX identifier.
        opened_by: the public function that loads the folder of the card.
        name: the argument of that function and the title; default: the run's path and name.
    """
    results = join([run_dir])
    opened = reproduce.shown(run_dir)
    if name is not None:
        opened, results = name, [replace(result, name=name) for result in results]
    first = results[0]
    data = first.data.name
    method = _settings(first, "defence", "name")
    title = " ".join(first.name.split())  # a line of dashes would end the YAML header
    head = _head(data, method, license_name)
    # settings may have been chosen on validation images: a hub must not rank by them
    if measured := [_index(r) for r in results if r.data.split != "validation"]:
        index = [{"name": title, "results": measured}]
        head |= {"metrics": ["accuracy"], "model-index": index}
    return _page(head, _body(results, _use(opened, opened_by)))


def unmeasured_card(
    name: str,
    *,
    data: str,
    num_members: int,
    model: str = "",
    method: str = "",
    license_name: str = "mit",
    opened_by: str = "load",
    why: str = "",
) -> str:
    """The card of an ensemble without a stored evaluation: it makes no claims.

    `why` is appended to the section about robustness.
    """
    text = (
        f"{_title(name)}{_intended(str(num_members), model, method)}\n\n{_use(name, opened_by)}"
        "## Robustness\n\n**Nothing was measured.** No evaluation of these weights is stored, so "
        f"nothing is claimed, neither for clean images nor under attack.{why}\n"
    )
    return _page(_head(data, method, license_name), text)


def _page(head: Mapping[str, Any], body: str) -> str:
    lines = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{lines}---\n\n{body}"


def _settings(result: Result, *path: str) -> str:
    """One setting of the stored run, e.g. ("defence", "name"); empty if unknown."""
    value: object = next((e.run for e in result.evaluations if e.run), {})
    for key in path:
        # evaluations made in Python have no run, those from elsewhere one of any form
        value = value.get(key) if isinstance(value, Mapping) else None
    return "" if value is None else str(value)


def _head(data: str, method: str, license_name: str) -> dict[str, Any]:
    if not license_name.replace("-", "").replace(".", "").isalnum():
        raise ConfigError(f"license must be an SPDX identifier, got {license_name!r}")
    tags = ["adversarial-robustness", "ensemble", "randomized-ensemble", "image-classification"]
    return {
        "library_name": "redefense",
        "pipeline_tag": "image-classification",
        "license": license_name.lower(),  # as in the list of the hub
        "tags": tags + ([method] if method else []),
        "datasets": [HUB_NAMES.get(data, data)],
    }


def _index(result: Result) -> dict[str, Any]:
    data = result.data
    (row,) = tables.summary_rows([result])
    return {
        "task": {"type": "image-classification", "name": f"under attack, {result.threat}"},
        "dataset": {
            "type": HUB_NAMES.get(data.name, data.name),
            "name": data.name,
            "split": data.split,
        },
        "metrics": [
            {
                "type": "accuracy",
                "name": name,
                "value": round(100 * row[key].value, 2),
                "args": _arguments(result, row[key], attacked=key != "clean"),
            }
            for key, name in METRICS.items()
            if row[key] is not None
        ],
    }


def _arguments(result: Result, estimate: Estimate, *, attacked: bool) -> dict[str, Any]:
    """Number of images, budget and interval of a figure."""
    arguments: dict[str, Any] = {"num_images": result.num_images}
    # a budget says nothing about clean images
    if attacked and result.eps is not None:
        arguments |= {"norm": result.norm, "eps": result.eps}
    if estimate.low is not None and estimate.high is not None:
        arguments["interval_95"] = [round(100 * estimate.low, 2), round(100 * estimate.high, 2)]
    return arguments


def _title(name: str) -> str:
    return f"# {tables.escape_markdown(name)}\n\n"


def _intended(num_members: str, model: str, method: str) -> str:
    # here, since the header is no Markdown: there a method's name is a tag as it is
    model, method = tables.escape_markdown(model), tables.escape_markdown(method)
    made = f", each a {model}" * bool(model) + f", trained with the method {method}" * bool(method)
    return (
        f"An ensemble of {num_members} classifiers{made}. Each query is answered by one of them, "
        "drawn at random from the operating system's entropy; the draw is not revealed."
    )


def _use(name: str, opened_by: str) -> str:
    return (
        "## Use\n\n    import redefense\n"
        # JSON quotes and escapes a text as Python does
        f"    ensemble = redefense.{opened_by}({json.dumps(name)})\n"
        "    logits = ensemble(images)  # (B, channels, H, W), floats in [0, 1]\n\n"
    )


def _body(results: Sequence[Result], use: str) -> str:
    first = results[0]
    model, method = _settings(first, "ensemble", "model"), _settings(first, "defence", "name")
    report = markdown(results, reproduce.commands(results))
    # the card has its own title
    _, _, report = report.partition("\n\n")
    limits = (
        "Accuracy under attack holds only for the stated budget, images and attacks; a stronger "
        "attack can lower it. Report the aware figure. Attacks succeed more often if the same "
        "image can be queried repeatedly, since another member may answer."
    )
    intended = _intended(str(first.num_members or "several"), model, method)
    return (
        f"{_title(first.name)}{intended}\n\n{use}## Robustness\n\n{report}\n## Limits\n\n{limits}\n"
    )
