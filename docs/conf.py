"""Sphinx settings. `make docs` builds with every warning an error."""

from typing import Any

from redefense import __version__

project = "redefense"
author = "the redefense authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
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

html_theme = "alabaster"
html_theme_options = {
    "description": "Randomized robust ensembles, measured honestly",
    "page_width": "1280px",
    "body_max_width": "1040px",  # tables of ten columns
}
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
