"""Turn formulas into MathML while the site is built: a reader's browser needs no script and no network for them."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what the arithmatex extension has marked."""

    def formula(found: re.Match[str]) -> str:
        inline, block = found.group(2), found.group(3)
        latex = html.unescape(inline if block is None else block).strip()
        return convert(latex, display="inline" if block is None else "block")

    return _FORMULA.sub(formula, content)
