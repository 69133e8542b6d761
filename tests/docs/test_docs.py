"""Every command and every line of Python on every page is run, on digits, or at least parsed."""

import inspect
import itertools
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import redefense
from docs_blocks import Block, blocks, commands, made_tiny
from redefense import cli, plugins
from redefense.attacks import Attack
from redefense.commands.options import resolve_run
from redefense.data import DATASETS
from redefense.defences import DEFENCES, Defence
from redefense.evaluation.suite import suite_named
from redefense.models import build
from redefense.recipes import RECIPES
from redefense.rng import stream
from redefense.serve.images import FORMATS, read_image
from redefense.serve.model import Model
from redefense.serve.protocol import read_question
from redefense.serve.settings import Settings
from redefense.train.loading import resolve
from repeated import repeated

ROOT = Path(redefense.__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PATHS = re.compile(r"PATH|FILE|COMMIT")


@pytest.fixture(autouse=True)
def names_of_a_test_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered, by a page or by training objects, is known to that test alone."""
    for kind in plugins.MODULES:
        monkeypatch.setattr(plugins.registry(kind), "_added", {})
    monkeypatch.setattr(plugins, "_loaded", set())


def check_parse(words: list[str]) -> None:
    """The command and all its options exist, and so does all that it names."""
    command: Any = typer.main.get_command(cli.app)
    context = None
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    context = command.make_context(command.name, list(words))
    given = context.params
    if "what" in given:
        assert given["what"] in RECIPES, given["what"]
        changes = list(given["changes"] or ())
        resolve(resolve_run(given["what"], changes, given["data"], given.get("seed")))
    if command.name == "evaluate":
        suite_named(given["suite"])
    for spec in (given.get("data"), given.get("spec")):
        assert spec is None or spec.partition(":")[0] in DATASETS


def check_words(words: list[str]) -> None:
    """What is named by a command that is not run: ours, the Makefile's, a script's, pip's."""
    program, *rest = words
    if program == "torchrun":
        module = rest.index("-m")
        assert rest[module + 1] == "redefense"
        check_parse(rest[module + 2 :])
    elif program == "redefense":
        check_parse(rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(rest) <= set(targets)
    elif program == "python":
        options = set(re.findall(r'"(--[\w-]+)"', (ROOT / rest[0]).read_text()))
        assert {word for word in rest if word.startswith("--")} <= options
    elif program == "snakemake":
        named = [rest[rest.index(o) + 1] for o in ("-s", "--configfile", "--profile") if o in rest]
        assert named
        assert all((ROOT / name).exists() for name in named)
    elif program == "pip" and rest[1].startswith("snakemake-"):
        assert all(re.fullmatch(r"snakemake-(executor|storage)-plugin-[\w-]+", r) for r in rest[1:])
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"^\.\[([\w,]+)\]$", rest[-1])
        assert named, "what is on no package index is installed from the clone"
        assert all(set(n.split(",")) <= set(extras["optional-dependencies"]) for n in named)
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    elif program == "curl":
        check_request(rest)
    else:
        raise AssertionError(f"a page may not use {program}: nobody checks what it does")


def check_request(words: list[str]) -> None:
    """The route exists, and the body is a picture or a question that the page's bundle reads."""
    header, body = words[words.index("-H") + 1], words[words.index("--data-binary") + 1]
    assert re.fullmatch(r"localhost:8000/v2/models/bundle/(infer|classify)", words[-1]), words
    content, model = Path(body.removeprefix("@")).read_bytes(), Model(Path("bundle"))
    assert model.name == "bundle"
    if header == "Content-Type: application/json":
        assert read_question(content, None, model, Settings()).images.shape == (1, 1, 8, 8)
    else:
        assert header.removeprefix("Content-Type: ") in FORMATS
        assert read_image(content, model.shape, 64).shape == (1, 1, 8, 8)


def run_shell(block: Block, known: Path) -> None:
    for words in commands(block.text):
        if block.mode == "parse" or words[0] not in ("redefense", "python"):
            check_words(words)
            continue
        if words[0] == "python":
            done = subprocess.run(
                [sys.executable, *words[1:]], capture_output=True, text=True, check=False
            )
            code, said = done.returncode, done.stderr
        else:
            check_parse(words[1:])
            answer = repeated(made_tiny(words[1:]), known)
            code, said = answer.code, answer.err
        expected = {"exit 1": (1,), "any exit": (0, 1)}.get(block.mode, (0,))
        assert code in expected, f"{' '.join(words)}: exit {code}\n{said}"


def stand_ins() -> dict[str, Any]:
    """What a reader brings along: two networks and some images with labels."""

    def network(name: str) -> torch.nn.Module:
        rng = stream(0, name)
        return build("linear", num_classes=10, shape=(1, 8, 8), generator=rng).eval()

    images = torch.rand(8, 1, 8, 8, generator=stream(0, "images"))
    return {
        "model": network("one"),
        "other_model": network("other"),
        "images": images,
        "labels": torch.arange(8),
    }


def run_python(block: Block, names: dict[str, Any], source: str) -> None:
    code = compile("\n" * block.line + block.text, source, "exec")
    if block.mode == "names":
        # calls out of this machine or into other packages: all that they name must exist
        for called in re.findall(r"(?:redefense|ensemble)\.(\w+)", block.text):
            home = names["ensemble"] if f"ensemble.{called}" in block.text else redefense
            assert hasattr(home, called), called
        for module, imported in re.findall(r"from (redefense\S*) import (.+)", block.text):
            exec(f"from {module} import {imported}", {})
        return
    if block.mode == "model":
        names |= {k: v for k, v in stand_ins().items() if k not in names}
    exec(code, names)


def added(names: dict[str, Any], base: type) -> dict[str, Any]:
    """The lines of a mapping that a page asks for: its own classes, named in small letters."""
    own = (c for c in names.values() if isinstance(c, type) and c.__module__ == names["__name__"])
    return {c.__name__.lower(): c for c in own if issubclass(c, base)}


def with_the_line(patch: pytest.MonkeyPatch, name: str, mapping: dict[str, Any]) -> None:
    """A mapping as if it were written so, wherever the package has imported it."""
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] == "redefense"]:
        if hasattr(module, name):
            patch.setattr(module, name, mapping)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(
    page: Path,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "src").symlink_to(ROOT / "src")
    for name in ("benchmarks", "study"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.mode == "added":
            with_the_line(monkeypatch, "DEFENCES", dict(DEFENCES) | added(names, Defence))
        if block.file is not None:
            Path(block.file).write_text(block.text)
        elif block.language == "sh":
            run_shell(block, shared / "commands")
        else:
            run_python(block, names, str(page))


@pytest.mark.parametrize(
    ("mapping", "base", "checks"),
    [
        ("ATTACKS", Attack, "attacks/test_attacks_conformance.py"),
        ("DEFENCES", Defence, "defences/test_defences_conformance.py"),
    ],
)
def test_what_a_page_adds_passes_the_checks_that_the_page_names(
    mapping: str,
    base: type,
    checks: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    page, names = ROOT / "docs" / "extend.md", dict[str, Any](__name__="extend")
    assert checks in page.read_text()
    for block in blocks(page):
        if block.language == "python":
            run_python(block, names, str(page))
    classes = added(names, base)
    assert classes
    with_the_line(monkeypatch, mapping, classes)
    # its lists of cases, which are made as it is read, then hold the page's classes alone
    module = runpy.run_path(str(ROOT / "tests" / checks))
    for name, test in module.items():
        marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
        if not name.startswith("test_") or not marks:
            continue  # what is true of the whole mapping
        for case in itertools.product(*(cases_of(mark) for mark in marks)):
            given = {key: value for part in case for key, value in part.items()}
            rest = inspect.signature(test).parameters.keys() - given.keys()
            fixtures = {key: request.getfixturevalue(key) for key in rest}
            test(**given, **fixtures)


def cases_of(mark: pytest.Mark) -> list[dict[str, Any]]:
    """The arguments of every case of one `parametrize`."""
    names, values = mark.args
    keys = (names,) if isinstance(names, str) else names
    return [dict(zip(keys, (v,) if isinstance(names, str) else v, strict=True)) for v in values]


def test_a_page_that_says_something_wrong_is_caught() -> None:
    for line in (
        "redefense trian digits-red",
        "redefense train digits-rde",
        "redefense train digits-red --set epoch=3",
        "redefense train digits-red --sed 3",
        "redefense evaluate runs/x --suite quik",
        "redefense data check cifar11:PATH",
        "make demmo",
        "pip install -e '.[hubb]'",
        "pip install 'redefense[hub]'",
        ". venv/bin/activate",
        "curl -H 'Content-Type: image/png' --data-binary @x.png localhost:8000/classify",
        "python benchmarks/serve.py --lst",
        "snakemake -s study/Snakefile --configfile study/digit.yaml",
        "rm -rf build",
    ):
        (words,) = commands(line)
        with pytest.raises((AssertionError, redefense.RedefenseError, typer.TyperException)):
            check_words(words)


def test_what_the_readme_types_exists() -> None:
    typed = [w for b in blocks(ROOT / "README.md") if b.language == "sh" for w in commands(b.text)]
    assert {"redefense", "pip", "."} <= {words[0] for words in typed}
    for words in typed:
        check_words(words)


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (b for b in blocks(ROOT / "README.md") if b.language == "python")
    run_python(block, {"__name__": "readme"}, "README.md")
    assert capsys.readouterr().out


def test_every_page_is_in_the_table_of_contents_once() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    lists = [part.split("```")[0] for part in index.split("```{toctree}")[1:]]
    lines = [line for part in lists for line in part.splitlines()]
    listed = [line for line in lines if line and not line.startswith(":")]
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES}
    assert sorted(listed) == sorted(pages - {"index"})
