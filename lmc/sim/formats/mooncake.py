"""Reads Mooncake JSONL: {"timestamp": ms, "input_length", "output_length", "hash_ids": [a chained id per trace block]}.

AIPerf and Dynamo write the same rows with some fields left out: a row without hash_ids has a prompt that nothing shares, and a row with a
delay (ms) instead of a timestamp follows the row before it of the same session_id.
"""

from __future__ import annotations

from pathlib import Path

from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import Hashes, Timestamps, class_of, get_count, get_number
from lmc.sim.formats.lines import Record, bad_line, read_records
from lmc.sim.trace import Trace

BLOCK_TOKENS = 512


def matches(record: Record) -> bool:
    return "input_length" in record and isinstance(record.get("hash_ids", []), list)


def read(path: Path, options: ReadOptions) -> Trace:
    builder = TraceBuilder(path.name, FORMAT.name, BLOCK_TOKENS, sort=options.sort, rechain=options.rechain)
    hashes = Hashes()
    clock = _Clock(options.session_gap_s)
    smallest, largest = 1, 2**62  # bounds of the block_tokens with which each length fills exactly its hash_ids
    unnamed: list[int] = []  # lines without hash_ids
    for number, record in read_records(path):
        ids = hashes.take(path, number, record, "hash_ids") if "hash_ids" in record else []
        if "hash_ids" not in record:
            unnamed.append(number)
        input_tokens = get_count(path, number, record, "input_length")
        builder.add(
            number,
            ids,
            clock.arrival(path, number, record),
            input_tokens,
            get_count(path, number, record, "output_length", default=0),
            session=clock.session(record),
            request_class=class_of(path, number, record),
        )
        if ids:
            smallest = max(smallest, -(-input_tokens // len(ids)))
            if len(ids) > 1:
                largest = min(largest, (input_tokens - 1) // (len(ids) - 1))
    if unnamed and not hashes.taken:
        raise bad_line(
            path,
            unnamed[0],
            "'hash_ids' is missing, as in every line, so nothing says what prompts share",
            "add a list with the chained hash of each trace block of the prompt",
        )
    if unnamed:
        builder.notes.append(
            f"{len(unnamed)} requests have no 'hash_ids' (first: line {unnamed[0]}) and count as prompts that nothing shares"
        )
    builder.notes += clock.notes
    builder.sort = builder.sort or clock.delays
    builder.block_tokens = options.block_tokens or _block_tokens(smallest, largest, builder.notes)
    return builder.finish()


class _Clock:
    """Finds when each request arrives, from timestamps, from delays within a session, or from the order of the lines."""

    def __init__(self, session_gap_s: float) -> None:
        self.delays = False
        self._session_gap_s = session_gap_s
        self._started = 0  # sessions without a timestamp
        self._last_s: dict[str, float] = {}
        self._timestamps = Timestamps(  # of lines that have no delay
            1e-3, "give one in every line or in none, or a 'delay' after the line before of the session"
        )

    def arrival(self, path: Path, number: int, record: Record) -> float:
        session = self.session(record)
        if record.get("timestamp") is None and record.get("delay") is not None:
            if session is None:
                raise bad_line(path, number, "'session_id' is missing beside 'delay'", "add it, or give a 'timestamp'")
            self.delays = True
            delay_s = get_number(path, number, record, "delay") / 1e3
            if session in self._last_s:
                arrival_s = self._last_s[session] + delay_s
            else:
                arrival_s = self._started * self._session_gap_s + delay_s
                self._started += 1
        else:
            arrival_s = self._timestamps.take(path, number, record)
        if session is not None:
            self._last_s[session] = arrival_s
        return arrival_s

    def session(self, record: Record) -> str | None:
        return None if record.get("session_id") is None else str(record["session_id"])

    @property
    def notes(self) -> list[str]:
        found = []
        if self.delays:
            found.append(
                "a delay counts from the arrival of the request before, because the time of its answer is not known"
            )
        if self._started:
            found.append(
                f"{self._started} sessions have no timestamp, so one starts every {self._session_gap_s:g} s (--session-gap)"
            )
        return found + self._timestamps.notes


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


FORMAT = Format(
    "mooncake",
    "Mooncake JSONL, chained hash_ids of 512-token trace blocks",
    matches,
    read,
    fields=("timestamp", "input_length", "hash_ids"),
)
