"""Reads vLLM's KV events, logged as JSON lines: batches {"ts", "events"} or single events with "type" and "ts".

Events tell which blocks were computed, not which were requested. A BlockStored event that continues a request within _SAME_REQUEST_S
(chunked prefill, decoding) belongs to that request; any other one begins a new request, with its parent's whole chain and the stored
blocks. A request that the engine's own cache served as a whole leaves no event, so hits are a lower bound. A trace block is a block of the
engine here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc.errors import TraceError
from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import get_list, get_seconds
from lmc.sim.formats.lines import Record, bad_line, read_records
from lmc.sim.trace import Trace

_SAME_REQUEST_S = 2.0
_FIELDS = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")


@dataclass
class _Request:
    line: int
    start_s: float
    last_s: float
    blocks: list[int]
    session: str | None


def matches(record: Record) -> bool:
    if isinstance(record.get("events"), list):
        return "ts" in record
    return record.get("type") in ("BlockStored", "BlockRemoved", "AllBlocksCleared") and "ts" in record


def read(path: Path, options: ReadOptions) -> Trace:
    builder = TraceBuilder(path.name, FORMAT.name, 1, sort=True, rechain=options.rechain)
    requests: list[_Request] = []
    ending_in: dict[int, _Request] = {}  # block -> the request that ends in it
    parent_of: dict[int, int] = {}  # block -> the block before it, -1 for the first of a chain
    block_tokens = 0
    cut_off = 0
    for number, now, event in _stored(path):
        size = event.get("block_size")
        if not isinstance(size, int) or size <= 0 or size != (block_tokens or size):
            raise bad_line(path, number, f"block_size is {size!r}", "it must be positive and the same in all events")
        block_tokens = size
        parent = event.get("parent_block_hash")
        blocks = builder.name_to_int(str(name) for name in get_list(path, number, event, "block_hashes"))
        if not blocks:
            continue
        before = -1 if parent is None else builder.name_to_int([str(parent)])[0]
        if before >= 0 and before not in parent_of:
            cut_off += 1
            parent_of[before] = -1
        request = ending_in.pop(before, None)
        if request is None or now - request.last_s > _SAME_REQUEST_S:
            session = event.get("session_id")
            request = _Request(number, now, now, _chain(before, parent_of), None if session is None else str(session))
            requests.append(request)
        for block in blocks:
            parent_of.setdefault(block, before)
            before = block
        request.blocks += blocks
        request.last_s = now
        ending_in[before] = request
    if not requests:
        raise TraceError(f"{path}: the log has no BlockStored event; log an engine with prefix caching and KV events")
    builder.block_tokens = block_tokens
    for request in requests:
        tokens = len(request.blocks) * block_tokens
        builder.add(request.line, request.blocks, request.start_s, tokens, 0, session=request.session)
    builder.notes.append(
        "requests were rebuilt from stored blocks; those that the engine's cache served as a whole are missing"
    )
    if cut_off:
        builder.notes.append(f"{cut_off} chains began before the log, so they are too short")
    return builder.finish()


def _chain(block: int, parent_of: dict[int, int]) -> list[int]:
    chain = []
    while block >= 0:
        chain.append(block)
        block = parent_of[block]
    return chain[::-1]


def _stored(path: Path) -> Iterator[tuple[int, float, Record]]:
    """Yields the BlockStored events of the device and of the first KV cache group, with line and seconds."""
    for number, record in read_records(path):
        now = get_seconds(path, number, record, "ts")
        for event in get_list(path, number, record, "events") if "events" in record else [record]:
            named = _named(event)
            if named.get("type") != "BlockStored":
                continue
            if (named.get("medium") or "GPU") == "GPU" and not named.get("group_idx"):
                yield number, now, named


def _named(event: Any) -> Record:
    """An event as an object; older engines write arrays. Any: parsed JSON."""
    if isinstance(event, list):
        return dict(zip(_FIELDS, event, strict=False))
    return event if isinstance(event, dict) else {}


FORMAT = Format("vllm-events", "vLLM KV events as JSON lines", matches, read)
