"""Checks a workload without an engine: its data, its prompts and the cache settings of its arms; and tells which hits to expect."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmc.bench.arms import cache_yaml
from lmc.bench.expected import expected_hits, to_trace
from lmc.bench.prompts import Prompts, build_prompts
from lmc.bench.schedule import Plan, make_plan
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Workload
from lmc.cache.config import DEFAULT_CHUNK_TOKENS
from lmc.cache.settings import load_settings
from lmc.errors import ConfigError, WorkloadError
from lmc.report import Cell, Column, Table


def check_workload(workload: Workload, model_folder: Path, base: Path) -> list[Table]:
    """Tables that describe the load. Raises WorkloadError or ConfigError for the faults that would stop a run."""
    check_caches(workload)
    prompts = build_prompts(workload, ModelTokenizer.load(model_folder), base)
    plan = make_plan(prompts.sessions, workload)
    return [_parts_table(prompts), _reuse_table(plan, (16, 64, DEFAULT_CHUNK_TOKENS, 256))]


def check_caches(workload: Workload) -> None:
    """Check the cache settings of every arm against lmc's schema. Raises WorkloadError."""
    with tempfile.TemporaryDirectory(prefix="lmc-bench-") as folder:
        places = {
            "{disk}": f"{folder}/disk",
            "{redis}": "unix:///redis.sock",
            "{s3}": "http://127.0.0.1",
            "{mooncake}": "127.0.0.1:50051",
        }
        for name, arm in workload.arms.items():
            if arm.cache is not None:
                file = Path(folder) / "cache.yaml"
                file.write_text(cache_yaml(arm, places))
                try:
                    load_settings(file)
                except ConfigError as error:
                    raise WorkloadError(f"arms.{name}.cache: {str(error).replace(f'{file}: ', '')}") from error


def _parts_table(prompts: Prompts) -> Table:
    columns = [
        Column("part"),
        Column("sessions"),
        Column("requests"),
        Column("shortest", "tokens"),
        Column("median", "tokens", 0),
        Column("longest", "tokens"),
        Column("prompt", "tokens"),
        Column("output", "tokens"),
        Column("left out"),
    ]
    rows: list[list[Cell]] = []
    for name, sessions in prompts.parts.items():
        requests = [request for session in sessions for request in session]
        lengths = [len(request.prompt) for request in requests]
        rows.append(
            [
                name,
                len(sessions),
                len(requests),
                min(lengths),
                float(np.median(lengths)),
                max(lengths),
                sum(lengths),
                sum(request.output_tokens for request in requests),
                prompts.too_long[name],
            ]
        )
    return Table(
        "Parts", columns, rows, "Left out: requests whose prompt and output together are longer than engine.context."
    )


def _reuse_table(plan: Plan, chunk_sizes: Sequence[int]) -> Table:
    requests = [item.request for item in plan.items]
    total = sum(len(request.prompt) for request in requests)
    rows: list[list[Cell]] = []
    for size in chunk_sizes:
        hits = sum(expected_hits(requests, size))
        unique = to_trace(requests, size).num_unique * size if any(len(r.prompt) >= size for r in requests) else 0
        rows.append([size, hits, 100 * hits / total, unique])
    columns = [
        Column("chunk", "tokens"),
        Column("hit", "tokens"),
        Column("hit rate", "%", 1),
        Column("working set", "tokens"),
    ]
    return Table("Hits in a cache that evicts nothing, in the planned order", columns, rows)
