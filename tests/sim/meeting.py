"""A job that ends only if another one runs at the same time; workers import it by its name."""

from __future__ import annotations

import time
from pathlib import Path


def meet(job: tuple[str, str, str]) -> str:
    """(folder, own name, name of the other)."""
    folder, own, other = job
    (Path(folder) / own).touch()
    while not (Path(folder) / other).exists():
        time.sleep(0.01)
    return f"{own} met {other}"
