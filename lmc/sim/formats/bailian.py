"""Reads Qwen/Bailian usage traces: JSONL like Mooncake's, with seconds, 16-token trace blocks, and chats linked by parent_chat_id."""

from __future__ import annotations

from pathlib import Path

from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import Hashes, get_count, get_seconds
from lmc.sim.formats.lines import Record, bad_line, read_records
from lmc.sim.trace import Trace

BLOCK_TOKENS = 16


def matches(record: Record) -> bool:
    return {"chat_id", "timestamp", "input_length", "hash_ids"} <= record.keys()


def read(path: Path, options: ReadOptions) -> Trace:
    builder = TraceBuilder(
        path.name, FORMAT.name, options.block_tokens or BLOCK_TOKENS, sort=options.sort, rechain=options.rechain
    )
    hashes = Hashes()
    session_of: dict[int, int] = {}  # chat -> first chat of its conversation
    for number, record in read_records(path):
        chat = record.get("chat_id")
        parent = record.get("parent_chat_id", -1)
        if not isinstance(chat, int) or not isinstance(parent, int):
            raise bad_line(path, number, "'chat_id' or 'parent_chat_id' is not a whole number", "repair the line")
        session_of[chat] = session_of.get(parent, chat if parent < 0 else parent)
        builder.add(
            number,
            hashes.take(path, number, record, "hash_ids"),
            get_seconds(path, number, record, "timestamp"),
            get_count(path, number, record, "input_length"),
            get_count(path, number, record, "output_length", default=0),
            tenant=str(record.get("type", "")),
            session=str(session_of[chat]),
            request_class=str(record.get("type", "")),
        )
    return builder.finish()


FORMAT = Format(
    "bailian",
    "Qwen/Bailian usage trace, 16-token trace blocks; the request type is the group",
    matches,
    read,
    fields=("chat_id", "timestamp", "input_length", "hash_ids"),
)
