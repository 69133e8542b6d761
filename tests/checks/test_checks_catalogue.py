"""The words of the checks belong to the checks that the code makes."""

import ast
import re
from pathlib import Path

import redefense
from redefense.checks.catalogue import CATALOGUE, GROUPS
from redefense.evaluation.suite import SUITES
from redefense.results.schema import OF_DEFENCE

SRC = Path(redefense.__file__).parent
FULL = [*(f"checks/{name}.py" for name in ("attacks", "draws", "gradients")),
        "evaluation/budget_check.py"]  # fmt: skip


def ids_in(path: Path) -> set[str]:
    """The strings of a file that are ids of checks."""
    strings = (node.value for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Constant) and isinstance(node.value, str))  # fmt: skip
    return {string for string in strings if re.fullmatch(r"[SBD]\d+[a-z]?", string)}


def test_the_catalogue_holds_every_check_of_the_code_and_no_other() -> None:
    files = [path for path in SRC.rglob("*.py") if path.name != "catalogue.py"]
    assert set(CATALOGUE) == set().union(*map(ids_in, files))


def test_what_is_made_with_full_checks_only_says_so() -> None:
    made = set().union(*(ids_in(SRC / name) for name in FULL))
    # S17 is the stream of S17b's attack
    assert {entry.id for entry in CATALOGUE.values() if entry.full} == made - {"S17"}


def test_each_check_asks_a_question_and_says_what_to_do() -> None:
    for entry in CATALOGUE.values():
        assert entry.asks.endswith("?"), entry.id
        assert entry.red.endswith("."), entry.id
        assert entry.todo.endswith("."), entry.id
        named = re.findall(r"\b[SBD]\d+[a-z]?\b", f"{entry.red} {entry.todo}")
        assert set(named) <= set(CATALOGUE), entry.id
        suites = re.findall(r"--suite ([\w-]+)", f"{entry.red} {entry.todo}")
        assert set(suites) <= set(SUITES), entry.id
    assert list(dict.fromkeys(entry.group for entry in CATALOGUE.values())) == list(GROUPS)


def test_the_checks_of_the_defence_are_a_group() -> None:
    assert {e.id for e in CATALOGUE.values() if e.group == "defence"} == set(OF_DEFENCE)
