"""Sphinx settings. `make docs` builds with every warning an error."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

import generated

from redefense import __version__

project = "redefense"
author = "the redefense authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "scripts"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # single backticks in docstrings
toc_object_entries = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "redefense"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_copy_source = False


def as_typed(
    app: Any, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Docstrings are plain text: bars are bars, and Markdown tables are shown as they are typed."""
    text: list[str] = []
    for line in lines:
        row, before = line.strip().startswith("|"), text[-1] if text else ""
        if row:
            inside = before.startswith("    |")
            text += [f"    {line.strip()}"] if inside else ["", "::", "", f"    {line.strip()}"]
            continue
        if before.startswith("    |"):
            text.append("")
        code = line.split("`")
        text.append("`".join(p if i % 2 else p.replace("|", r"\|") for i, p in enumerate(code)))
    lines[:] = text


def setup(app: Any) -> None:
    # before napoleon, which reads the sections
    app.connect("autodoc-process-docstring", as_typed, priority=400)
    app.connect("source-read", generated.fill)
