"""The layers of the package: no module imports from a higher one, and public names are listed."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import redefense

SRC = Path(redefense.__file__).parent

LAYERS = [
    {
        "types",
        "errors",
        "rng",
        "limits",
        "radius",
        "config",
        "threat",
        "pictures",
        "networks",
        "plugins",
    },
    {"runtime"},
    {"results"},
    {"penalties", "data", "models"},
    {"ensembles"},
    {"attacks"},
    {"defences", "stochastic"},
    {"train", "recipes"},
    {"checks"},
    {"evaluation"},
    {"report"},
    {"audit"},
    {"export", "hub", "conformance"},
    {"claims"},
    {"serve"},
    {"bench"},
    {"commands"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# neither needs torch: a report must open at once
TORCH_FREE = (
    "redefense", "redefense.cli", "redefense.recipes", "redefense.report.page",
    "redefense.audit.audit", "redefense.report.card",
    *(f"redefense.results.{path.stem}" for path in sorted(SRC.glob("results/[!_]*.py"))),
)  # fmt: skip


def imported(path: Path) -> set[str]:
    """First part below the package of everything that a file imports from it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("redefense."):
            names.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("redefense.")}
    return names


def test_no_module_imports_from_a_higher_layer() -> None:
    wrong = []
    for path in SRC.rglob("*.py"):
        here = path.relative_to(SRC).with_suffix("").parts[0]
        if here != "__init__":
            wrong += [
                f"{path.relative_to(SRC)} imports {target}"
                for target in imported(path)
                if RANK[target] > RANK[here]
            ]
    assert wrong == []


def test_public_names_exist_and_are_sorted() -> None:
    assert list(redefense.__all__) == sorted(redefense.__all__)
    assert all(getattr(redefense, name) is not None for name in redefense.__all__)


def test_no_public_name_is_hidden_by_a_subpackage() -> None:
    # but for one that can be called
    assert {path.stem for path in SRC.iterdir()} & set(redefense.__all__) == {"train"}
    importlib.import_module("redefense.train.experiment")
    assert callable(redefense.train)


def test_modules_of_the_contract_are_reached_by_their_names() -> None:
    names = [
        "attacks.base.Attack", "config.Run", "data.check.check_dataset", "defences.red.RED",
        "ensembles.configs.HyperConfig", "errors.RedefenseError", "export.export",
        "models.MODELS", "penalties.lipschitz", "rng.stream", "stochastic.GaussianNoise",
        "threat.Threat", "types.Batch",
    ]  # fmt: skip
    code = "\n".join(["import redefense", *(f"redefense.{name}" for name in names)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_public_names_are_offered_for_completion() -> None:
    assert dir(redefense) == redefense.__all__


def test_no_page_holds_a_placeholder() -> None:
    pages = [page for page in SRC.parents[1].glob("*.md") if "@@" in page.read_text()]
    assert pages == []


def test_the_changelog_begins_with_this_version() -> None:
    text = (SRC.parents[1] / "CHANGELOG.md").read_text()
    first = next(line for line in text.splitlines() if line.startswith("## "))
    # between releases the version is that of the next one with `.devN`, N commits after the last
    assert first.split()[1] == redefense.__version__.split(".dev")[0]


def test_what_must_start_at_once_does_not_import_torch() -> None:
    lines = [f"import {module}\nif 'torch' in sys.modules: sys.exit({module!r})"
             for module in TORCH_FREE]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines])],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
