"""HTML that needs nothing else: no script, no font, no request.

Every function returns markup and takes plain text, which it escapes, except where it
says markup.
"""

import base64
import html
from collections.abc import Iterable, Sequence

from cofi_jax.report import figures

# Light for all: the pictures are drawn on white.
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
.quiet, figcaption { color: #57606a; font-size: 14px; }
.tiles { display: grid; gap: 12px; margin: 26px 0 8px; padding: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.tiles div { padding: 14px 16px 15px; border: 1px solid #dfe3e6; border-radius: 8px;
  background: #f8fafb; }
.tiles dt { color: #57606a; font-size: 14px; }
.tiles dt::first-letter { text-transform: uppercase; }
.tiles dd { margin: 0; font-size: 14px; line-height: 1.45; color: #57606a; }
.tiles dd.value { margin: 1px 0 5px; color: #005b8f; font-size: 23px; line-height: 1.3;
  font-weight: 650; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 32px 36px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 560px; }
figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin: 0 0 16px; max-width: 100%; }
.charts + .scroll, .charts + .charts { margin-top: 32px; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: 14.5px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 22px 7px 0; border-bottom: 1px solid #e7eaec; text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom-color: #aeb6bd; color: #57606a; font-size: 13.5px; }
th:first-child, td.text, th.text { text-align: left; }
th:first-child { position: sticky; left: 0; background: #fff; }
tbody th { font-weight: 500; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 8px 24px;
  margin: 0; font-size: 15px; }
dl.facts dt { color: #57606a; }
dl.facts dd { margin: 0; max-width: 70ch; min-width: 0; }
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
  dl.facts { grid-template-columns: 1fr; gap: 2px; }
  dl.facts dd { margin-bottom: 10px; }
}
"""


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escape(text: object) -> str:
    """Text as markup, also inside of attributes."""
    return html.escape(str(text))


def document(title: str, body: Iterable[str], *, generator: str) -> str:
    """A whole page.

    Args:
      title: of the window.
      body: markup.
      generator: what wrote it, to be found again in the file.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="only light">
<meta name="generator" content="{escape(generator)}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{"".join(body)}</main>
</body>
</html>
"""


def title(text: str) -> str:
    """The heading of the page."""
    return f"<h1>{escape(text)}</h1>\n"


def section(title: str, *parts: str) -> str:
    """A heading above `parts`, which are markup."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(text: str, *, quiet: bool = False) -> str:
    """A paragraph, perhaps in small print."""
    kind = ' class="quiet"' if quiet else ""
    return f"<p{kind}>{escape(text)}</p>\n"


def tiles(items: Iterable[Sequence[str]]) -> str:
    """The figures that matter: (name, value, lines of small print...)."""
    boxes = []
    for name, value, *notes in items:
        below = "".join(f"<dd>{escape(note)}</dd>" for note in notes)
        value = f'<dd class="value">{escape(value)}</dd>'
        boxes.append(f"<div><dt>{escape(name)}</dt>{value}{below}</div>\n")
    return f'<dl class="tiles">\n{"".join(boxes)}</dl>\n'


def facts(items: Iterable[tuple[str, str]]) -> str:
    """A list of names and what there is to say of them."""
    rows = (f"<dt>{escape(k)}</dt><dd>{escape(text)}</dd>\n" for k, text in items)
    return f'<dl class="facts">\n{"".join(rows)}</dl>\n'


def table(
    name: str,
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    words: Sequence[int] = (),
) -> str:
    """A table in a box that scrolls by itself where it is wider than the page.

    Args:
      name: what a screen reader calls the box.
      head: titles of the columns.
      rows: cells; the first one of a row is its title.
      words: the columns that hold words, so are set flush left, besides the first.
    """

    def cell(kind, scope, column, content):
        side = ' class="text"' if column in words else ""
        return f"<{kind}{scope}{side}>{escape(content)}</{kind}>"

    titles = (cell("th", ' scope="col"', *pair) for pair in enumerate(head))
    lines = []
    for first, *rest in rows:
        cells = (cell("td", "", *pair) for pair in enumerate(rest, start=1))
        title = f'<th scope="row">{escape(first)}</th>'
        lines.append(f"<tr>{title}{''.join(cells)}</tr>\n")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">\n'
        f"<table>\n<thead><tr>{''.join(titles)}</tr></thead>\n"
        f"<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>\n"
    )


def charts(*parts: str) -> str:
    """Charts beside one another, or below on a phone."""
    return f'<div class="charts">\n{"".join(parts)}</div>\n'


def chart(title: str, figure, alt: str) -> str:
    """A `matplotlib.figure.Figure` under its title; `alt` says what it shows."""
    data = base64.b64encode(figures.svg(figure)).decode()
    return (
        f"<figure>\n<h3>{escape(title)}</h3>\n"
        f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">\n</figure>\n'
    )


def code(text: str) -> str:
    """Lines as they stand."""
    return f"<pre>{escape(text)}</pre>\n"


def folded(title: str, part: str) -> str:
    """Markup that is shown when one clicks on `title`."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{part}</details>\n"
