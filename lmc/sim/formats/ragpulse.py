"""Reads RAGPulse: a request is a list of prompt components by id; companion files beside the trace give the length of each component.

A prompt is the sequence sys_prompt, passages, history, web_search, user_input. Each token of a component gets a number of its own, and the
full trace blocks of the prompt are chained as the cache chains chunks. So hits are prefix hits: a passage at another place is a miss.
"""

from __future__ import annotations

from array import array
from pathlib import Path

from lmc.errors import TraceError
from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.fields import get_count, get_list, get_seconds, get_text
from lmc.sim.formats.lines import Record, bad_line, read_records
from lmc.sim.formats.tokens import hash_tokens
from lmc.sim.trace import Trace

BLOCK_TOKENS = 16
# field in the trace, field in the companion, name of the companion
_COMPONENTS = (
    ("sys_prompt", "sys_prompt_id", "sys_prompt"),
    ("passages_ids", "passage_id", "passages"),
    ("history", "history_id", "history"),
    ("web_search", "web_search_id", "web_search"),
    ("user_input", "user_input_id", "user_input"),
)


def matches(record: Record) -> bool:
    return {"timestamp", "input_length", "hash_ids"} <= record.keys() and isinstance(record["hash_ids"], dict)


def read(path: Path, options: ReadOptions) -> Trace:
    places: dict[tuple[str, int], range] = {}  # component -> its token numbers, which no other component has
    next_token = 0
    for name, id_field, file_part in _COMPONENTS:
        companion = _companion(path, file_part)
        for number, record in read_records(companion):
            length = get_count(companion, number, record, "token_length")
            places[name, get_count(companion, number, record, id_field)] = range(next_token, next_token + length)
            next_token += length
    builder = TraceBuilder(path.name, FORMAT.name, options.block_tokens or BLOCK_TOKENS, sort=True)
    for number, record in read_records(path):
        tokens = array("I")
        for name, _, _ in _COMPONENTS:
            for component in get_list(path, number, {name: [], **_components(path, number, record)}, name):
                if not isinstance(component, int) or (name, component) not in places:
                    raise bad_line(
                        path, number, f"{name} {component!r} has no length", "use the companion files of this trace"
                    )
                tokens.extend(places[name, component])
        builder.add(
            number,
            hash_tokens(tokens, builder.block_tokens),
            get_seconds(path, number, record, "timestamp"),
            max(get_count(path, number, record, "input_length"), len(tokens)),
            get_count(path, number, record, "output_length", default=0),
            session=get_text(path, number, record, "session_id"),
        )
    builder.notes.append(
        f"system prompt, passages, history, search and user input were joined and cut into trace blocks of {builder.block_tokens} tokens"
    )
    return builder.finish()


def _components(path: Path, number: int, record: Record) -> Record:
    components = record.get("hash_ids")
    if not isinstance(components, dict):
        raise bad_line(path, number, "'hash_ids' is not a mapping of components", "repair or delete the line")
    return components


def inputs(path: Path, options: ReadOptions) -> list[Path]:
    return [path, *(_companion(path, file_part) for _, _, file_part in _COMPONENTS)]


def _companion(path: Path, part: str) -> Path:
    found = sorted(path.parent.glob(f"[0-9]_{part}.jsonl*"))
    if not found:
        raise TraceError(
            f"{path}: its companion file N_{part}.jsonl (lengths of components) is not beside it; copy it there"
        )
    return found[0]


FORMAT = Format("ragpulse", "RAGPulse component trace, with its companion files beside it", matches, read, inputs)
