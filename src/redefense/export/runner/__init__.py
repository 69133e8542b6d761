"""The program `run.py`, which travels in every bundle and needs numpy and onnxruntime alone.

It is one file: the modules of this folder and `redefense.pictures`, joined by `text`.
"""

import ast
import inspect
from functools import cache

from redefense import pictures
from redefense.export.runner import command, errors, images, kernels, records, sessions
from redefense.export.runner.command import check, main, materialise
from redefense.export.runner.errors import BundleError, Floats
from redefense.export.runner.images import read_image
from redefense.export.runner.kernels import initialisers, written
from redefense.export.runner.records import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    SIGNATURE,
    Bundle,
    Trust,
    aside,
    open_bundle,
    write_records,
)
from redefense.export.runner.sessions import (
    AGREEMENT,
    MASKED,
    TOLERANCE,
    classify,
    deviation,
    differs,
    draw_members,
    logits_of,
    open_session,
)

__all__ = [
    "AGREEMENT", "FORMAT", "MANIFEST", "MASKED", "SCHEMA", "SIGNATURE", "TOLERANCE", "Bundle",
    "BundleError", "Floats", "Trust", "aside", "check", "classify", "deviation", "differs",
    "draw_members", "initialisers", "logits_of", "main", "materialise", "open_bundle",
    "open_session", "read_image", "text", "write_records", "written",
]  # fmt: skip

PARTS = (errors, pictures, sessions, kernels, records, images, command)
"""In the order of their imports."""


@cache
def text() -> str:
    """The text of `run.py`: the imports of all parts, then what each defines.

    A part has its imports at its top, and no name that another part defines, too.
    """
    plain: set[str] = set()
    names: dict[str, set[str]] = {}
    bodies = []
    for part in PARTS:
        source = inspect.getsource(part)
        imports = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
        for node in imports:
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif not str(node.module).startswith("redefense"):
                names.setdefault(str(node.module), set()).update(a.name for a in node.names)
        bodies.append("".join(source.splitlines(keepends=True)[imports[-1].end_lineno :]).strip())
    froms = [f"from {home} import {', '.join(sorted(some))}" for home, some in names.items()]
    usage = ast.get_docstring(ast.parse(inspect.getsource(command)), clean=False)
    head = "\n".join([f'"""{usage}"""', "", *sorted(plain), *sorted(froms)])
    return "\n\n\n".join([head, *bodies]) + "\n"
