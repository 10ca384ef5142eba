"""Reads Mooncake JSONL: {"timestamp": ms, "input_length", "output_length", "hash_ids": [a chained id per trace block]}."""

from __future__ import annotations

from pathlib import Path

from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.lines import Record, bad_line, get_count, get_list, get_number, read_records
from lmc.sim.trace import Trace

BLOCK_TOKENS = 512


def matches(record: Record) -> bool:
    return {"timestamp", "input_length", "hash_ids"} <= record.keys() and isinstance(record["hash_ids"], list)


def read(path: Path, options: ReadOptions) -> Trace:
    builder = TraceBuilder(path.name, FORMAT.name, BLOCK_TOKENS, sort=options.sort, rechain=options.rechain)
    smallest, largest = 1, 2**62  # bounds of the block_tokens with which each length fills exactly its hash_ids
    for number, record in read_records(path):
        hashes = get_list(path, number, record, "hash_ids")
        input_tokens = get_count(path, number, record, "input_length")
        try:
            builder.add(
                number,
                hashes,
                get_number(path, number, record, "timestamp") / 1e3,
                input_tokens,
                get_count(path, number, record, "output_length"),
            )
        except (TypeError, OverflowError):
            raise bad_line(path, number, "'hash_ids' is not a list of 64-bit integers", "repair the line") from None
        if hashes:
            smallest = max(smallest, -(-input_tokens // len(hashes)))
            if len(hashes) > 1:
                largest = min(largest, (input_tokens - 1) // (len(hashes) - 1))
    builder.block_tokens = options.block_tokens or _block_tokens(smallest, largest, builder.notes)
    return builder.finish()


def _block_tokens(smallest: int, largest: int, notes: list[str]) -> int:
    if smallest <= BLOCK_TOKENS <= largest:
        return BLOCK_TOKENS
    power = 1 << (smallest - 1).bit_length()
    if power <= largest:
        notes.append(f"trace blocks have {power} tokens by the lengths of the requests (the format does not say it)")
        return power
    notes.append(
        f"trace blocks are assumed to have {BLOCK_TOKENS} tokens, because lengths and numbers of ids disagree; --block-tokens changes it"
    )
    return BLOCK_TOKENS


FORMAT = Format("mooncake", "Mooncake JSONL, chained hash_ids of 512-token trace blocks", matches, read)
