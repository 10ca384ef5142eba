from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from lmc import report
from lmc.errors import ConfigError
from lmc.report import Column, Figure, Report, Section, Table, Tile

TABLE = Table(
    "TTFT <by> arm",
    [Column("arm"), Column("requests"), Column("TTFT p50", "ms", 1), Column("ok")],
    [["none | a", 12_031, 6400.256, True], ["lmc", 12, None, False]],
    note="12 requests each",
)


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_csv_keeps_every_digit_and_leaves_missing_cells_empty() -> None:
    rows = list(csv.reader(io.StringIO(report.table_csv(TABLE))))
    assert rows[0] == ["arm", "requests", "TTFT p50 (ms)", "ok"]
    assert rows[1] == ["none | a", "12031", "6400.256", "True"]
    assert rows[2][2] == ""


def test_markdown_rounds_and_escapes_the_column_separator() -> None:
    text = report.table_markdown(TABLE)
    assert "| none \\| a | 12,031 | 6,400.3 | yes |" in text
    assert "| lmc | 12 | – | no |" in text
    assert "| --- | ---: | ---: | --- |" in text


def test_terminal_table_shows_units_and_does_not_read_markup() -> None:
    console = Console(file=io.StringIO(), width=120)
    report.print_table(Table("t", [Column("name", "tokens/s")], [["[red]x[/red]"]]), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "name (tokens/s)" in shown
    assert "[red]x[/red]" in shown


def test_html_is_one_well_formed_page_without_outside_references() -> None:
    picture, (axis,) = report.new_axes()
    axis.plot([1, 2], [3, 4])
    figure = report.to_figure(picture, "TTFT", "per arm")
    page = report.report_html(
        Report("A & B", "one\n\ntwo", [Section("Arms", "text", [TABLE, figure])], {"machine": "<2 cores>"})
    )
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.sources) == 1
    assert checker.sources[0].startswith("data:image/png;base64,")
    assert "A &amp; B" in page and "&lt;2 cores&gt;" in page and "TTFT &lt;by&gt; arm" in page
    assert not re.search(r"https?://", page)


def test_figure_is_a_png_and_the_same_bytes_each_time() -> None:
    def draw() -> Figure:
        picture, (axis,) = report.new_axes()
        axis.plot([1, 2], [3, 4])
        return report.to_figure(picture, "t")

    assert draw().png.startswith(b"\x89PNG")
    assert draw().png == draw().png


def test_markdown_report_names_sections_and_metadata() -> None:
    text = report.report_markdown(Report("Title", "sum", [Section("S", "body", [TABLE])], {"engine": "vllm"}))
    assert text.startswith("# Title\n\nsum\n\n## S\n\nbody")
    assert text.endswith("- engine: vllm\n")


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells, not 1"):
        Table("t", [Column("a")], [[1, 2]])


def test_json_keeps_every_digit() -> None:
    rows = [list(row) for row in TABLE.rows]
    assert orjson.loads(report.to_json(rows)) == json.loads(json.dumps(rows)) == rows


def test_write_file_replaces_the_whole_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    report.write_file(path, "one")
    report.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    for place in (tmp_path, path / "below.txt"):
        with pytest.raises(ConfigError, match=f"^cannot write {re.escape(str(place))}: .*; choose another place$"):
            report.write_file(place, "a folder is not a file, nor a file a folder")
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["a.txt", "new"]


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, lmc.report; sys.exit('matplotlib' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_are_never_broken_on_a_narrow_terminal() -> None:
    columns = [Column("group"), *(Column(f"hits of some long kind {index}", "% of its tokens") for index in range(6))]
    rows: list[list[report.Cell]] = [["(none)", *(40_550_180 + index for index in range(6))]]
    for width in (95, 80, 40):
        written = io.StringIO()
        report.print_table(Table("t", columns, rows), Console(file=written, width=width, force_terminal=True))
        text = written.getvalue()
        assert all(f"{40_550_180 + index:,}" in text for index in range(6))


def test_the_first_screen_has_tiles_and_a_picture_before_the_contents() -> None:
    picture, (axis,) = report.new_axes()
    axis.plot([1, 2], [3, 4])
    figure = report.to_figure(picture, "Main picture")
    page = Report("R", "`x` gained", [Section(str(n)) for n in range(4)], tiles=[Tile("61%", "hit")], picture=figure)
    text = report.report_html(page)
    assert text.index("<b>61%</b>hit") < text.index("data:image/png") < text.index("<nav")
    assert "<code>x</code> gained" in text
    assert report.report_markdown(page).startswith(
        "# R\n\n`x` gained\n\n- **61%** hit\n\n![Main picture](main-picture.png)"
    )


def test_a_rounded_number_shows_its_digits_to_whoever_points_at_it() -> None:
    page = report.report_html(Report("R", "", [Section("s", "", [TABLE])]))
    assert 'title="6400.256">6,400.3</td>' in page and 'data-value="12031"' in page
