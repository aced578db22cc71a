"""A document of text, tables and charts, as one HTML file and as Markdown: the same content twice.

The HTML file is complete: styles and SVG charts are in it, nothing is loaded, nothing is a script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import inf, isfinite, log1p
from string import Template
from typing import Protocol

SPARKS = "▁▂▃▄▅▆▇█"


class Block(Protocol):
    """A part of a document; `text` is given as plain text and escaped by the block."""

    def html(self) -> str: ...

    def markdown(self) -> str: ...


@dataclass(frozen=True)
class Heading:
    """Opens a section."""

    text: str

    def html(self) -> str:
        return f"<h2>{escape(self.text)}</h2>"

    def markdown(self) -> str:
        return f"## {plain(self.text)}"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"

    def markdown(self) -> str:
        return plain(self.text)


@dataclass(frozen=True)
class Table:
    """Rows of text; the first cell of a row names it.

    align  a letter for each column: "l" for words, "r" for numbers.
    """

    caption: str
    align: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        head = "".join(
            f'<th scope="col" class="{a}">{escape(cell)}</th>'
            for a, cell in zip(self.align, self.head, strict=True)
        )
        rows = "\n".join(self._row(row) for row in self.rows)
        label = escape(self.caption)
        return (
            f'<div class="wide" role="region" tabindex="0" aria-label="{label}"><table>\n'
            f"<caption>{label}</caption>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{rows}\n</tbody></table></div>"
        )

    def _row(self, row: tuple[str, ...]) -> str:
        cells = list(zip(self.align, row, strict=True))
        first = f'<th scope="row" class="{cells[0][0]}">{_breakable(cells[0][1])}</th>'
        return f"<tr>{first}" + "".join(
            f'<td class="{a}">{_breakable(cell)}</td>' for a, cell in cells[1:]
        ) + "</tr>"  # fmt: skip

    def markdown(self) -> str:
        marks = [":--" if a == "l" else "--:" for a in self.align]
        lines = [map(plain, self.head), marks, *(map(plain, row) for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{plain(self.caption)}\n\n{table}"


@dataclass(frozen=True)
class Bars:
    """One bar for each label, in order; none where a value is None, all the height for inf."""

    caption: str
    unit: str
    labels: tuple[str, ...]
    values: tuple[float | None, ...]

    def heights(self) -> list[float]:
        """0 to 1, of the largest that is finite."""
        top = max((v for v in self.values if v is not None and 0 < v < inf), default=1.0)
        return [min(max((v or 0.0) / top, 0.0), 1.0) for v in self.values]

    def html(self) -> str:
        bars = "".join(
            f'<rect x="{i + 0.1:.1f}" y="{100 - 100 * h:.1f}" width=".8" height="{100 * h:.1f}">'
            f"<title>{escape(label)}: {self._value(v)}</title></rect>"
            for i, (label, v, h) in enumerate(
                zip(self.labels, self.values, self.heights(), strict=True)
            )
        )
        return _figure(self.caption, bars, len(self.labels), self._ends())

    def markdown(self) -> str:
        line = sparkline(self.heights())
        return f"{plain(self.caption)}: `{line}` {plain(', '.join(self._ends()))}"

    def _value(self, value: float | None) -> str:
        return "none" if value is None else f"{value:,.1f} {self.unit}"

    def _ends(self) -> tuple[str, str]:
        known = [v for v in self.values if v is not None and isfinite(v)]
        top = f"highest {self._value(max(known))}" if known else "no value"
        return f"{len(self.labels)} steps, first to last", top


@dataclass(frozen=True)
class Histogram:
    """How often values between `low` and `high` were seen, and the range that a grid covers.

    counts  of intervals of the same width. The height of a bar is the logarithm of its count.
    grid    the least and the largest value that have a place in it.
    """

    caption: str
    counts: tuple[int, ...]
    low: float
    high: float
    grid: tuple[float, float]

    def heights(self) -> list[float]:
        top = log1p(max(self.counts, default=0)) or 1.0
        return [log1p(count) / top for count in self.counts]

    def html(self) -> str:
        n, width = len(self.counts), self.high - self.low or 1.0
        begin, end = ((min(max(v, self.low), self.high) - self.low) / width for v in self.grid)
        path = "".join(
            f"M{i} 100V{100 - 100 * h:.0f}h1V100" for i, h in enumerate(self.heights()) if h
        )
        shapes = (
            f'<rect class="grid" x="{n * begin:.2f}" y="0" width="{n * (end - begin):.2f}" '
            f'height="100"/><path d="{path}"/>'
        )
        return _figure(self.caption, shapes, n, (f"{self.low:.4g}", f"{self.high:.4g}"))

    def markdown(self) -> str:
        line = sparkline(self.heights())
        return f"{plain(self.caption)}: {self.low:.4g} `{line}` {self.high:.4g}"


@dataclass(frozen=True)
class Details:
    """Blocks that HTML shows when its line is opened."""

    summary: str
    blocks: tuple[Block, ...]

    def html(self) -> str:
        inside = "\n".join(block.html() for block in self.blocks)
        return f"<details><summary>{_breakable(self.summary)}</summary>\n{inside}\n</details>"

    def markdown(self) -> str:
        inside = [block.markdown() for block in self.blocks]
        return "\n\n".join([f"### {plain(self.summary)}", *inside])


def html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one file."""
    body = "\n".join(block.html() for block in blocks)
    return PAGE.substitute(title=escape(title), style=STYLE, body=body)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same in GitHub's Markdown."""
    return "\n\n".join([f"# {plain(title)}", *(block.markdown() for block in blocks)]) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))


