"""Text for LaTeX."""

_ESCAPED = str.maketrans(
    {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        **{mark: "\\" + mark for mark in "&%$#_{}"},
    }
)  # fmt: skip


def escape_latex(text: str) -> str:
    """Escape text for LaTeX, on one line."""
    return " ".join(text.split()).translate(_ESCAPED)
