"""Fixtures that several rooms share, and the rule that CI skips nothing but tests of a GPU or of programs that the machine lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.engines.tiny_model import make_tiny_llama
from tests.programs import find_program

if TYPE_CHECKING:
    from tests.cache.instance import Instance
    from tests.engines.vllm_driver import VllmDriver


def pytest_addoption(parser: pytest.Parser) -> None:
    """A machine with a GPU may have pytest and none of its plugins; pyproject.toml's settings for these are then read and ignored."""
    for name in ("asyncio_mode", "timeout"):
        with suppress(ValueError):  # the plugin has named it
            parser.addini(name, "of a plugin that is not installed", default="")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` reads only files with such tests, and folders that have some: the others import what that machine doesn't have."""
    if config.option.markexpr != "gpu":
        return None
    if collection_path.is_dir():
        tests = list(collection_path.rglob("test_*.py"))
    else:
        tests = [collection_path] if collection_path.name.startswith("test_") else []
        if not tests:
            return None
    return not any("pytest.mark.gpu" in test.read_text() for test in tests) or None


# A slow machine is no failure: no example has a time limit of its own.
hypothesis.settings.register_profile("lmc", deadline=None)
hypothesis.settings.load_profile("lmc")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """The folder of a disk tier."""
    return tmp_path / "disk"


@pytest.fixture
def instances() -> Iterator[list[Instance]]:
    """What a test puts in is closed after it."""
    opened: list[Instance] = []
    yield opened
    for instance in opened:
        instance.close()


@pytest.fixture(scope="session")
def plain(tiny_llama: Path) -> Iterator[VllmDriver]:
    """The reference: vLLM without a connector and without prefix caching."""
    from tests.engines.vllm_driver import VllmDriver

    with VllmDriver(tiny_llama, settings=None) as engine:
        yield engine


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """With CI=true, a module that is skipped as a whole is a failed one."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where no module may be: {report.longrepr}"
    return report


_LACKS_PROGRAM = pytest.StashKey[bool]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("program"):
        if missing := [name for name in mark.args if find_program(name) is None]:
            item.stash[_LACKS_PROGRAM] = True
            pytest.skip(f"this machine lacks {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With CI=true, a skipped test is a failed one, unless it needs a GPU or the machine lacks its program; the summary names those."""
    report = yield
    if (
        os.environ.get("CI") == "true"
        and report.skipped
        and not hasattr(report, "wasxfail")
        and not item.get_closest_marker("gpu")
        and not item.stash.get(_LACKS_PROGRAM, False)
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where only tests of a GPU or a program may be: {report.longrepr}"
    return report
