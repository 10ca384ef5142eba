from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sim.trace_files import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_lines(*lines: Any, name: str = "trace.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
        return path

    return write_lines
