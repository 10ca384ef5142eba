"""`lmc serve`: checks everything that can be checked without the engine, starts the engine, and prints a line when it is ready."""

from __future__ import annotations

import json
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lmc.arguments import value
from lmc.cache.config import CacheConfig
from lmc.cache.observe.stats import describe_tiers
from lmc.cache.share import record_of
from lmc.cache.tiers.check import check_tiers
from lmc.cache.tiers.room import usable_disk
from lmc.errors import ConfigError
from lmc.memory import available_memory
from lmc.model import resolve_model
from lmc.report import write_file
from lmc.serve.engines import check_engine, engine_command, engines_here
from lmc.serve.ports import claim_port, for_url, hold_port, hold_ports, reachable
from lmc.serve.process import run_engine
from lmc.units import format_size

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
    ready_file: Path | None = None  # gets the ready line, for programs that wait for it


def serve(options: ServeOptions, config: CacheConfig, say: Callable[[str], None]) -> int:
    """Run the engine until it ends, and return its exit code. Raises ConfigError, ModelError or EngineError before anything is started."""
    host = value("--host", options.engine_arguments) or options.host  # what the user gave the engine wins there too
    port = _port(options)
    with ExitStack() as stack:
        claim_port(host, port, "the engine", stack)
        hold_port(host, port, "the engine").close()
        if options.ready_file is not None:
            _remove(options.ready_file)  # an earlier engine's
            stack.callback(options.ready_file.unlink, missing_ok=True)
        cached = config if options.cache else None
        if cached is not None and cached.node is None:  # else these are the node's
            _check_memory(cached)
            check_tiers(cached)
        check_engine(options.engine, cached, options.engine_arguments)
        engines = engines_here(options.engine, options.engine_arguments)
        if cached is not None:
            if cached.node is None:  # else the disk is the node's
                cached = usable_disk(cached)
            _check_records(cached, engines)
            if cached.metrics.enabled:
                cached = _with_metrics_port(cached, engines, stack)
        command = engine_command(
            options.engine,
            resolve_model(options.model),
            host,
            port,
            cached,
            ["--served-model-name", options.model, *options.engine_arguments],
        )

        def on_ready(url: str) -> None:
            line = f"ready url={url}/v1 {_describe_cache(cached, engines)}"
            if options.ready_file is not None:
                write_file(options.ready_file, f"{line}\n")
            say(line)

        return run_engine(command, f"{reachable(host)}:{port}", options.ready_timeout, on_ready)


def _remove(ready_file: Path) -> None:
    """Remove the file of an earlier engine, and see that there may be another one. Raises ConfigError."""
    try:
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        ready_file.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=ready_file.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--ready-file {ready_file} cannot be written: {error.strerror}") from None


def _port(options: ServeOptions) -> int:
    text = value("--port", options.engine_arguments)
    if text is None:
        return options.port
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError("--port of the engine is no port; give a number from 1 to 65535")
    return int(text)


def _check_memory(config: CacheConfig) -> None:
    memory = available_memory()
    if isinstance(config.host.capacity, int) and config.host.capacity > memory.limit:
        raise ConfigError(
            f"host.capacity {format_size(config.host.capacity)} is more than there is: {format_size(memory.limit)} "
            "on this machine or in this container; lower it"
        )


def _with_metrics_port(config: CacheConfig, engines: range, stack: ExitStack) -> CacheConfig:
    """Choose the metrics ports and hold them, because the engine listens there only after many seconds."""
    metrics = config.metrics
    wanted = metrics.port + engines.start if metrics.port else 0
    first = hold_ports(metrics.host, wanted, len(engines), "metrics", stack)
    return config.model_copy(update={"metrics": metrics.model_copy(update={"port": first - engines.start})})


def _check_records(config: CacheConfig, engines: range) -> None:
    if config.record is not None:
        for record in (record_of(config.record, rank) for rank in engines):
            try:
                record.open("ab").close()
            except OSError as error:
                raise ConfigError(f"record {record} cannot be written: {error.strerror}") from None


def _describe_cache(config: CacheConfig | None, engines: range) -> str:
    """Describe the tiers of one engine."""
    if config is None:
        return "cache=off"
    if not config.metrics.enabled:
        return "cache=on metrics=off"
    port = config.metrics.port + engines.start
    url = f"http://{for_url(config.metrics.host)}:{port}/metrics"
    more = f" engines={len(engines)}" if len(engines) > 1 else ""  # the others on the ports that follow
    headers = {"Authorization": f"Bearer {config.admin.token}"} if config.admin.token else {}
    request = urllib.request.Request(f"http://{reachable(config.metrics.host)}:{port}/stats", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_STATS_SECONDS) as answer:
            stats = json.loads(answer.read())
    except urllib.error.HTTPError:
        return f"metrics={url}{more}"  # it tells others the tiers only for a token, and there is none
    except (OSError, ValueError):
        return "cache=FAILED (its metrics page does not answer; see the log above)"
    return f'metrics={url} tiers="{describe_tiers(stats)}"{more}'
