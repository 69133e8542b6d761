"""The files in `deploy/`: commands that they run exist, and the image holds what is imported."""

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement

import redefense
from redefense import cli
from serve_tools import make_bundle

DEPLOY = Path(redefense.__file__).parents[2] / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
KSERVE = yaml.safe_load((DEPLOY / "kserve.yaml").read_text())
UNIT = (DEPLOY / "redefense.service").read_text()


def instruction(name: str) -> list[str]:
    """The words of the last such instruction of the Dockerfile, in JSON."""
    return list(json.loads(re.findall(rf"^\s*{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1]))


def served(words: list[str]) -> dict[str, Any]:
    """The settings of a `serve` command; its routes are then known."""
    command: Any = typer.main.get_command(cli.app)
    return dict(command.commands["serve"].make_context("serve", list(words)).params)


def test_every_file_runs_a_server_as_it_checks_and_publishes_it() -> None:
    program, verb = instruction("ENTRYPOINT")
    assert (Path(program).name, verb) == ("redefense", "serve")
    given = served(instruction("CMD"))
    # the first CMD is that of the health check
    check = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    assert check is not None
    assert f"http://127.0.0.1:{given['port']}/v2/health/ready" in json.loads(check[1])[-1]
    assert f"EXPOSE {given['port']}\n" in DOCKERFILE

    (container,) = KSERVE["spec"]["predictor"]["containers"]
    given = served(container["args"])
    assert given["name"] == KSERVE["metadata"]["name"]
    ports = [container[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe")]
    assert ports == [given["port"]] * 2 == [container["ports"][0]["containerPort"]] * 2

    (started,) = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    program, verb, *words = shlex.split(started)
    assert (Path(program).name, verb) == ("redefense", "serve")
    served(words)


def test_no_file_serves_as_root() -> None:
    (user,) = re.findall(r"^USER (\d+):", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
    (container,) = KSERVE["spec"]["predictor"]["containers"]
    rules = container["securityContext"]
    assert rules["runAsNonRoot"]
    assert rules["readOnlyRootFilesystem"]
    assert "DynamicUser=yes" in UNIT


def closure(names: list[str]) -> set[str]:
    """Distributions that are installed with these, by their normalized names."""
    found: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name not in found:
            found.add(name)
            needed = map(Requirement, metadata.requires(name) or [])
            names += [
                r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})
            ]
    return found


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Top-level modules that a server of a bundle has imported."""
    bundle = make_bundle(tmp_path_factory.mktemp("deploy") / "toy")
    program = (
        "import json, sys; before = set(sys.modules); from pathlib import Path\n"
        "import redefense.cli, redefense.serve.process\n"
        "from redefense.serve.images import read_image\n"
        "from redefense.serve.model import Model\n"
        f"Model(Path({str(bundle)!r}), threads=1).warm_up((1,))\n"
        "print(json.dumps(sorted({n.split('.')[0] for n in set(sys.modules) - before})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    return set(json.loads(done.stdout))


def test_the_image_holds_what_a_server_imports_and_no_torch(imported: set[str]) -> None:
    line = re.search(r"pip install --no-cache-dir -c \S+\s+(.*?)\s*&&", DOCKERFILE)
    assert line is not None
    held = closure(line[1].split()) | {"redefense"}
    homes = metadata.packages_distributions()
    needed = {
        re.sub(r"[-_.]+", "-", home).lower()
        for name in imported & homes.keys()
        for home in homes[name]
    }
    assert {"onnxruntime", "starlette", "uvicorn"} <= needed
    assert needed <= held
    assert "torch" not in held
