"""The columnar form of a trace, which every reader makes and the whole simulator works on.

A trace is a list of requests in order of arrival, and a request is a chain of *trace blocks*: pieces of block_tokens tokens, named by an id
that is equal exactly if the whole prefix is equal. (In the simulator, names such as num_blocks and options such as --capacity-blocks count
trace blocks; the engine's block does not occur here. After coarsen() a trace block is a chunk.) Ids are dense and numbered by first
appearance: a trace block is new if its id equals the number of ids before it, and the id of a parent is smaller than that of its child.
This module knows no file format; lmc.sim.build checks what readers deliver.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lmc.cache.policy.base import MOST_CLASSES
from lmc.cache.shape import ModelShape
from lmc.errors import ConfigError, TraceError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
Window = Literal["all", "last-half"]


@dataclass(frozen=True, eq=False)
class Trace:
    source: str  # the file's name, for messages and reports
    format: str  # the reader's name
    block_tokens: int
    ids: Int32  # (num_blocks,) dense ids in [0, num_unique), request by request
    starts: Int64  # (num_requests + 1,) the trace blocks of request r are ids[starts[r]:starts[r + 1]]
    timestamps_s: Float64  # (num_requests,) never decreasing
    input_tokens: Int64  # (num_requests,) prompt tokens, including those that fill no trace block
    output_tokens: Int64  # (num_requests,)
    parents: Int32  # (num_unique,) the trace block before each, -1 for the first of a chain
    tenants: Int32  # (num_requests,) index into tenant_names
    tenant_names: tuple[str, ...]
    sessions: Int32  # (num_requests,) session number, -1 if the trace names none
    classes: Int32  # (num_requests,) index into class_names: what the trace tells of the request beside its prompt
    class_names: tuple[str, ...]  # the first is empty: nothing is known
    block_bytes: int = 0  # KV bytes of one trace block over all ranks, 0 if the trace does not say it
    recorded_hits: dict[str, int] = field(default_factory=dict)  # hit tokens of the recorded cache, by tier
    shape: ModelShape | None = None  # of a model with several KV groups, if the trace says it
    notes: tuple[str, ...] = ()  # choices of the file's reader that matter for the results

    @property
    def class_numbers(self) -> Int32:
        """(num_requests,) the classes as policies know them."""
        return np.minimum(self.classes, np.int32(MOST_CLASSES))

    @property
    def num_requests(self) -> int:
        return self.starts.size - 1

    @property
    def num_blocks(self) -> int:
        return int(self.starts[-1])

    @property
    def num_unique(self) -> int:
        return self.parents.size

    @property
    def num_tokens(self) -> int:
        return int(self.input_tokens.sum())

    @property
    def longest(self) -> int:
        """Trace blocks of the longest request."""
        return int(np.diff(self.starts).max())

    def loaded_tokens(self, blocks: Int64) -> Int64:
        """(num_requests,) tokens of hits in trace blocks, as in the live cache, which never loads the one with a prompt's last token."""
        loaded: Int64 = np.minimum(blocks, np.maximum(self.input_tokens - 1, 0) // self.block_tokens)
        return loaded * self.block_tokens

    def first_request(self, window: Window) -> int:
        """The index of the first measured request; earlier ones only warm the cache up."""
        return self.num_requests // 2 if window == "last-half" else 0


def require_blocks(trace: Trace, *, of_groups: bool = False) -> None:
    """Raises TraceError for a trace without trace blocks, which holds lengths only, and unless of_groups for one of several KV groups."""
    if trace.shape is not None and not of_groups:
        raise TraceError(
            f"{trace.source} was recorded with a model that has several KV groups, whose hits need more than chunks of tokens; "
            "only `lmc sim replay` simulates that"
        )
    if trace.num_blocks == 0:
        raise TraceError(
            f"{trace.source}: a trace in {trace.format} format holds arrivals and lengths but no content, so hits cannot be simulated; "
            "use `lmc sim describe`, or give a trace with hashes or prompts"
        )


def select_requests(trace: Trace, chosen: npt.NDArray[np.bool_]) -> Trace:
    """The trace of the chosen requests alone; `chosen` is (num_requests,)."""
    sizes = np.diff(trace.starts)
    starts = np.concatenate(([0], np.cumsum(sizes[chosen])))
    blocks = trace.ids[np.repeat(chosen, sizes)]
    used, first = np.unique(blocks, return_index=True)
    order = np.argsort(first)  # ids by first appearance
    number = np.full(trace.num_unique + 1, -1, dtype=np.int32)  # the last entry maps parent -1 to -1
    number[used[order]] = np.arange(used.size, dtype=np.int32)
    return replace(
        trace,
        ids=number[blocks],
        starts=starts,
        timestamps_s=trace.timestamps_s[chosen],
        input_tokens=trace.input_tokens[chosen],
        output_tokens=trace.output_tokens[chosen],
        parents=number[trace.parents[used[order]]],
        tenants=trace.tenants[chosen],
        sessions=trace.sessions[chosen],
        classes=trace.classes[chosen],
    )


def speed_up(trace: Trace, speed: float) -> Trace:
    """The same requests with times between arrivals divided by speed. Raises ConfigError if speed is not a positive number."""
    if not 0 < speed < np.inf:
        raise ConfigError(f"--speed must be a positive number, not {speed:g}")
    if speed == 1.0:
        return trace
    start = trace.timestamps_s[0]
    note = f"requests arrive {speed:g} times as fast as recorded"
    return replace(trace, timestamps_s=start + (trace.timestamps_s - start) / speed, notes=(*trace.notes, note))


def coarsen(trace: Trace, chunk_tokens: int) -> Trace:
    """The same requests with full chunks of chunk_tokens as trace blocks; input_tokens still counts the tokens of partial tails.

    This is exact because ids are chained: the id of a chunk is that of its last trace block. Raises TraceError if chunk_tokens is not a
    multiple of block_tokens, because ids say nothing about smaller pieces.
    """
    if chunk_tokens <= 0 or chunk_tokens % trace.block_tokens:
        raise TraceError(
            f"{trace.source}: chunks of {chunk_tokens} tokens cannot be simulated on trace blocks of {trace.block_tokens}; "
            f"choose a multiple of {trace.block_tokens}"
        )
    factor = chunk_tokens // trace.block_tokens
    num_blocks = np.diff(trace.starts)
    num_chunks = np.minimum(num_blocks // factor, trace.input_tokens // chunk_tokens)
    starts = np.zeros(trace.num_requests + 1, dtype=np.int64)
    np.cumsum(num_chunks, out=starts[1:])
    if starts[-1] == 0:
        raise TraceError(
            f"{trace.source}: no request fills a chunk of {chunk_tokens} tokens; choose a smaller chunk size"
        )
    within = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], num_chunks)
    last_blocks = trace.ids[np.repeat(trace.starts[:-1], num_chunks) + (within + 1) * factor - 1]
    # The order of first appearance is kept: trace blocks that end a chunk are renumbered in the order in which they first appear.
    is_chunk = np.zeros(trace.num_unique, dtype=bool)
    is_chunk[last_blocks] = True
    number = np.cumsum(is_chunk, dtype=np.int32) - np.int32(1)
    ids = number[last_blocks]
    parents = np.full(int(is_chunk.sum()), -1, dtype=np.int32)
    has_parent = within > 0
    parents[ids[has_parent]] = ids[np.flatnonzero(has_parent) - 1]
    return replace(
        trace,
        block_tokens=chunk_tokens,
        ids=ids,
        starts=starts,
        parents=parents,
        block_bytes=trace.block_bytes * factor,
    )
