"""Markdown of this package as an HTML page that needs no script, font or request."""

import base64
import html
import pathlib
import re
from collections.abc import Mapping, Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token

from cofi_jax.errors import printable
from cofi_jax.report import figures

# The tag by which a page of ours is recognised later.
GENERATOR = '<meta name="generator" content="cofi-jax">'

_PAGE, _STYLE = (
    pathlib.Path(__file__).with_name(name).read_text()
    for name in ("page.html", "page.css")
)
# The only tags that our Markdown may contain; all others are shown as text.
_FOLD = re.compile(r"<details>\n<summary>[\w ]+</summary>\n*|</details>\n*")


def page(markdown: str, charts: Mapping[str, Sequence[figures.Chart]]) -> str:
    """Returns a whole page that shows a Markdown text.

    Args:
      markdown: the text, which begins with a heading. Labels, paths and all else that
        others wrote must have gone through `tables.escape`.
      charts: for the address of each image in the text, what stands in its place.
    """
    parser = MarkdownIt("commonmark").enable("table")
    parser.renderer.rules |= {
        "html_inline": _html,
        "html_block": _html,
        "charts": lambda tokens, index, *_: tokens[index].content,
        "table_open": _open_table,
        "table_close": lambda *_: "</table>\n</div>\n",
    }
    tokens = parser.parse(markdown)
    title = _adapt(tokens, charts)
    body = parser.renderer.render(tokens, parser.options, {})
    title = html.escape(title)
    return _PAGE.format(title=title, generator=GENERATOR, style=_STYLE, body=body)


def _adapt(
    tokens: Sequence[Token], charts: Mapping[str, Sequence[figures.Chart]]
) -> str:
    """Names tables and their cells, puts charts in; returns the first heading."""
    headings = []
    for index, token in enumerate(tokens):
        before = tokens[index - 1]
        if token.type == "inline":
            children = token.children or []
            if before.type == "heading_open":
                headings.append("".join(child.content for child in children))
            elif [child.type for child in children] == ["image"]:
                markup = _charts(charts[str(children[0].attrs["src"])])
                token.children = [Token("charts", "", 0, content=markup)]
                before.hidden = tokens[index + 1].hidden = True  # the paragraph
        elif token.type == "table_open":
            token.meta["name"] = headings[-1]
        elif token.type in ("th_open", "td_open"):
            if not token.attrs.pop("style", ""):  # it is not set flush right
                token.attrs["class"] = "text"
            if token.type == "th_open":
                token.attrs["scope"] = "col"
            elif before.type == "tr_open":
                token.tag = tokens[index + 2].tag = "th"
                token.attrs["scope"] = "row"
    return headings[0]


def _open_table(tokens, index, *_):
    """A box that scrolls by itself where the table is wider than the page."""
    name = html.escape(tokens[index].meta["name"])
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">'
    return f"{box}\n<table>\n"


def _charts(charts):
    """The markup of charts beside one another, or one below another on a phone."""
    parts = []
    for chart in charts:
        data = base64.b64encode(figures.svg(figures.draw([chart]))).decode()
        source = f"data:image/svg+xml;base64,{data}"
        image = f'<img alt="{html.escape(printable(chart.alt))}" src="{source}">'
        title = f"<h3>{html.escape(printable(chart.title))}</h3>"
        parts.append(f"<figure>\n{title}\n{image}\n</figure>\n")
    return f'<div class="charts">\n{"".join(parts)}</div>\n'


def _html(tokens, index, *_):
    """Raw HTML: our own `tables.folded` as it is, anything else as text."""
    text = tokens[index].content
    return text if _FOLD.fullmatch(text) else html.escape(text)
