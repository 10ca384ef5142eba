"""A bench report in a real browser: light, dark, on a phone, on paper; and sorted by a click.

It needs Debian's packages chromium and poppler-utils. Where they are not, these tests are skipped.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lmc.bench.records import read_records, read_results
from lmc.bench.render import build_report
from lmc.report import report_html

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ROOT / "reports" / "quickstart"
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report_html(build_report(read_results(folder), read_records(folder))))
    return file


def chromium(page: Path, *options: object) -> str:
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [*command, profile, *map(str, options), f"file://{page}"], check=True, capture_output=True, text=True
    )
    return done.stdout


def corner(picture: Path) -> float:
    """Brightness of the page's background, from 0 to 1."""
    from matplotlib.image import imread

    return float(imread(picture)[2, 2, :3].mean())


@pytest.mark.program("chromium")
def test_it_is_light_or_dark_as_the_reader_wishes(page: Path, tmp_path: Path) -> None:
    size = "--window-size=1200,900"
    chromium(page, size, f"--screenshot={tmp_path / 'light.png'}")
    chromium(page, size, "--blink-settings=preferredColorScheme=0", f"--screenshot={tmp_path / 'dark.png'}")
    assert corner(tmp_path / "light.png") > 0.9 and corner(tmp_path / "dark.png") < 0.2


@pytest.mark.program("chromium")
def test_on_a_phone_only_tables_are_scrolled_sideways(page: Path) -> None:
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    narrow = page.with_name("narrow.html")
    narrow.write_text(page.read_text().replace("</body>", probe))
    [(width, window)] = re.findall(
        r"<title>(\d+) of (\d+)</title>", chromium(narrow, "--window-size=500,900", "--dump-dom")
    )
    assert int(width) <= int(window)


@pytest.mark.program("chromium")
def test_a_click_on_a_heading_sorts(page: Path) -> None:
    click = """<script>
    const head = [...document.querySelectorAll("th")].find(th => th.textContent.startsWith("TTFT p50"));
    const rows = () => [...head.closest("table").tBodies[0].rows].map(row => row.cells[0].textContent).join(" ");
    const before = rows(); head.querySelector("button").click(); const up = rows();
    head.querySelector("button").click(); document.title = [before, up, rows()].join("; ");
    </script></body>"""
    clicked = page.with_name("clicked.html")
    clicked.write_text(page.read_text().replace("</body>", click))
    [title] = re.findall("<title>(.*)</title>", chromium(clicked, "--dump-dom"))
    before, up, down = title.split("; ")
    assert before == "none engine lmc lmc-restarted"
    assert up == "lmc-restarted engine lmc none" and down == " ".join(reversed(up.split()))


@pytest.mark.program("chromium", "pdftotext")
def test_on_paper_every_column_is_there(page: Path, tmp_path: Path) -> None:
    chromium(page, f"--print-to-pdf={tmp_path / 'report.pdf'}")
    subprocess.run(["pdftotext", "-layout", tmp_path / "report.pdf", tmp_path / "report.txt"], check=True)
    text = (tmp_path / "report.txt").read_text()
    for row in ("none", "engine", "lmc", "lmc-restarted"):
        cells = re.search(rf"^ *{row} +yes +36 of 36 (.*)$", text, re.MULTILINE)
        assert cells is not None and len(cells[1].split()) == 9, row
