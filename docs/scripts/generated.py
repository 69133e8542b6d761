"""What is put into the pages when they are built: checks, the import map, inline pictures."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redefense.checks.catalogue import CATALOGUE, GROUPS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PICTURE = re.compile(r"^!\[.+\]\((?:\.\./)?pictures/([\w-]+)\.svg\)$", re.MULTILINE)
PLACE = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def checks() -> Iterator[str]:
    """Every check under its group, with the heading that links point to."""
    for group, heading in GROUPS.items():
        yield f"## {heading}\n"
        for entry in (e for e in CATALOGUE.values() if e.group == group):
            yield f"({entry.id.lower()})=\n"
            yield f"### {entry.id}: {entry.title}\n"
            yield f"**{entry.asks}**" + (" Made with `--checks full`." if entry.full else "") + "\n"
            yield f"- Red means: {entry.red}"
            yield f"- Next: {entry.todo}\n"


def imports() -> Iterator[str]:
    """The layers of the package from the top, as the test of the imports holds them."""
    from test_layers import LAYERS

    yield "| layer | modules and folders | in a few words |"
    yield "|---|---|---|"
    for rank, names in reversed(list(enumerate(LAYERS))):
        listed = ", ".join(f"`{name}`" for name in sorted(names))
        told = " ".join(filter(None, (first_line(name) for name in sorted(names))))
        yield f"| {rank} | {listed} | {told} |"


def first_line(name: str) -> str:
    """The first line of a folder's docstring; empty for single files."""
    file = ROOT / "src" / "redefense" / name / "__init__.py"
    found = re.match(r'"""(.+?)(?:"""|\n)', file.read_text()) if file.exists() else None
    return found.group(1) if found else ""


def picture(name: str) -> str:
    """A picture as a part of the page, so that it takes the colours of the page's theme."""
    text = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text()
    return f'```{{raw}} html\n<div class="picture">\n{text}</div>\n```'


def fill(app: Any, name: str, source: list[str]) -> None:
    """Put what is generated, and the pictures, into the places that a page keeps for them."""
    makers = {"checks": checks, "imports": imports}
    source[0] = PLACE.sub(lambda found: "\n".join(makers[found.group(1)]()), source[0])
    source[0] = PICTURE.sub(lambda found: picture(found.group(1)), source[0])
