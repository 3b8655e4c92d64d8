"""The parts that HTML pages share: templates, cells with intervals, drawings with captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from src.common.privacy import publishable
from src.publishing import plots

TEMPLATES = Path(__file__).parent / "templates"


class Cell(NamedTuple):
    """A value and its interval, if there is one."""

    value: str
    interval: str = ""


class Drawing(NamedTuple):
    """A drawing as an SVG element, and its caption."""

    svg: str
    caption: str


def render(name: str, content: Mapping[str, Any]) -> str:
    """Return the page that a template makes of its content; a missing value is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(name).render(content)
    # JSON may hold unpaired surrogates, which UTF-8 cannot encode.
    return page.encode("utf-8", "replace").decode("utf-8")


def short_name(name: Any) -> str:
    """Return a model's or data set's name for a reader elsewhere: no directory of this machine."""
    return publishable(str(name or ""))


def split_cell(text: str) -> Cell:
    """Split what :func:`src.evaluation.results.with_interval` returns."""
    value, _, interval = text.partition(" [")
    return Cell(value, f"[{interval}" if interval else "")


def make_drawing(draw: Callable[[], Figure], name: str, caption: str) -> Drawing:
    """Return a figure with its caption; ``name`` tells its ids from those of a page's others."""
    return Drawing(plots.inline_svg(draw(), name, caption), caption)
