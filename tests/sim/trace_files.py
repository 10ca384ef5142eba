"""What readers say about bad trace files; the fixture `write` of conftest.py writes small ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmc.errors import TraceError
from lmc.sim.formats import read_trace
from lmc.sim.formats.base import ReadOptions

Write = Callable[..., Path]


def refused(path: Path, options: ReadOptions | None = None) -> str:
    with pytest.raises(TraceError) as caught:
        read_trace(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message
