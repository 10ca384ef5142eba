"""README's table is that of docs/comparison.md, whose every mark has its source."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = re.compile(r" ?\[([vslm]\d+)\]")


def rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == 8]


def test_every_mark_has_a_source_and_every_source_a_mark() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    marks = {mark for row in rows(page) for mark in MARK.findall(row)}
    sources = re.findall(r"^- \*\*([vslm]\d+)\*\* ", page, re.MULTILINE)
    assert marks == set(sources) and len(sources) == len(set(sources)) > 20


def test_the_readme_shows_the_same_table() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text()
    shown = rows((ROOT / "README.md").read_text())
    assert [MARK.sub("", row) for row in rows(page)] == shown
    assert len(shown) > 12
