"""Programs that tests call and `pip` does not install."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_program(name: str) -> str | None:
    """On PATH, or where scripts/setup-prometheus unpacks Debian's package."""
    fetched = Path(os.environ.get("LMC_VENV", ROOT / ".venvs")) / "prometheus" / "usr" / "bin"
    return shutil.which(name) or shutil.which(name, path=str(fetched))


def program(name: str) -> str:
    """For tests with the marker `program`, which are skipped where there is none."""
    found = find_program(name)
    assert found is not None
    return found
