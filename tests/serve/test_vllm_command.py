"""vLLM's command line: what lmc adds, and what it leaves to the user. No engine is started."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.settings import load_settings
from lmc.errors import ConfigError
from lmc.memory import Memory
from lmc.serve import engines
from lmc.serve.command import EngineCommand

MODEL = Path("/models/one")
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=[True, False])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(engines, "_on_cpu", lambda: request.param)
    return bool(request.param)


def config(**settings: object) -> CacheConfig:
    return load_settings(flags={key.replace("__", "."): value for key, value in settings.items()}).config


def command(*extra: str, cache: CacheConfig | None = None) -> EngineCommand:
    return engines.engine_command("vllm", MODEL, "127.0.0.1", 8000, cache, list(extra))


def option(built: EngineCommand, name: str) -> str | None:
    return built.arguments[built.arguments.index(name) + 1] if name in built.arguments else None


def test_vllm_gets_the_time_that_writes_are_promised(on_cpu: bool) -> None:
    built = command(cache=config())
    assert option(built, "--shutdown-timeout") == "15"
    assert built.stop_seconds == 25
    assert option(command(cache=config(close_timeout="29.5s")), "--shutdown-timeout") == "35"
    own = command("--shutdown-timeout", "120", cache=config())
    assert own.arguments.count("--shutdown-timeout") == 1 and own.stop_seconds == 130
    assert option(command(), "--shutdown-timeout") is None


def test_a_vllm_without_the_option_is_not_given_it(
    on_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text('add("--port")')
    (tmp_path / "vllm" / "__init__.py").write_text("")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)]),
    )
    assert option(command(cache=config()), "--shutdown-timeout") is None


@pytest.mark.parametrize(
    ("free", "argument", "variable"),
    [
        (1 * GIB, str(256 << 20), None),
        (int(2.5 * GIB), str(int(int(2.5 * GIB) * 0.15)), None),
        (int(2.3 * GIB), str(int(2.3 * GIB) - 2 * GIB), None),
        (16 * GIB, None, "2"),
        (400 * GIB, None, "4"),
    ],
)
def test_vllms_own_cache_is_a_share_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, argument: str | None, variable: str | None
) -> None:
    monkeypatch.setattr(engines, "_on_cpu", lambda: True)
    monkeypatch.setattr(engines, "available_memory", lambda: Memory(free, free, "memory.max"))
    built = command()
    assert option(built, "--kv-cache-memory-bytes") == argument
    assert built.environment.get("VLLM_CPU_KVCACHE_SPACE") == variable
    own = command("--kv-cache-memory-bytes", "5")
    assert own.arguments.count("--kv-cache-memory-bytes") == 1
    assert "VLLM_CPU_KVCACHE_SPACE" not in own.environment


def test_each_engine_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_on_cpu", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 1, 2})
    for extra, bound in (([], "1,2,3"), (["-dp", "2"], "1,3|2"), (["-dp", "4"], "1|2|3|1,2,3")):
        assert command(*extra).environment["VLLM_CPU_OMP_THREADS_BIND"] == bound
    assert "VLLM_CPU_OMP_THREADS_BIND" not in command("--tensor-parallel-size", "2").environment


def test_an_engine_without_an_api_has_no_health(on_cpu: bool) -> None:
    assert command("--headless").health_path is None
    assert command().health_path == "/health"


@pytest.mark.parametrize("option", ["--uds", "--grpc", "--kv-transfer-config"])
def test_what_lmc_cannot_wait_for_is_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=option):
        engines.check_engine("vllm", config(), [option])


@pytest.mark.parametrize(
    ("engine", "extra", "ranks"),
    [
        ("vllm", [], [0]),
        ("vllm", ["--data-parallel-size", "4"], [0, 1, 2, 3]),
        ("vllm", ["-dp=8", "-dpl", "2", "--data-parallel-start-rank", "4"], [4, 5]),
        ("vllm", ["-dp", "8", "--data-parallel-rank", "3"], [3]),
        ("sglang", [], [0]),
        ("sglang", ["--dp", "2"], [0, 1]),
        ("sglang", ["--attn-dp-size", "8", "--nnodes", "2", "--node-rank", "1"], [4, 5, 6, 7]),
        ("sglang", ["--nnodes", "2", "--node-rank", "1"], [0]),
    ],
)
def test_which_engines_are_on_this_node(engine: str, extra: list[str], ranks: list[int]) -> None:
    assert list(engines.engines_here(engine, extra)) == ranks


@pytest.mark.parametrize(
    "extra",
    [
        ["--decode-context-parallel-size", "2"],
        ["-dcp", "2"],
        ["--prefill-context-parallel-size=2"],
        ["-pcp", "2"],
        ["--pipeline-parallel-size", "4"],
        ["-pp=4"],
    ],
    ids=str,
)
def test_what_shares_out_layers_or_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, extra: list[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"parallel-size \d is not supported by the cache; use --no-cache"):
        engines.check_engine("vllm", CacheConfig(), extra)
    engines.check_engine("vllm", None, extra)
    engines.check_engine("vllm", CacheConfig(), ["-dcp", "1", "--tensor-parallel-size", "2"])
