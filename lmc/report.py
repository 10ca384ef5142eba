"""Tables and pictures from results: terminal, CSV, JSON, Markdown and one self-contained HTML page. sim and bench share it.

It knows nothing of caches: callers bring titles, units and numbers. CSV and JSON keep every digit; the terminal, Markdown and
HTML round as the column says. Matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from lmc.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Cell = str | int | float | None
COLORS = ("#8c8c8c", "#d98324", "#1f6fb2", "#3a8f5b", "#9b4f96", "#b5443c", "#5f6b2f", "#2b2b2b")
MISSING = "–"
_BOUNDLESS = 100_000  # columns of a terminal on which nothing wraps
PLAIN_WIDTH = 160  # characters of a table that goes to a file or a pipe


@dataclass(frozen=True)
class Column:
    """One column: `decimals` rounds floats for readers; a number column is aligned right."""

    name: str
    unit: str = ""
    decimals: int = 2

    @property
    def heading(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: a row has {len(row)} cells, not {len(self.columns)}")


@dataclass(frozen=True)
class Figure:
    title: str
    png: bytes
    caption: str = ""

    @property
    def file_name(self) -> str:
        """Where write_pictures puts it: "TTFT per arm" is ttft-per-arm.png."""
        return "-".join(re.findall(r"[a-z0-9]+", self.title.lower())) + ".png"


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    items: Sequence[Table | Figure] = ()


@dataclass(frozen=True)
class Tile:
    """One number of the first screen, and what it is."""

    value: str
    meaning: str


@dataclass(frozen=True)
class Report:
    """`summary`, `tiles` and `picture` are the first screen; `metadata` says when, where and with what the numbers were made."""

    title: str
    summary: str
    sections: Sequence[Section]
    metadata: Mapping[str, str] = field(default_factory=dict)
    tiles: Sequence[Tile] = ()
    picture: Figure | None = None


def format_cell(cell: Cell, column: Column) -> str:
    if cell is None:
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:,.{column.decimals}f}"
    return cell


def print_table(table: Table, console: Console | None = None) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table as RichTable
    from rich.text import Text

    def laid_out(narrow: bool) -> RichTable:
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
        cells = [
            [format_cell(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows
        ]
        for index, column in enumerate(table.columns):
            numeric = _is_numeric(table, index)
            heading = column.heading
            if narrow and numeric:  # a heading may break between words, a number never
                widest = max(map(len, [*heading.split(), *(row[index] for row in cells)]))
                heading = "\n".join(textwrap.wrap(heading, widest))
            shown.add_column(
                Text(heading), justify="right" if numeric else "left", overflow="fold", no_wrap=narrow and numeric
            )
        for row in cells:
            shown.add_row(*map(Text, row))
        return shown

    console = console or RichConsole()
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    shown = laid_out(narrow=False)
    boundless = console.options.update(width=_BOUNDLESS)
    if console.measure(shown, options=boundless).maximum > console.width:
        shown = laid_out(narrow=True)
        console.width = max(console.width, console.measure(shown, options=boundless).minimum)
    console.print(shown)


def table_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.heading for column in table.columns])
    writer.writerows([["" if cell is None else cell for cell in row] for row in table.rows])
    return out.getvalue()


def table_markdown(table: Table) -> str:
    marks = ["---:" if _is_numeric(table, index) else "---" for index in range(len(table.columns))]
    lines = [[column.heading for column in table.columns], marks]
    lines += [
        [format_cell(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows
    ]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"**{table.title}**\n\n{body}\n" + (f"\n{table.note}\n" if table.note else "")


def report_markdown(report: Report) -> str:
    """Text and tables, with links to the files of write_pictures."""
    parts = [f"# {report.title}", report.summary]
    parts += ["\n".join(f"- **{tile.value}** {tile.meaning}" for tile in report.tiles)]
    if report.picture is not None:
        parts.append(f"![{report.picture.title}]({report.picture.file_name})\n\n{report.picture.caption}")
    for section in report.sections:
        parts += [f"## {section.title}", section.text]
        parts += [
            table_markdown(item) if isinstance(item, Table) else f"![{item.title}]({item.file_name})\n\n{item.caption}"
            for item in section.items
        ]
    parts += [f"- {name}: {value}" for name, value in report.metadata.items()]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def write_pictures(folder: Path, report: Report) -> None:
    """Each picture of the report as a file of its own."""
    if report.picture is not None:
        write_file(folder / report.picture.file_name, report.picture.png)
    for section in report.sections:
        for item in section.items:
            if isinstance(item, Figure):
                write_file(folder / item.file_name, item.png)


def report_html(report: Report) -> str:
    body = [f"<h1>{html.escape(report.title)}</h1>", *_paragraphs(report.summary, "lead")]
    if report.tiles:
        tiles = [f"<div><b>{html.escape(t.value)}</b>{html.escape(t.meaning)}</div>" for t in report.tiles]
        body.append(f"<div class='tiles'>{''.join(tiles)}</div>")
    if report.picture is not None:
        body.append(_figure_html(report.picture))
    if len(report.sections) > 3:
        links = [f'<a href="#{_anchor(section.title)}">{html.escape(section.title)}</a>' for section in report.sections]
        body.append(f"<nav aria-label='Contents'>{' '.join(links)}</nav>")
    for section in report.sections:
        heading = f'<h2 id="{_anchor(section.title)}">{html.escape(section.title)}</h2>'
        body += [f"<section>{heading}", *_paragraphs(section.text)]
        body += [_table_html(item) if isinstance(item, Table) else _figure_html(item) for item in section.items]
        body.append("</section>")
    if report.metadata:
        body.append("<section><h2>How it was made</h2><dl>")
        body += [
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in report.metadata.items()
        ]
        body.append("</dl></section>")
    return _PAGE.format(title=html.escape(report.title), style=_STYLE, body="\n".join(body), script=_SCRIPT)


def to_json(value: Any) -> bytes:
    """Indented JSON of dataclasses, mappings and numbers. `Any`: whatever orjson can write."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(value, option=options)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: temporary file, then rename. Creates the folder. Raises ConfigError where that is not allowed."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place") from None


