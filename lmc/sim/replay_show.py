"""Runs a full replay with the settings of a file, and builds its table and JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from lmc.cache.config import DEFAULT_CHUNK_TOKENS, CacheConfig, chunk_tokens_for
from lmc.cache.shape import ModelShape, read_shape
from lmc.errors import ConfigError
from lmc.report import Cell, Column, Table
from lmc.sim.compression import codec_of, where_it_pays
from lmc.sim.cost import CostModel, known_token_bytes
from lmc.sim.full_replay import Fleet, ReplayResult, replay_fleet
from lmc.sim.router import Routing
from lmc.sim.shared_store import SHARED
from lmc.sim.shown import WINDOWS, Shown, trace_json
from lmc.sim.tier_grid import PERCENTILES
from lmc.sim.trace import Trace, Window, coarsen, require_blocks
from lmc.units import parse_size

_UNLIMITED = 1 << 60  # chunks


def replay_settings(
    trace: Trace,
    config: CacheConfig,
    instances: int = 1,
    routing: str = "round-robin",
    shared: str = "0",
    cost: CostModel | None = None,
    token_bytes: int = 0,
    ratio: float | None = None,
    codec_speed: str | None = None,
    *,
    shared_host: bool = False,
    shape: ModelShape | None = None,
) -> ReplayResult:
    """Replay the trace. shared_host: see Fleet. shape: of the model, by default what the trace says.

    Raises ConfigError for settings that cannot be simulated, TraceError for a chunk size that does not fit.
    """
    require_blocks(trace, of_groups=True)
    shape = shape or trace.shape
    fleet = Fleet(instances, cast(Routing, routing), cost=cost)
    if shape is None:
        chunk_tokens = chunk_tokens_for(config, trace.block_tokens)
        chunk_bytes = known_token_bytes(trace, token_bytes, cost) * chunk_tokens
    else:
        if any(group.kind == "state" for group in shape.groups):
            raise ConfigError("recurrent states are not simulated yet: they exist only where the engine keeps one")
        _require_plain(config, cost, shared_host)
        least = max(DEFAULT_CHUNK_TOKENS, trace.block_tokens)
        parts = shape.parts(config.chunk_tokens, least, config.checkpoint_tokens)
        chunk_tokens, part_bytes = parts.chunk_tokens, shape.part_bytes(parts)
        chunk_bytes = max(part_bytes)
        fleet = replace(fleet, parts=parts, part_bytes=part_bytes)
    chunked = coarsen(trace, chunk_tokens)
    if chunk_bytes == 0:
        raise ConfigError(f"{trace.source} does not say how many bytes a token's KV takes; give --token-bytes")
    names, shared_chunks, notes = _shared_tiers(config, shared, chunk_bytes, instances)
    codec = codec_of(config, ratio, codec_speed)
    if config.disk.compress != "none":
        notes += where_it_pays(cost, codec)
    if shared_host and instances < 2:
        raise ConfigError("--shared-host is about several instances; give --instances")
    fleet = replace(fleet, shared_chunks=shared_chunks, shared_names=names, codec=codec, shared_host=shared_host)
    return replay_fleet(replace(chunked, notes=(*chunked.notes, *notes)), config, chunk_bytes, fleet)


def load_shape(file: Path) -> ModelShape:
    """Raises ConfigError."""
    try:
        return read_shape(orjson.loads(file.read_bytes()), str(file))
    except OSError as error:
        raise ConfigError(f"cannot read the shape {file}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{file}: this is not a model's shape: {error}") from error


def _require_plain(config: CacheConfig, cost: CostModel | None, shared_host: bool) -> None:
    """Raises ConfigError for what is not simulated with a model that has several KV groups."""
    if shared_host:
        raise ConfigError("a model with several KV groups is not supported through a node yet; leave --shared-host out")
    if config.disk.compress != "none":
        raise ConfigError("a model with several KV groups is not compressed yet; set disk.compress to none")
    if cost is not None and cost.engine.kv_tokens is not None and cost.engine.prefix_cache:
        raise ConfigError(
            "an engine's own prefix cache is not simulated for a model with several KV groups; set engine.prefix_cache "
            "to false in the cost model"
        )


def _shared_tiers(
    config: CacheConfig, shared: str, chunk_bytes: int, instances: int
) -> tuple[tuple[str, ...], int, list[str]]:
    """Names of the tiers that instances share, the capacity of each in chunks, and notes on what the replay does with the settings."""
    notes = []
    configured = {"redis": config.redis.url, "s3": config.s3.bucket, "mooncake": config.mooncake.master}
    names = tuple(name for name, there in configured.items() if there is not None)
    capacity = 0 if shared == "0" else parse_size(shared) // chunk_bytes
    if shared != "0" and capacity == 0:
        raise ConfigError(f"--shared {shared} holds no chunk of {chunk_bytes} bytes; give more")
    if names and not capacity:
        capacity = _UNLIMITED
        notes.append(
            f"{' and '.join(names)} never evict in this replay, because the settings give no size; --shared limits it"
        )
    if config.redis.url is not None and config.redis.ttl is not None:
        notes.append("redis.ttl is not simulated: values stay until they are evicted")
    if config.disk.path is not None and config.disk.shared and instances > 1:
        notes.append(
            "disk.shared is not simulated: each instance has a folder of its own; --shared adds a tier for all"
        )
    return names or (SHARED,), capacity, notes


def show_replay(result: ReplayResult, window: Window, *, timed: bool, apart: ReplayResult | None = None) -> Shown:
    """apart: the same with a memory of its own for each instance, to compare with."""
    hits, total = result.hits(window), max(result.total_tokens(window), 1)
    first = result.trace.first_request(window)
    ttft = _ttft(result, window) if timed else {}
    rows: list[list[Cell]] = [
        [f"{tier} hits", tokens, 100 * tokens / total, "% of tokens"] for tier, tokens in hits.items()
    ]
    rows.append(["hits", sum(hits.values()), 100 * sum(hits.values()) / total, "% of tokens"])
    if window == "all":
        recorded = result.trace.recorded_hits.items()
        rows += [[f"recorded {tier} hits", tokens, 100 * tokens / total, "% of tokens"] for tier, tokens in recorded]
    rows += [[f"TTFT p{p}", value, None, "s"] for p, value in ttft.items()]
    if apart is not None:
        lost = sum(apart.hits(window).values())
        rows.append(["hits, each with a memory of its own", lost, 100 * lost / total, "% of tokens"])
        if timed:
            rows += [[f"TTFT p{p}, likewise", value, None, "s"] for p, value in _ttft(apart, window).items()]
    rows += [
        [name, count, None, "chunks" if "late" not in name else "requests"] for name, count in result.counts.items()
    ]
    note = f"100 % is {total:,} input tokens; {WINDOWS[window]}. Chunks of {result.trace.block_tokens:,} tokens."
    if timed:
        engine = result.engine
        note += f" An engine computes {'one request' if engine.max_num_seqs == 1 else f'{engine.max_num_seqs} requests'} at a time"
        note += "; decoding is not simulated." if engine.decode is None else "."
    json: dict[str, Any] = {  # Any: JSON
        "trace": trace_json(result.trace),
        "window": window,
        "hit_tokens": hits,
        "recorded_hit_tokens": result.trace.recorded_hits,
        "total_tokens": total,
        "ttft_s": {f"p{p}": value for p, value in ttft.items()},
        "counts": dict(result.counts),
        "requests_by_instance": np.bincount(result.instance[first:]).tolist(),
        "notes": list(result.trace.notes),
    }
    if apart is not None:
        own = {f"p{p}": value for p, value in _ttft(apart, window).items()} if timed else {}
        json["apart"] = {"hit_tokens": apart.hits(window), "ttft_s": own, "counts": dict(apart.counts)}
    columns = [Column("figure"), Column("value"), Column("share"), Column("unit")]
    return Shown(Table(f"Replay of {result.trace.source}", columns, rows, note), json)


def _ttft(result: ReplayResult, window: Window) -> dict[int, float]:
    first = result.trace.first_request(window)
    return {p: float(np.percentile(result.ttft_s[first:], p)) for p in PERCENTILES}
