"""Turns chats as APIs and data sets write them into the text that a model reads. The layout is ChatML; a model's own template may differ.

Chats are OpenAI's messages (content as text or parts, tool calls, tools) and ShareGPT's conversations. Of an image or a sound only a digest
enters the text, so that equal ones stay equal; its tokens are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from blake3 import blake3

from lmc.sim.formats.lines import Record, bad_line

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking", "reasoning_text")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_ANSWERING = "assistant"
_DIGEST_BYTES = 8


def prompt_of(path: Path, number: int, record: Record, key: str) -> str:
    """The prompt of a request whose messages are in this field. Raises TraceError for a message that has no content."""
    parts = [_tools(record["tools"])] if isinstance(record.get("tools"), list) and record["tools"] else []
    for index, message in enumerate(record[key]):
        parts.append(_message(path, number, f"{key}[{index}]", message))
    return "".join(parts) + _turn_begins(_ANSWERING)


def turns_of(path: Path, number: int, record: Record, key: str) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of every answer in a ShareGPT conversation, each prompt with all turns before it. Raises TraceError."""
    before = _turn("system", record["system"]) if isinstance(record.get("system"), str) and record["system"] else ""
    for index, turn in enumerate(record[key]):
        place = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise bad_line(path, number, f"{place!r} is not an object", "remove the conversation")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise bad_line(
                path, number, f"{place!r} has no text in 'from' or 'value'", 'write {"from": ROLE, "value": TEXT}'
            )
        role = _ROLES.get(role, role)
        if role == _ANSWERING:
            yield before + _turn_begins(role), text
        before += _turn(role, text)


def has_media(record: Record, key: str) -> bool:
    """Whether a message has a part that is not text."""
    return any(
        isinstance(part, dict) and part.get("type") not in _TEXT_PARTS
        for message in record[key]
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def _message(path: Path, number: int, place: str, message: Any) -> str:  # Any: a parsed JSON value
    if not isinstance(message, dict):
        raise bad_line(path, number, f"{place!r} is not an object", "remove the line, or write {role, content}")
    kind = message.get("type", "message")
    if kind == "function_call":  # of OpenAI's Responses API, as the next one
        return _turn(_ANSWERING, _call(message))
    if kind == "function_call_output":
        return _turn("tool", _content(path, number, f"{place}.output", message.get("output")))
    calls = message.get("tool_calls")
    called = (
        [_call(call.get("function", call)) for call in calls if isinstance(call, dict)]
        if isinstance(calls, list)
        else []
    )
    if isinstance(message.get("function_call"), dict):
        called.append(_call(message["function_call"]))
    content = message.get("content")
    if content is None and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    text = "" if content is None and called else _content(path, number, f"{place}.content", content)
    return _turn(str(message.get("role", "user")), "\n".join([*([text] if text else []), *called]))


def _content(path: Path, number: int, place: str, content: Any) -> str:  # Any: a parsed JSON value
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_line(
            path,
            number,
            f"a message has no text content in {place!r}",
            "write text or a list of parts, or remove the line",
        )
    found = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            found.append(part)
            continue
        if not isinstance(part, dict) or not isinstance(part.get("type", "text"), str):
            raise bad_line(path, number, f"'{place}[{index}]' is not a part", 'write {"type": "text", "text": TEXT}')
        kind = part.get("type", "text")
        text = part.get("text", part.get(kind))
        if kind in _TEXT_PARTS:
            if not isinstance(text, str):
                raise bad_line(path, number, f"'{place}[{index}].text' is not text", "write text, or remove the part")
            found.append(text)
        elif kind == "tool_result" and "content" in part:
            found.append(_content(path, number, f"{place}[{index}].content", part["content"]))
        elif kind == "tool_use":
            found.append(_call({"name": part.get("name"), "arguments": part.get("input")}))
        else:
            found.append(f"<|{kind} {blake3(orjson.dumps(part)).hexdigest(_DIGEST_BYTES)}|>")
    return "".join(found)


def _call(function: Any) -> str:  # Any: a parsed JSON value
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    shown = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    return f'<tool_call>\n{{"name": "{name}", "arguments": {shown}}}\n</tool_call>'


def _tools(tools: list[Any]) -> str:  # Any: parsed JSON values
    lines = "\n".join(orjson.dumps(tool).decode() for tool in tools)
    return _turn("system", f"# Tools\n\n<tools>\n{lines}\n</tools>")


def _turn_begins(role: str) -> str:
    return f"<|im_start|>{role}\n"


def _turn(role: str, text: str) -> str:
    return f"{_turn_begins(role)}{text}<|im_end|>\n"
