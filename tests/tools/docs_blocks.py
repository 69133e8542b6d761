"""The fenced blocks of a page, and how the tests take a command of it."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (test|file): ([^>]+?) -->\s*\Z")
LOOP = re.compile(r"^for (\w+) in ([^;]+); do\b[^\n]*\n(.*?)^done$", re.MULTILINE | re.DOTALL)
RUN_LANGUAGES = ("sh", "python")
MODES = ("run", "parse", "model", "names", "added", "exit 1", "any exit")
"""What `<!-- test: MODE -->` before a block may say; "run" unless it says anything."""

# on digits a page is tried with what takes seconds; an option that the page gives itself is kept
TINY: dict[str, dict[str, list[str]]] = {
    "train": {
        "--set": [
            "epochs=1",
            "data.images=128",
            "batch_size=16",
            "ensemble.num_members=2",
            "ensemble.model=mlp",
        ],
        "--quiet": [],
    },
    "evaluate": {"--images": ["6"], "--quiet": []},
    "export": {"--quiet": []},
    "verify": {"--quiet": []},
}


@dataclass(frozen=True, slots=True)
class Block:
    """One block.

    Attributes:
        language: behind the fence.
        mode: one of `MODES`.
        file: name under which the block is to be written, or None.
        line: of the page, for messages.
    """

    language: str
    text: str
    mode: str
    file: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page that are run or written, in order."""
    text, found = page.read_text(), []
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        mark = MARK.search(text[: match.start()])
        kind, value = mark.groups() if mark else ("test", "run")
        if language in RUN_LANGUAGES or kind == "file":
            plain = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
            line = text.count("\n", 0, match.start()) + 1
            mode, file = (value, None) if kind == "test" else ("run", value)
            assert mode in MODES, f"{page.name}:{line}: unknown mark {mode!r}"
            found.append(Block(language, plain, mode, file, line))
    return found


def unrolled(text: str) -> str:
    """A shell block whose loops over words are written out."""

    def written_out(loop: re.Match[str]) -> str:
        name, values, body = loop.groups()
        return "".join(re.sub(rf"\$\{{?{name}\b\}}?", value, body) for value in values.split())

    return LOOP.sub(written_out, text)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell block; settings before it (A=b command) are dropped."""
    for line in unrolled(text.replace("\\\n", " ")).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words


def made_tiny(words: list[str]) -> list[str]:
    """A command of `redefense` with settings that take seconds, where the page gives none."""
    extra, assigned = [], {word.partition("=")[0] for word in words}
    if "ps-red" in words[1]:  # hypernetworks write convolutions alone
        assigned.add("ensemble.model")
    for option, values in TINY.get(words[0], {}).items():
        if option == "--set":
            own = [value for value in values if value.partition("=")[0] not in assigned]
            extra += [word for value in own for word in (option, value)]
        elif option not in words:
            extra += [option, *values]
    return words + extra
