"""Docstrings as Markdown: their formulas and references, which are written as torch writes its own.

An extension of griffe, which reads the source for the API pages.
"""

import re
import textwrap

import griffe

# `.. math::` and the indented lines that follow, the first of which may be on its own line.
FORMULA = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)\n(?P<rest>(?:(?P=indent) +[^\n]*\n|\n)*)", re.MULTILINE
)
REFERENCE = re.compile(r":(?:class|func|meth):`(?P<path>[\w.]+)`")


def _display(found: re.Match[str]) -> str:
    lines = textwrap.dedent(f"{found['first'].strip()}\n{textwrap.dedent(found['rest'])}").strip()
    return textwrap.indent(f"\n$$\n\\begin{{aligned}}\n{lines}\n\\end{{aligned}}\n$$\n\n", found["indent"])


def to_markdown(docstring: str) -> str:
    """A docstring with its formulas between dollars, and its references as links."""
    text = FORMULA.sub(_display, f"{docstring}\n")
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    return REFERENCE.sub(lambda found: f"[`{found['path']}`][{found['path']}]", text).rstrip("\n")


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
