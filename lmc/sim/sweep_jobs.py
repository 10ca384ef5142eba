"""A sweep over many traces in jobs, each of which stands alone: one trace, chunk size, policy and capacity."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

import lmc
from lmc.cache.policy import get_policy
from lmc.errors import ConfigError, TraceError
from lmc.sim.capacity import CapacityOptions, each_capacity
from lmc.sim.policies import BOUND
from lmc.sim.policy_replay import source_digest
from lmc.sim.sweep import run_sweep
from lmc.sim.trace import Trace, Window
from lmc.sim.trace_file import TraceFile

Row = dict[str, Any]  # Any: one value of each column of sweep_results.COLUMNS


@dataclass(frozen=True)
class Job:
    key: str  # equal only if the result must be equal: the trace's files, all options, the policy's source and lmc's version
    trace: TraceFile
    chunk_tokens: int | None  # None: the recorded trace blocks
    policy: str
    capacity: CapacityOptions  # one
    window: Window


def make_jobs(
    traces: Iterable[TraceFile],
    policies: Sequence[str],
    capacities: CapacityOptions,
    chunk_sizes: Sequence[int] = (),
    window: Window = "all",
) -> Iterator[Job]:
    """Jobs in the order trace, chunk size, policy, capacity. Raises TraceError for a file of no known format, ConfigError for a policy."""
    sources = {name: "" if name == BOUND else source_digest(get_policy(name)) for name in policies}
    for trace in traces:
        identity = trace.identity()
        for chunk, policy, capacity in itertools.product(chunk_sizes or (None,), policies, each_capacity(capacities)):
            whole = [lmc.__version__, identity, chunk, policy, sources[policy], capacity, window]
            key = hashlib.blake2b(orjson.dumps(whole), digest_size=12).hexdigest()
            yield Job(key, trace, chunk, policy, capacity, window)


def run_job(job: Job) -> Row | str:
    """The result, or what was wrong with this trace."""
    try:
        trace = _load(job.trace)
        chunks = () if job.chunk_tokens is None else (job.chunk_tokens,)
        (row,) = run_sweep(trace, [job.policy], job.capacity, job.window, chunks).rows
    except (ConfigError, TraceError) as error:
        return str(error)
    return {
        "trace": str(job.trace.path),
        "format": trace.format,
        "requests": trace.num_requests,
        "window": job.window,
        "chunk_tokens": row.chunk_tokens,
        "policy": row.policy,
        "capacity": job.capacity.text,
        "capacity_blocks": float(row.capacity_blocks),
        "capacity_tokens": float(row.capacity_blocks) * row.chunk_tokens,
        "hit_blocks": row.hit_blocks,
        "total_blocks": row.total_blocks,
        "hit_tokens": row.hit_tokens,
        "total_tokens": row.total_tokens,
        "block_hit_rate": row.block_hit_rate,
        "token_hit_rate": row.token_hit_rate,
        "hit_bytes": row.hit_bytes,
        "job": job.key,
    }


@lru_cache(maxsize=1)
def _load(file: TraceFile) -> Trace:
    """Jobs of one trace follow each other."""
    return file.load()
