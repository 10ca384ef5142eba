"""Reads kv-cache-tester sessions: one coding-agent session per line, with trace block ids as runs of consecutive numbers.

Sessions have separate clocks, so one is started every session_gap_s. Ids are local to a session: different sessions share no trace block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import get_count, get_list, get_number, get_text
from lmc.sim.formats.lines import Record, bad_line, read_records
from lmc.sim.trace import Int64, Trace

Runs = npt.NDArray[np.int64]

_SURPLUS_BLOCKS = 1024  # trace blocks beyond the prompt's length that are accepted; more are taken for a broken count
_LARGEST_ID = 2**40


class _Request(NamedTuple):
    timestamp_s: float
    order: int
    line: int
    session: str
    runs: Runs  # (num_runs, 2) first id, count
    input_tokens: int
    output_tokens: int
    ended_by: str


def matches(record: Record) -> bool:
    return {"block_size", "requests", "hash_id_scope"} <= record.keys()


def read(path: Path, options: ReadOptions) -> Trace:
    requests: list[_Request] = []
    block_tokens = 0
    next_id = 0
    num_sessions = 0
    for number, session in read_records(path):
        size = get_count(path, number, session, "block_size")
        block_tokens = block_tokens or size
        if size != block_tokens or size == 0:
            raise bad_line(
                path, number, f"block_size {size} after {block_tokens}", "all sessions must have the same block_size"
            )
        start_s = num_sessions * options.session_gap_s
        base = next_id
        for t, record in _flatten(path, number, session):
            input_tokens = get_count(path, number, record, "in")
            runs = _runs(path, number, record, input_tokens // size + _SURPLUS_BLOCKS)
            if runs.size:
                next_id = max(next_id, base + int(runs.sum(axis=1).max()))
                runs[:, 0] += base
            requests.append(
                _Request(
                    start_s + t,
                    len(requests),
                    number,
                    get_text(path, number, session, "id"),
                    runs,
                    input_tokens,
                    get_count(path, number, record, "out"),
                    str(record.get("stop") or ""),
                )
            )
        num_sessions += 1
    requests.sort(key=lambda request: request[:2])
    builder = TraceBuilder(path.name, FORMAT.name, block_tokens, rechain=options.rechain)
    builder.notes += [
        f"the {num_sessions} sessions have separate clocks, so one starts every {options.session_gap_s:g} s (--session-gap)",
        "the class of a request is what ended its answer, such as tool_use or end_turn; it counts as known when the request arrives",
        "ids of trace blocks are local to a session, so tools and system prompts that sessions share count as misses",
    ]
    for request in requests:
        builder.add(
            request.line,
            _expand(request.runs),
            request.timestamp_s,
            request.input_tokens,
            request.output_tokens,
            session=request.session,
            request_class=request.ended_by,
        )
    return builder.finish()


def _flatten(path: Path, number: int, session: Record) -> Iterator[tuple[float, Record]]:
    """Yields the seconds since the session's start, and the request. The requests of a sub-agent are included."""
    for record in get_list(path, number, session, "requests"):
        if not isinstance(record, dict):
            raise bad_line(path, number, "'requests' is not a list of objects", "repair or delete the line")
        start = get_number(path, number, record, "t")
        if record.get("type") == "subagent":
            for t, nested in _flatten(path, number, record):
                yield start + t, nested
        else:
            yield start, record


def _runs(path: Path, number: int, record: Record, most: int) -> Runs:
    try:
        runs = np.array(get_list(path, number, record, "hash_runs"), dtype=np.int64).reshape(-1, 2)
    except (ValueError, TypeError, OverflowError):
        runs = np.full((1, 2), -1)
    if (runs < 0).any() or (runs >= _LARGEST_ID).any():
        raise bad_line(path, number, "'hash_runs' is not a list of [first id, count]", "repair or delete the line")
    if runs[:, 1].sum() > most:
        raise bad_line(
            path,
            number,
            f"'hash_runs' has {runs[:, 1].sum()} trace blocks in a prompt that fills {most}",
            "repair the line",
        )
    return runs


def _expand(runs: Runs) -> Int64:
    if runs.shape[0] == 1:
        return np.arange(runs[0, 0], runs[0, 0] + runs[0, 1], dtype=np.int64)
    ends = np.cumsum(runs[:, 1])
    return np.arange(ends[-1] if ends.size else 0, dtype=np.int64) + np.repeat(
        runs[:, 0] - ends + runs[:, 1], runs[:, 1]
    )


FORMAT = Format(
    "kv-cache-tester",
    "kv-cache-tester coding-agent sessions",
    matches,
    read,
    fields=("block_size", "requests", "hash_id_scope"),
)
