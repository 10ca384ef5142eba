"""docs/architecture.md names every module of lmc, room by room, and no module that does not exist.

When you add, move or rename a module, change the line of its room under "## Layout".
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^- `(lmc/[\w/]*)`: (?:.*?) Modules: (.+)\.$")


def named(page: str) -> dict[str, set[str]]:
    """Modules by room, as the page's layout lists them. Raises ValueError for a line that cannot be read."""
    layout = page.split("\n## Layout\n")[1].split("\n## ")[0]
    rooms: dict[str, set[str]] = {}
    for line in layout.splitlines():
        if not line.startswith("- `lmc/"):
            continue
        found = LINE.match(line)
        if found is None or found[1] in rooms:
            raise ValueError(f"not of the form - `lmc/ROOM/`: What it does. Modules: `a`, `b`. or twice: {line}")
        modules = re.findall(r"`(\w+)`", found[2])
        if len(set(modules)) != len(modules):
            raise ValueError(f"a module is named twice: {line}")
        rooms[found[1]] = set(modules)
    return rooms


def tree(root: Path) -> dict[str, set[str]]:
    """Modules by room, as they are in the folder."""
    rooms: dict[str, set[str]] = {}
    for path in (root / "lmc").rglob("*.py"):
        if path.stem != "__init__":
            rooms.setdefault(f"{path.parent.relative_to(root).as_posix()}/", set()).add(path.stem)
    return rooms


def differences(page: dict[str, set[str]], folder: dict[str, set[str]]) -> list[str]:
    found = []
    for room in sorted(page.keys() | folder.keys()):
        there, here = page.get(room, set()), folder.get(room, set())
        found += [f"{room}{module}.py is not named" for module in sorted(here - there)]
        found += [f"{room}{module}.py does not exist" for module in sorted(there - here)]
    return found


def test_the_page_names_every_module_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert differences(named(page), tree(ROOT)) == []


def test_every_room_has_a_line() -> None:
    assert named((ROOT / "docs" / "architecture.md").read_text()).keys() == tree(ROOT).keys()


PAGE = "# x\n## Layout\n\n- `lmc/`: Loose modules. Modules: `errors`.\n- `lmc/sim/`: It does `x`. Modules: `a`, `b`.\n\n## y\n"


def test_an_unnamed_module_and_a_missing_one_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "lmc" / "sim").mkdir(parents=True)
    for name in ("errors.py", "units.py", "__init__.py", "sim/a.py", "sim/__init__.py"):
        (tmp_path / "lmc" / name).touch()
    assert differences(named(PAGE), tree(tmp_path)) == ["lmc/units.py is not named", "lmc/sim/b.py does not exist"]


@pytest.mark.parametrize(
    "line",
    ["- `lmc/sim/`: It does x: `a`.", "- `lmc/`: Again. Modules: `errors`.", "- `lmc/x/`: X. Modules: `a`, `a`."],
)
def test_a_line_that_cannot_be_read_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match="twice"):
        named(PAGE.replace("\n\n## y", f"\n{line}\n\n## y"))
