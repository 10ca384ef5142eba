"""SHARDS: estimates an LRU miss-ratio curve and its error from a sample of the trace blocks (Waldspurger et al., FAST 2015).

A hash of its id decides whether a trace block is in the sample, so all its accesses are in it or none. A prefix hit is a plain stack hit,
so sampling is valid for chains too. Distances are scaled by 1 / rate. Only misses for lack of room are estimated (those in the sample /
rate). First accesses miss at any size; they are counted exactly. So a trace block that every request holds does not shift the curve,
sampled or not (the paper's SHARDS-adj corrects for that), and the curve ends exactly at the hits of an unlimited cache. The error is the
spread over independent samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmc.errors import ConfigError
from lmc.sim.stack import Marks, StackProfile, profile
from lmc.sim.trace import Float64, Int64, Trace, Window

_RUNS = 5


@dataclass(frozen=True, eq=False)
class Estimate:
    capacities: Sequence[float]
    block_hit_rate: Float64  # (num_capacities,) hits / all trace blocks of the window, mean over the runs
    token_hit_rate: Float64
    error: Float64  # (num_capacities,) standard error of the token hit rate
    sampled_blocks: int  # simulated accesses of all runs together


def estimate(
    trace: Trace, rate: float, capacities: Sequence[float], window: Window = "all", runs: int = _RUNS, seed: int = 0
) -> Estimate:
    """Hit rates at capacities in trace blocks. Raises ConfigError for a rate that is no share or samples fewer than two trace blocks."""
    if not 0 < rate <= 1:
        raise ConfigError(f"sampling rate {rate} is no share; choose more than 0 and at most 1")
    blocks, tokens, accesses = [], [], 0
    for run in range(runs):
        chosen = _chosen(trace.num_unique, rate, seed * 1_000_003 + run)
        if chosen.sum() < 2:
            raise ConfigError(
                f"sampling rate {rate} leaves {chosen.sum()} of {trace.num_unique} trace blocks; choose a higher rate"
            )
        by_block, by_token, used = _one_run(trace, chosen, rate, capacities, window)
        blocks.append(by_block)
        tokens.append(by_token)
        accesses += used
    spread = np.std(tokens, axis=0, ddof=1) / np.sqrt(runs) if runs > 1 else np.full(len(capacities), np.nan)
    return Estimate(capacities, np.mean(blocks, axis=0), np.mean(tokens, axis=0), spread, accesses)


def _one_run(
    trace: Trace, chosen: Marks, rate: float, capacities: Sequence[float], window: Window
) -> tuple[Float64, Float64, int]:
    taken = chosen[trace.ids]
    sample = _sample(trace, taken, chosen)
    first = trace.first_request(window)
    weights = _block_tokens(trace)
    hits, tokens = _hits(
        profile(sample), weights[taken], [capacity * rate for capacity in [*capacities, np.inf]], first
    )
    measured = slice(int(trace.starts[first]), None)
    again = np.concatenate(([False], trace.ids[1:] <= np.maximum.accumulate(trace.ids)[:-1]))[measured]
    ceiling, token_ceiling = int(again.sum()), int(weights[measured][again].sum())
    by_block = (ceiling - (hits[-1] - hits[:-1]) / rate) / again.size
    by_token = (token_ceiling - (tokens[-1] - tokens[:-1]) / rate) / trace.input_tokens[first:].sum()
    return np.clip(by_block, 0, 1), np.clip(by_token, 0, 1), sample.num_blocks


def _chosen(num_unique: int, rate: float, seed: int) -> Marks:
    """(num_unique,) whether each trace block is in the sample: its hash of id and seed (splitmix64) is below the rate."""
    value = np.arange(num_unique, dtype=np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return (value >> np.uint64(11)).astype(np.float64) < rate * 2.0**53


def _sample(trace: Trace, taken: Marks, chosen: Marks) -> Trace:
    """The trace with the chosen trace blocks only. It has no parents, because the stack pass does not need them."""
    before = np.concatenate(([0], np.cumsum(taken, dtype=np.int64)))
    number = np.cumsum(chosen, dtype=np.int32) - np.int32(1)
    return replace(
        trace,
        ids=number[trace.ids[taken]],
        starts=before[trace.starts],
        parents=np.full(int(chosen.sum()), -1, dtype=np.int32),
    )


def _block_tokens(trace: Trace) -> Int64:
    """(num_blocks,) tokens of each access: a full trace block, or the rest in a partial last one."""
    weights = np.full(trace.num_blocks, trace.block_tokens, dtype=np.int64)
    sizes = np.diff(trace.starts)
    some = sizes > 0
    rest = trace.input_tokens[some] - (sizes[some] - 1) * trace.block_tokens
    weights[trace.starts[1:][some] - 1] = np.clip(rest, 0, trace.block_tokens)
    return weights


def _hits(rows: StackProfile, weights: Int64, capacities: Sequence[float], first: int) -> tuple[Float64, Float64]:
    begin = int(np.searchsorted(rows.request, first))
    above, length = rows.above[begin:].astype(np.float64), rows.length[begin:]
    start = rows.trace.starts[rows.request[begin:]] + rows.first[begin:]
    summed = np.concatenate(([0], np.cumsum(weights)))
    hits, tokens = [], []
    for capacity in capacities:
        found = np.clip(np.floor(min(capacity, 2**31) - above), 0, length).astype(np.int64)
        hits.append(float(found.sum()))
        tokens.append(float((summed[start + found] - summed[start]).sum()))
    return np.array(hits), np.array(tokens)
