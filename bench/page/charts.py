"""Pictures as SVG inside the page, in the page's own text colour, so that they fit both themes."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from ..plots import figures


def charts(results: dict[str, Any]) -> dict[str, Markup]:
    """Every picture for which there is data, by name."""
    return {name: Markup(svg(figure)) for name, figure in figures(results).items()}


def svg(figure: Figure) -> str:
    """The figure as an SVG element; what is black in it takes the colour of the text around it."""
    out = io.StringIO()
    # Text stays text: found by a search, read aloud, and half the size.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pysmooth"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    # As wide as its column, never wider than drawn.
    return re.sub(
        r'width="([\d.]+)pt" height="[\d.]+pt"', r'style="max-width: \1pt"', text, count=1
    )
