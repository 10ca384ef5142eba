"""lmc serve: check everything that can be checked without the engine, start it, say when it is ready."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lmc.cache.config import CacheConfig
from lmc.cache.observe.stats import describe_tiers
from lmc.errors import ConfigError
from lmc.model import resolve_model
from lmc.serve.engines import check_engine, engine_command
from lmc.serve.process import hold_port, run_engine

_STATS_SECONDS = 30.0  # a busy machine may need as long; where nothing listens, the refusal comes at once


@dataclass(frozen=True)
class ServeOptions:
    model: str
    engine: str = "vllm"
    host: str = "127.0.0.1"
    port: int = 8000
    cache: bool = True
    ready_timeout: float = 900.0
    engine_arguments: Sequence[str] = ()


def serve(options: ServeOptions, config: CacheConfig, say: Callable[[str], None]) -> int:
    """Run until the engine ends; returns the exit code. Raises ConfigError, ModelError, EngineError before anything is started."""
    hold_port(options.host, options.port, "the engine").close()
    metrics_url = None
    with ExitStack() as stack:
        if options.cache:
            _check_folders(config)
        if options.cache and config.metrics.enabled:
            # The engine listens there only after many seconds, in which the port must not become another connection's.
            held = stack.enter_context(hold_port(config.metrics.host, config.metrics.port, "metrics"))
            metrics = config.metrics.model_copy(update={"port": held.getsockname()[1]})
            config = config.model_copy(update={"metrics": metrics})
            metrics_url = f"http://{metrics.host}:{metrics.port}/metrics"
        check_engine(options.engine, config if options.cache else None, options.engine_arguments)
        model = resolve_model(options.model)
        command = engine_command(
            options.engine,
            model,
            options.host,
            options.port,
            config if options.cache else None,
            ["--served-model-name", options.model, *options.engine_arguments],
        )
        url = f"http://{options.host}:{options.port}"

        def on_ready() -> None:
            say(f"ready url={url}/v1 {_describe_cache(options.cache, metrics_url)}")

        return run_engine(command, url, options.ready_timeout, on_ready)


def _check_folders(config: CacheConfig) -> None:
    if config.disk.path is not None:
        try:
            config.disk.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=config.disk.path):
                pass
        except OSError as error:
            raise ConfigError(f"disk.path {config.disk.path} cannot be written: {error.strerror}") from None
    if config.record is not None:
        try:
            config.record.open("ab").close()
        except OSError as error:
            raise ConfigError(f"record {config.record} cannot be written: {error.strerror}") from None


def _describe_cache(wanted: bool, metrics_url: str | None) -> str:
    if not wanted:
        return "cache=off"
    if metrics_url is None:
        return "cache=on metrics=off"
    try:
        with urllib.request.urlopen(metrics_url.removesuffix("/metrics") + "/stats", timeout=_STATS_SECONDS) as answer:
            stats = json.loads(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return "cache=FAILED (its metrics page does not answer; see the log above)"
    return f'metrics={metrics_url} tiers="{describe_tiers(stats)}"'
