"""The simulator for notebooks: traces and results as pandas DataFrames. docs/python.md shows them.

A trace is a DataFrame with one row for each request and these columns: arrival_s, input_tokens, output_tokens, tenant, session, class
and blocks (ids of its trace blocks, each equal exactly if the whole prefix is equal). The column class may be absent. attrs hold source,
format, block_tokens and block_bytes.
Rows may be chosen, sorted and changed before they are given to the other functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmc.cache.config import CacheConfig
from lmc.cache.settings import load_settings
from lmc.errors import TraceError
from lmc.sim import replay_show, tune_show
from lmc.sim import tune as tuning
from lmc.sim.build import TraceBuilder
from lmc.sim.cache_file import load_trace
from lmc.sim.cost import CostModel, known_token_bytes
from lmc.sim.cost_file import read_cost_model
from lmc.sim.formats import read_trace as parse_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.policies import check_policies, hits_at
from lmc.sim.stack import hit_curve as lru_curve
from lmc.sim.stack import profile
from lmc.sim.trace import Trace, Window, coarsen, require_blocks
from lmc.sim.tune_search import settings_of

_COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "tenant", "session", "blocks")
_POINTS = 200  # of an LRU curve
_SIZES = 20  # of other policies


def read_trace(
    path: str | Path,
    *,
    format: str | None = None,
    block_tokens: int | None = None,
    sort: bool = False,
    rechain: bool = False,
    session_gap_s: float = 60.0,
    tokenizer: str | Path | None = None,
    cache: bool = True,
) -> pd.DataFrame:
    """Read a trace of any format that `lmc sim` reads, with the options of its command line. Raises TraceError."""
    options = ReadOptions(block_tokens, sort, rechain, session_gap_s, None if tokenizer is None else Path(tokenizer))
    trace = (load_trace if cache else parse_trace)(Path(path), options, format)
    bounds = trace.starts[1:-1]
    frame = pd.DataFrame(
        {
            "arrival_s": trace.timestamps_s,
            "input_tokens": trace.input_tokens,
            "output_tokens": trace.output_tokens,
            "tenant": np.array(trace.tenant_names, dtype=object)[trace.tenants],
            "session": trace.sessions,
            "class": np.array(trace.class_names, dtype=object)[trace.classes],
            "blocks": pd.Series(np.split(trace.ids, bounds), dtype=object),
        }
    )
    frame.attrs = {
        "source": trace.source,
        "format": trace.format,
        "block_tokens": trace.block_tokens,
        "block_bytes": trace.block_bytes,
        "notes": list(trace.notes),
    }
    return frame


def hit_curve(
    requests: pd.DataFrame,
    *,
    policy: str | Sequence[str] = "lru",
    capacities: Sequence[float] | None = None,
    chunk_tokens: int | None = None,
    window: Window = "all",
    token_bytes: int = 0,
) -> pd.DataFrame:
    """Hits by capacity, one row for each policy and capacity.

    capacities are in trace blocks, or in chunks if chunk_tokens is given; by default they are spread over the unique ones. Columns: policy,
    capacity_blocks, capacity_tokens, capacity_bytes (missing if the bytes of a token are not known), hit_tokens, total_tokens, hit_rate.
    Raises ConfigError for an unknown policy.
    """
    trace = to_trace(requests)
    if chunk_tokens is not None:
        trace = coarsen(trace, chunk_tokens)
    require_blocks(trace)
    names = [policy] if isinstance(policy, str) else list(policy)
    check_policies(names)
    stack = profile(trace)
    curve = lru_curve(stack, window)
    known = known_token_bytes(trace, token_bytes, None)
    rows = []
    for name in names:
        count = _POINTS if name == "lru" else _SIZES
        spread = np.unique(np.geomspace(1, max(trace.num_unique, 1), count).astype(np.int64)).tolist()
        sizes = list(capacities) if capacities is not None else spread
        for size, hits in zip(sizes, hits_at(stack, name, sizes, window, curve), strict=True):
            rows.append(
                {
                    "policy": name,
                    "capacity_blocks": size,
                    "capacity_tokens": size * trace.block_tokens,
                    "capacity_bytes": size * trace.block_tokens * known if known else None,
                    "hit_tokens": hits.tokens,
                    "total_tokens": curve.total_tokens,
                    "hit_rate": hits.tokens / max(curve.total_tokens, 1),
                }
            )
    return pd.DataFrame(rows)


def replay(
    requests: pd.DataFrame,
    settings: Mapping[str, Any] | str | Path,  # Any: settings of the cache
    *,
    instances: int = 1,
    routing: str = "round-robin",
    shared: str = "0",
    cost: CostModel | str | Path | None = None,
    token_bytes: int = 0,
    shared_host: bool = False,
) -> pd.DataFrame:
    """Replay under settings of the live cache: a mapping, or a YAML file as for `lmc serve`. One row for each request, in order of arrival.

    shared_host: the instances share one host memory and one disk, as with `lmc node`, as large as theirs together.

    Columns: arrival_s, instance, input_tokens, hit_tokens and, for each tier, TIER_hit_tokens; ttft_s with a cost model. attrs["counts"]
    has evictions, dropped stores and so on. Raises ConfigError.
    """
    config = (
        load_settings(Path(settings)).config
        if isinstance(settings, str | Path)
        else CacheConfig.model_validate(settings)
    )
    model = _cost(cost)
    result = replay_show.replay_settings(
        to_trace(requests), config, instances, routing, shared, model, token_bytes, shared_host=shared_host
    )
    frame = pd.DataFrame(
        {
            "arrival_s": result.trace.timestamps_s,
            "instance": result.instance,
            "input_tokens": result.trace.input_tokens,
            "hit_tokens": np.sum(list(result.hit_tokens.values()), axis=0),
            **{f"{tier}_hit_tokens": tokens for tier, tokens in result.hit_tokens.items()},
            **({} if model is None else {"ttft_s": result.ttft_s}),
        }
    )
    frame.attrs = {"counts": dict(result.counts), "notes": list(result.trace.notes)}
    return frame


def tune(
    requests: pd.DataFrame,
    *,
    memory: str,
    disk: str = "0",
    policies: Sequence[str] = (),
    cost: CostModel | str | Path | None = None,
    dollars_per_hour: float | None = None,
    token_bytes: int = 0,
    disk_path: str | Path = "lmc-disk",
) -> pd.DataFrame:
    """Choose settings within a budget, as `lmc sim tune` does. One row for each configuration that was tried, the chosen one first.

    Column `chosen` marks it. attrs hold settings (for `lmc serve`), expected_hit_rate with its interval, unlimited_hit_rate and notes.
    Raises ConfigError.
    """
    trace, model = to_trace(requests), _cost(cost)
    check_policies(policies)
    budget = tuning.make_budget(memory, disk, dollars_per_hour, model)
    found = tuning.tune(trace, known_token_bytes(trace, token_bytes, model), budget, policies, model)
    points = [found.chosen, *(point for point in found.tried if point != found.chosen)]
    frame = pd.DataFrame([tune_show.point_json(point) for point in points])
    frame.insert(0, "chosen", [True] + [False] * (len(points) - 1))
    frame.attrs = {
        "settings": settings_of(found.chosen, Path(disk_path)),
        "expected_hit_rate": found.expected.value,
        "interval": (found.expected.low, found.expected.high),
        "unlimited_hit_rate": found.ceiling,
        "notes": list(found.notes),
    }
    return frame


def to_trace(requests: pd.DataFrame) -> Trace:
    """The simulator's own form of a trace. Raises TraceError for missing columns, and as readers do for what cannot be."""
    missing = [
        name for name in (*_COLUMNS, "block_tokens") if name not in requests.columns and name not in requests.attrs
    ]
    if missing:
        raise TraceError(f"the DataFrame has no {', '.join(missing)}; start from read_trace(), or see docs/python.md")
    attrs = requests.attrs
    builder = TraceBuilder(
        str(attrs.get("source", "DataFrame")), str(attrs.get("format", "frame")), int(attrs["block_tokens"]), sort=True
    )
    rows = requests[list(_COLUMNS)].itertuples(index=False)
    classes = requests["class"] if "class" in requests.columns else [""] * len(requests)
    for number, ((arrival, tokens, output, tenant, session, blocks), request_class) in enumerate(
        zip(rows, classes, strict=True), start=1
    ):
        builder.add(
            number,
            np.asarray(blocks, dtype=np.int64),
            float(arrival),
            int(tokens),
            int(output),
            str(tenant),
            None if session is None or session == -1 else str(session),
            str(request_class),
        )
    trace = builder.finish(lengths_only=all(len(blocks) == 0 for blocks in requests["blocks"]))
    return replace(trace, block_bytes=int(attrs.get("block_bytes", 0)), notes=(*attrs.get("notes", ()), *trace.notes))


def _cost(cost: CostModel | str | Path | None) -> CostModel | None:
    return read_cost_model(Path(cost)) if isinstance(cost, str | Path) else cost
