"""Formats tables as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "−": "$-$",
    "±": r"$\pm$",
    "‖": r"$\Vert$",
    "×": r"$\times$",
    "α": r"$\alpha$",
}


def markdown_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table: the first column left-aligned, the others right-aligned."""
    return [
        f"| {' | '.join(headings)} |",
        f"|---|{'---:|' * (len(headings) - 1)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows),
    ]


def latex_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a LaTeX table for the package booktabs, its text escaped."""
    return [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"\toprule",
        " & ".join(map(latex, headings)) + r" \\",
        r"\midrule",
        *(" & ".join(map(latex, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def latex(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in text)
