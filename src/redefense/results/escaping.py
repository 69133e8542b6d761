"""Text for LaTeX."""

_ESCAPED = str.maketrans(
    {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        **{mark: "\\" + mark for mark in "&%$#_{}"},
    }
)  # fmt: skip


def escape_latex(text: str) -> str:
    """Text on one line that LaTeX shows as it is."""
    return " ".join(text.split()).translate(_ESCAPED)