def new_axes(columns: int = 1, width: float = 7.0, height: float = 3.6) -> tuple[Any, list[Any]]:
    """An empty matplotlib picture and its axes, in the house style. `Any`: matplotlib ships no types we can name here."""
    from matplotlib.figure import Figure as Canvas

    picture = Canvas(figsize=(width * columns, height), layout="constrained")
    axes = [picture.add_subplot(1, columns, index + 1) for index in range(columns)]
    for axis in axes:
        axis.grid(True, color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=COLORS)
    return picture, axes


def to_figure(picture: Any, title: str, caption: str = "") -> Figure:
    """The PNG of a picture made with new_axes. `Any` as there."""
    out = io.BytesIO()
    picture.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return Figure(title, out.getvalue(), caption)


def _is_numeric(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.rows if row[index] is not None]
    return bool(cells) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)


def _anchor(title: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", title.lower()))


def _paragraphs(text: str, css_class: str = "") -> list[str]:
    mark = f' class="{css_class}"' if css_class else ""
    return [f"<p{mark}>{_inline(part.strip())}</p>" for part in text.split("\n\n") if part.strip()]


def _inline(text: str) -> str:
    """Escaped, with `code` in backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _table_html(table: Table) -> str:
    classes = [' class="n"' if _is_numeric(table, index) else "" for index in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{mark}><button>{html.escape(column.name)}'
        f"{f'<small>{html.escape(column.unit)}</small>' if column.unit else ''}</button></th>"
        for column, mark in zip(table.columns, classes, strict=True)
    )
    rows = [
        "<tr>"
        + "".join(
            f"<td{mark}{_exact(cell)}>{html.escape(format_cell(cell, column))}</td>"
            for cell, column, mark in zip(row, table.columns, classes, strict=True)
        )
        + "</tr>"
        for row in table.rows
    ]
    note = f"<p class='note'>{_inline(table.note)}</p>" if table.note else ""
    return (
        f"<div class='table'><table><caption>{html.escape(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _exact(cell: Cell) -> str:
    """The number as it is, for sorting and for whoever points at it."""
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return ""
    return f' data-value="{cell!r}" title="{cell!r}"' if isinstance(cell, float) else f' data-value="{cell}"'


def _figure_html(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    title = html.escape(figure.title)
    caption = f"<strong>{title}.</strong> {html.escape(figure.caption)}"
    return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d1d1f; background: #fff;
       max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid #ddd; }
p { max-width: 46rem; margin: .5rem 0; } p.lead { font-size: 1.08rem; } p.note { font-size: .86rem; color: #555; }
.table { overflow-x: auto; margin: 1.1rem 0 .3rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: bottom; border-bottom: 1px solid #e6e6e6; }
th { font-weight: 600; border-bottom-color: #999; } th small { display: block; font-weight: 400; color: #666; }
.n { text-align: right; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; text-align: inherit; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.1rem 0; }
.tiles div { border: 1px solid #ddd; border-radius: 6px; padding: .5rem .9rem; font-size: .86rem; color: #555; flex: 1 1 9rem; }
.tiles b { display: block; font-size: 1.35rem; font-weight: 600; color: #1d1d1f; }
figure { margin: 1.4rem 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .88rem; color: #444; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .88rem; }
dt { color: #666; } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
nav { font-size: .88rem; margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; } a { color: #1f6fb2; }
@media (prefers-color-scheme: dark) {
  body { color: #e8e8ea; background: #17181a; } a { color: #7db7ec; }
  p.note, th small, figcaption, dt, .tiles div { color: #a9a9ad; } .tiles b { color: #e8e8ea; } .tiles div { border-color: #3a3b3e; }
  h2 { border-top-color: #3a3b3e; }
  th, td { border-bottom-color: #313236; } th { border-bottom-color: #77787c; } img { background: #fff; border-radius: 4px; }
}
@media print {
  :root { color-scheme: light; } body { color: #000; background: #fff; max-width: none; margin: 0; padding: 0; font-size: 11px; }
  nav { display: none; } .table { overflow: visible; } table { font-size: 8.5px; width: 100%; } th, td { padding-right: .35rem; }
  figure, table { break-inside: avoid; } img { max-height: 9cm; }
}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
<script>{script}</script>
</body></html>
"""
_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.querySelector("button").onclick = () => {
  const body = head.closest("table").tBodies[0], at = head.cellIndex;
  const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = row => {
    const cell = row.cells[at];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const compare = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
  body.append(...[...body.rows].sort((a, b) => order * compare(key(a), key(b))));
};
"""
