"""Builds SGLang's command line and environment. This module does not import SGLang."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lmc.arguments import count, given, value
from lmc.cache.config import CacheConfig
from lmc.errors import ConfigError, EngineError
from lmc.memory import available_memory
from lmc.serve.command import EngineCommand, open_settings, secrets

PAGE_TOKENS = 64  # a page is a chunk of lmc; SGLang's own default of 1 would make as many chunks as tokens
CPU_FOLDER = Path(__file__).parent / "sglang_cpu"
_CPU_KV_SHARE = 0.15  # of free memory, for SGLang's own KV pool on CPU; left alone, it takes 72 % of all memory
_CPU_KV_BYTES = (1 << 30, 4 << 30)
_CPU_KV_TOKENS = 32_768  # if the model's configuration does not say what a token takes
_OURS = (
    "--enable-unified-cache-external-linker",
    "--unified-cache-external-linker-backend",
    "--unified-cache-external-linker-config",
)
_REPLICAS = ("--data-parallel-size", "--dp-size", "--dp")
_EXCLUDED = (
    "--enable-hierarchical-cache",
    "--hicache-storage-backend",
    "--radix-cache-backend",
    "--enable-lmcache",
    "--disable-radix-cache",
)


def check_sglang(config: CacheConfig | None, extra: Sequence[str]) -> None:
    """Check SGLang's arguments.

    Raises EngineError when SGLang is not installed, and ConfigError when an argument contradicts the cache's settings.
    """
    if importlib.util.find_spec("sglang") is None:
        raise EngineError(
            "SGLang is not installed here; pip install 'lmc-kv[sglang]' on a GPU machine, or run scripts/setup sglang on a CPU-only one"
        )
    if config is None:
        return
    for option in (*_OURS, *_EXCLUDED):
        if given(option, extra):
            reason = "is set by lmc" if option in _OURS else "excludes SGLang's external cache, which lmc uses"
            raise ConfigError(f"{option} {reason}; use --no-cache to run SGLang with it")
    page = value("--page-size", extra)
    if "1" in (page, str(config.chunk_tokens)):
        raise ConfigError(
            "on SGLang a chunk is a page: --page-size 1 makes a chunk of every token; use 64, lmc's default"
        )
    if page is not None and config.chunk_tokens is not None and page != str(config.chunk_tokens):
        raise ConfigError(
            f"on SGLang a chunk is a page: chunk_tokens {config.chunk_tokens} does not go with --page-size {page}"
        )


def sglang_command(
    model: Path, host: str, port: int, config: CacheConfig | None, extra: Sequence[str]
) -> EngineCommand:
    """Return the command that runs SGLang on host:port. With config None SGLang runs without the cache."""
    arguments = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    arguments += ["--host", host, "--port", str(port), "--enable-cache-report", "--enable-metrics"]
    if not given("--page-size", extra):
        page = config.chunk_tokens if config is not None and config.chunk_tokens is not None else PAGE_TOKENS
        arguments += ["--page-size", str(page)]
    environment: dict[str, str] = {}
    if on_cpu(extra):
        arguments += _cpu_arguments(model, extra)
        environment = cpu_environment()
    if config is not None:
        arguments += ["--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic"]
        arguments += ["--unified-cache-external-linker-config", json.dumps(linker_config(config))]
    return EngineCommand((*arguments, *extra), environment | secrets(config))


def sglang_engines(extra: Sequence[str]) -> range:
    """Return the numbers of the data-parallel ranks on this machine, whether they are replicas or attention groups."""
    replicas, groups = (count(names, extra) or 1 for names in (_REPLICAS, ("--attn-dp-size",)))
    nodes = count(("--nnodes",), extra) or 1
    engines = max(1, max(replicas, groups) // nodes)
    first = engines * (count(("--node-rank",), extra) or 0) if max(replicas, groups) > 1 else 0
    return range(first, first + engines)


def linker_config(config: CacheConfig) -> dict[str, object]:
    """Return SGLang's --unified-cache-external-linker-config for lmc's linker with these settings. Secrets are left out."""
    return {
        "linker": "LmcLinker",
        "linker_module_path": "lmc.cache.connectors.sglang",
        "linker_extra_config": {"settings": open_settings(config)},
    }


def cpu_environment() -> dict[str, str]:
    """Return the environment that SGLang needs on a machine without a GPU: its CPU mode, and the modules of lmc/serve/sglang_cpu."""
    paths = [str(CPU_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join(paths)}


def on_cpu(extra: Sequence[str]) -> bool:
    device = value("--device", extra)
    if device is not None:
        return device == "cpu"
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _cpu_arguments(model: Path, extra: Sequence[str]) -> list[str]:
    chosen = {
        "--device": "cpu",
        "--attention-backend": "torch_native",  # the default needs compiled kernels with AMX
        "--dtype": "float32",  # without them, 16-bit floats are slower
    }
    if not given("--mem-fraction-static", extra):
        chosen["--max-total-tokens"] = str(_cpu_pool_tokens(model))
    idle = ["--sleep-on-idle"]  # else its scheduler takes a core from the model even when there is nothing to do
    return idle + [part for option, choice in chosen.items() if not given(option, extra) for part in (option, choice)]


def _cpu_pool_tokens(model: Path) -> int:
    """Return the size of SGLang's own pool in tokens: a share of the free memory, at 4 bytes per number."""
    try:
        shape = json.loads((model / "config.json").read_text())
        heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
        size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        token_bytes = 2 * shape["num_hidden_layers"] * heads * size * 4
    except (OSError, KeyError, ValueError, TypeError):
        return _CPU_KV_TOKENS
    low, high = _CPU_KV_BYTES
    share = int(available_memory().free * _CPU_KV_SHARE)
    return max(1, int(min(max(share, low), high) // token_bytes))
