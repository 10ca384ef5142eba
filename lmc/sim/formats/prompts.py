"""Reads prompts as text: JSONL with `input`, `prompt`, `text` or chat `messages`. The user's tokenizer cuts them into trace blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lmc.errors import TraceError
from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.lines import Record, bad_line, get_list, get_number, read_records
from lmc.sim.formats.tokens import hash_tokens
from lmc.sim.trace import Trace

BLOCK_TOKENS = 16
_TEXT_FIELDS = ("input", "prompt", "text")
_MICROSECONDS, _MILLISECONDS = 1e14, 1e11  # an epoch time above these cannot be in seconds


def matches(record: Record) -> bool:
    return any(isinstance(record.get(key), str) for key in _TEXT_FIELDS) or isinstance(record.get("messages"), list)


def read(path: Path, options: ReadOptions) -> Trace:
    encode = _tokenizer(path, options.tokenizer)
    builder = TraceBuilder(path.name, FORMAT.name, options.block_tokens or BLOCK_TOKENS, sort=options.sort)
    timed = chats = False
    for number, record in read_records(path):
        chats = chats or "messages" in record
        timed = timed or "timestamp" in record
        tokens = encode(_prompt(path, number, record))
        output = record.get("output", "")
        session = record.get("session_id")
        builder.add(
            number,
            hash_tokens(tokens, builder.block_tokens),
            _seconds(get_number(path, number, record, "timestamp")) if "timestamp" in record else 0.0,
            len(tokens),
            len(encode(output)) if isinstance(output, str) else 0,
            session=None if session is None else str(session),
        )
    builder.notes.append(
        f"the prompts were tokenized with {options.tokenizer}; the tokenizer of another model gives other trace blocks"
    )
    if chats:
        builder.notes.append("chat messages were formatted as ChatML; the model's own template may differ")
    if not timed:
        builder.notes.append("the file has no timestamps, so all requests arrive at second 0, in the order of the file")
    return builder.finish()


def inputs(path: Path, options: ReadOptions) -> list[Path]:
    return [path] if options.tokenizer is None else [path, _tokenizer_file(options.tokenizer)]


def _tokenizer_file(name: Path) -> Path:
    return name / "tokenizer.json" if name.is_dir() else name


def _prompt(path: Path, number: int, record: Record) -> str:
    for key in _TEXT_FIELDS:
        if isinstance(record.get(key), str):
            return str(record[key])
    parts = []
    for message in get_list(path, number, record, "messages"):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise bad_line(
                path, number, "a message has no text content", "remove the line; only text chats can be read"
            )
        parts.append(f"<|im_start|>{message.get('role', 'user')}\n{message['content']}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


def _seconds(timestamp: float) -> float:
    if timestamp > _MICROSECONDS:
        return timestamp / 1e6
    return timestamp / 1e3 if timestamp > _MILLISECONDS else timestamp


def _tokenizer(path: Path, name: Path | None) -> Callable[[str], list[int]]:
    if name is None:
        raise TraceError(
            f"{path} holds prompts as text; give a tokenizer.json, or a model folder that has one, with --tokenizer"
        )
    file = _tokenizer_file(name)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TraceError(f"{path} holds prompts as text; pip install tokenizers to read them") from None
    if not file.is_file():
        raise TraceError(
            f"{file} is not there; give a tokenizer.json, or a model folder that has one, with --tokenizer"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a bad file
        raise TraceError(f"{file} is not a tokenizer ({error}); give a tokenizer.json") from None

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return encode


FORMAT = Format("prompts", "prompts or chats as text, with --tokenizer", matches, read, inputs)
