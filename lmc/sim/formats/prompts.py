"""Reads prompts as text: JSON objects with a prompt, a chat, a ShareGPT conversation, or an OpenAI request (also in a batch file).

The user's tokenizer cuts them into trace blocks. A conversation becomes one request for each of its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from lmc.errors import TraceError
from lmc.sim.build import TraceBuilder
from lmc.sim.formats.base import Format, ReadOptions
from lmc.sim.formats.chats import has_media, prompt_of, turns_of
from lmc.sim.formats.fields import Timestamps, class_of
from lmc.sim.formats.lines import Record, bad_line, read_records
from lmc.sim.formats.tokens import hash_tokens
from lmc.sim.trace import Trace

BLOCK_TOKENS = 16
_TEXT_FIELDS = ("input", "prompt", "text")
_CHAT_FIELDS = ("messages", "input")
_TURN_FIELDS = ("conversations", "conversation")


def matches(record: Record) -> bool:
    return _field_of(_request(record)) is not None


def read(path: Path, options: ReadOptions) -> Trace:
    encode = _tokenizer(path, options.tokenizer)
    builder = TraceBuilder(path.name, FORMAT.name, options.block_tokens or BLOCK_TOKENS, sort=options.sort)
    chats = media = False
    timestamps = Timestamps()
    for number, record in read_records(path):
        request = _request(record)
        session = record.get("session_id")
        arrival = timestamps.take(path, number, record)
        field = _field_of(request)
        if field is not None and isinstance(request[field], list):
            chats = True
            media = media or has_media(request, field)
        if field in _TURN_FIELDS and session is None:
            session = record.get("id", f"line {number}")
        for prompt, answer in _prompts(path, number, request, field):
            tokens = encode(prompt)
            builder.add(
                number,
                hash_tokens(tokens, builder.block_tokens),
                arrival,
                len(tokens),
                len(encode(answer)) if answer else 0,
                session=None if session is None else str(session),
                request_class=class_of(path, number, record) or _asked_by(request, field),
            )
    builder.notes.append(
        f"the prompts were tokenized with {options.tokenizer}; the tokenizer of another model gives other trace blocks"
    )
    if chats:
        builder.notes.append("chat messages were formatted as ChatML; the model's own template may differ")
    if media:
        builder.notes.append("images and sounds in messages count as a few tokens only")
    builder.notes += timestamps.notes
    return builder.finish()


def _request(record: Record) -> Record:
    """The request itself, which a batch file of OpenAI keeps in `body`."""
    body = record.get("body")
    return body if isinstance(body, dict) else record


def _field_of(request: Record) -> str | None:
    """The field that holds the prompt; None if there is none."""
    for fields, kind in ((_TURN_FIELDS, list), (("messages",), list), (_TEXT_FIELDS, str), (_CHAT_FIELDS, list)):
        for key in fields:
            if isinstance(request.get(key), kind):
                return key
    return None


def _asked_by(request: Record, field: str | None) -> str:
    """The role of a chat's last message, such as user or tool."""
    messages = request[field] if field is not None else None
    last = messages[-1] if isinstance(messages, list) and field == "messages" and messages else None
    return str(last.get("role", "")) if isinstance(last, dict) else ""


def _prompts(path: Path, number: int, request: Record, field: str | None) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of every request that an object stands for."""
    if field is None:
        raise bad_line(
            path,
            number,
            f"none of {', '.join(map(repr, (*_TEXT_FIELDS, 'messages', *_TURN_FIELDS)))} holds a prompt",
            "give a text, a list of messages or a conversation",
        )
    if field in _TURN_FIELDS:
        yield from turns_of(path, number, request, field)
        return
    answer = request.get("output", "")
    prompt = request[field] if isinstance(request[field], str) else prompt_of(path, number, request, field)
    yield prompt, answer if isinstance(answer, str) else ""


def inputs(path: Path, options: ReadOptions) -> list[Path]:
    return [path] if options.tokenizer is None else [path, _tokenizer_file(options.tokenizer)]


def _tokenizer_file(name: Path) -> Path:
    return name / "tokenizer.json" if name.is_dir() else name


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


FORMAT = Format(
    "prompts", "prompts, chats, ShareGPT or OpenAI requests as text, with --tokenizer", matches, read, inputs
)
