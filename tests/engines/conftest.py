"""Which engine tests run where: the two engines' packages do not fit into one environment."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.engines.sglang_pool import Start, start_engines

_LEFT_OUT = pytest.StashKey[int]()

# Some of these import vLLM itself, not only the process that runs it.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_vllm_*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect SGLang's tests where SGLang is not installed; a skip would say that they could not run at all."""
    if importlib.util.find_spec("sglang") is not None:
        return
    left_out = [item for item in items if item.get_closest_marker("sglang")]
    if left_out:
        config.stash[_LEFT_OUT] = len(left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("sglang")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if number := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{number} SGLang tests deselected: SGLang is not in this environment; "
            "`make test` runs them in the environment of scripts/setup sglang"
        )


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts SGLang's pool and linker, without SGLang's scheduler."""
    yield from start_engines(monkeypatch)