def sparkline(heights: Sequence[float]) -> str:
    """A character for each height from 0 to 1; a space for 0."""
    top = len(SPARKS)
    return "".join(SPARKS[min(int(h * top), top - 1)] if h > 0 else " " for h in heights)


def _breakable(text: str) -> str:
    """Escaped; a name, which has letters and no spaces, may break after dots and underscores, and
    a number not in its exponent."""
    text = re.sub(r"(?<=\de)-(?=\d)", "\u2011", text)  # a hyphen that ends no line
    if " " in text or not re.search("[A-Za-z]", text):
        return escape(text)
    return re.sub(r"([._])(?=\w)", r"\1<wbr>", escape(text))


def _figure(caption: str, shapes: str, width: int, ends: tuple[str, str]) -> str:
    """A chart that is `width` by 100 and stretches to the page; text stays outside of it."""
    label = escape(f"{caption}: {ends[0]}, {ends[1]}")
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><svg role="img" aria-label="{label}" '
        f'viewBox="0 0 {max(width, 1)} 100" preserveAspectRatio="none">{shapes}</svg>'
        f'<div class="ends"><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></div>'
        "</figure>"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #59636e; --line: #d1d9e0;
  --shade: #f3f5f8; --bar: #0a5fb4; --grid: #bfe3c7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9198a1;
  --line: #3d444d; --shade: #161b22; --bar: #6cb6ff; --grid: #1f4a2c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
p { max-width: 46rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; color: var(--faint); font-size: .875rem;
  padding-bottom: .25rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
tbody th { font-weight: normal; overflow-wrap: anywhere; min-width: 7rem; }
thead th { border-bottom-width: 2px; vertical-align: bottom; }
.l { text-align: left; overflow-wrap: break-word; }
.r { text-align: right; white-space: nowrap; }
thead .r { white-space: normal; }
figure { margin: 1rem 0; }
svg { display: block; width: 100%; height: 6rem; background: var(--shade);
  border-bottom: 1px solid var(--faint); fill: var(--bar); }
.grid { fill: var(--grid); }
.ends { display: flex; justify-content: space-between; gap: 1rem; color: var(--faint);
  font-size: .8125rem; }
details { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .6rem 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { table { font-size: .78rem; } th, td { padding: .25rem .3rem; }
  tbody th { min-width: 5.5rem; } td.r { white-space: normal; } }
@media print { main { max-width: none; padding: 0; } svg, .grid { print-color-adjust: exact; }
  .wide { overflow: visible; } figure, tr { break-inside: avoid; }
  h2, summary, caption { break-after: avoid; }
  details::details-content { content-visibility: visible; height: auto; } }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body><main>
<h1>$title</h1>
$body
</main></body>
</html>
""")
