"""Where the files that come with lmc are: workloads and dashboards. A wheel holds them in the package, a checkout beside it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder with these files."""
    inside = _PACKAGE / "shipped_files" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
