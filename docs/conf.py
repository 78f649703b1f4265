"""Sphinx builds the documentation from these pages and from the docstrings: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import pysmooth

ROOT = Path(__file__).resolve().parent

project = "pysmooth"
author = "pysmooth contributors"
project_copyright = "pysmooth contributors, BSD-3-Clause"
version = release = pysmooth.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

html_theme = "furo"
html_title = f"pysmooth {release}"
html_static_path: list[str] = []
html_math_renderer = "mathml"
html_show_sphinx = False
maximum_signature_line_length = 88

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Classes are documented where they are imported from; signatures keep the names of their types.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# `name` in a docstring is code, and a link where something has that name.
default_role = "py:obj"

# With -n a link that leads nowhere is an error. What is torch's or Python's has no page here, and
# arguments are written as names are: only what begins with pysmooth must be found.
nitpick_ignore_regex = [
    (r"py:.*", r"(?s)(?!pysmooth\.[\w.]+$).*"),
    # The types of a signature that are no class.
    (r"py:class", r"pysmooth\..*\.(_.*|[A-Z]\w*)"),
]

# ---- links that leave docs/ ----------------------------------------------------------------------

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)\)")


def _keep_links_inside(_: Sphinx, docname: str, source: list[str]) -> None:
    """On GitHub a page links to what is beside docs/, and to folders; here it names their place."""
    here = (ROOT / docname).parent

    def inside(found: re.Match[str]) -> str:
        text, link = found.groups()
        target = (here / link).resolve()
        if not target.exists():
            return found[0]  # a warning, which is an error
        if target.is_relative_to(ROOT) and not target.is_dir():
            return found[0]
        for index in ("README.md", "index.md"):
            if target.is_relative_to(ROOT) and (target / index).is_file():
                return f"[{text}]({link.rstrip('/')}/{index})"
        return f"{text} (`{target.relative_to(ROOT.parent)}` in the repository)"

    source[0] = _LINK.sub(inside, source[0])


# ---- formulas that need no script and no network -------------------------------------------------


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    formula = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div style="padding: 0.4em 0">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    app.connect("source-read", _keep_links_inside)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
