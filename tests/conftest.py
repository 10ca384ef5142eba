"""Fixtures that several rooms share, and the rule that CI skips nothing but GPU tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.cache.instance import Instance
from tests.engines.tiny_model import make_tiny_llama
from tests.engines.vllm_driver import VllmDriver

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
    with VllmDriver(tiny_llama, settings=None) as engine:
        yield engine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With CI=true, a skipped test is a failed one, unless it needs a GPU."""
    report = yield
    if (
        os.environ.get("CI") == "true"
        and report.skipped
        and not hasattr(report, "wasxfail")
        and not item.get_closest_marker("gpu")
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where only GPU tests may be: {report.longrepr}"
    return report
