"""Markdown of this package as an HTML page that needs no script, font or request."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from cofi_jax.report import figures

# The page is light for all readers, because the pictures are drawn on white.
_STYLE = """
:root { color-scheme: only light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #24292e;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    sans-serif; overflow-wrap: break-word; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 20px 64px; }
h1 { margin: 0 0 6px; font-size: 30px; line-height: 1.2; font-weight: 650;
  letter-spacing: -.01em; }
h2 { margin: 52px 0 14px; padding-top: 14px; border-top: 1px solid #dfe3e6;
  font-size: 20px; line-height: 1.3; font-weight: 650; }
h3 { margin: 0 0 6px; font-size: 15px; font-weight: 600; }
p { margin: 0 0 14px; max-width: 70ch; }
h1 + p + ul { display: grid; gap: 12px; margin: 26px 0 8px; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr));
  list-style: none; }
h1 + p + ul li { padding: 14px 16px 15px; border: 1px solid #dfe3e6; border-radius: 8px;
  background: #f8fafb; color: #57606a; font-size: 14px; line-height: 1.45; }
h1 + p + ul strong { display: block; margin-bottom: 4px; color: #005b8f;
  font-size: 23px; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 32px 36px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 560px; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: 0 0 16px; max-width: 100%; }
.charts + .scroll { margin-top: 32px; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: 14.5px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 22px 7px 0; border-bottom: 1px solid #e7eaec; text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom-color: #aeb6bd; color: #57606a; font-size: 13.5px; }
th:first-child, .text { text-align: left; }
th:first-child { position: sticky; left: 0; background: #fff; }
tbody th { font-weight: 500; }
h2 + ul { margin: 0; padding: 0; list-style: none; font-size: 15px; }
h2 + ul li { display: grid; grid-template-columns: 160px minmax(0, 70ch); gap: 24px;
  margin-bottom: 8px; }
h2 + ul strong { color: #57606a; font-weight: 400; }
details { margin-top: 24px; }
summary { margin-bottom: 8px; cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; margin: 0; padding: 14px 16px; border-radius: 8px;
  background: #f5f7f8; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
    monospace; }
@media (max-width: 620px) {
  main { padding: 22px 10px 44px; }
  h1 { font-size: 25px; }
  h2 { margin-top: 40px; }
  table { font-size: 13.5px; }
  th, td { padding-right: 13px; }
  tbody th { min-width: 14ch; max-width: 20ch; white-space: normal;
    overflow-wrap: anywhere; }
  h2 + ul li { grid-template-columns: minmax(0, 1fr); gap: 2px; margin-bottom: 10px; }
}
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# The only tags that our Markdown may contain; all others are shown as text.
_FOLD = re.compile(r"<details>\n<summary>[\w ]+</summary>\n*|</details>\n*")


class Chart(NamedTuple):
    """A figure of a page, its title, and what it shows in words."""

    title: str
    figure: Any  # a matplotlib.figure.Figure
    alt: str


def page(
    markdown: str, charts: Mapping[str, Sequence[Chart]], *, generator: str
) -> str:
    """Returns a whole page that shows a Markdown text.

    Args:
      markdown: the text, which begins with a heading. Labels, paths and all else that
        others wrote must have gone through `tables.escape`.
      charts: for the address of each image in the text, what stands in its place.
      generator: the name of the program, by which the file is recognised later.
    """
    parser = MarkdownIt("commonmark").enable("table")
    for name, rule in (
        ("html_inline", _html),
        ("html_block", _html),
        ("charts", lambda tokens, index, *_: tokens[index].content),
        ("table_open", _open_table),
        ("table_close", lambda *_: "</table>\n</div>\n"),
    ):
        parser.renderer.rules[name] = rule
    tokens = parser.parse(markdown)
    title = _adapt(tokens, charts)
    body = parser.renderer.render(tokens, parser.options, {})
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="only light">
{generator_tag(generator)}
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def generator_tag(generator: str) -> str:
    """The tag by which a page says what wrote it."""
    return f'<meta name="generator" content="{html.escape(generator)}">'


def _adapt(tokens: Sequence[Token], charts: Mapping[str, Sequence[Chart]]) -> str:
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
    for title, figure, alt in charts:
        data = base64.b64encode(figures.svg(figure)).decode()
        source = f"data:image/svg+xml;base64,{data}"
        image = f'<img alt="{html.escape(alt)}" src="{source}">'
        parts.append(f"<figure>\n<h3>{html.escape(title)}</h3>\n{image}\n</figure>\n")
    return f'<div class="charts">\n{"".join(parts)}</div>\n'


def _html(tokens, index, *_):
    """Raw HTML: our own `tables.folded` as it is, anything else as text."""
    text = tokens[index].content
    return text if _FOLD.fullmatch(text) else html.escape(text)
