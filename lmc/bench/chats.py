"""Reads prompts in the forms that people have: ShareGPT conversations, OpenAI chats with tools, and plain prompts.

A record is a JSON object. It holds `conversations` (ShareGPT), `messages` (a chat; also inside `body`, as in OpenAI's batch files), or a
`prompt`. Everything that cannot be sent is an error with its line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from lmc.bench.tokenizer import Message
from lmc.errors import TraceError, WorkloadError
from lmc.sim.formats.lines import Record, read_records

TURNS = ("conversations", "conversation")
PROMPTS = ("prompt", "text", "input")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
LIMITS = ("max_completion_tokens", "max_tokens", "output_tokens", "output_length")


@dataclass(frozen=True)
class Written:
    """One request as it was written: messages, or a text. `max_tokens` and `at_s` are None if the record does not say them."""

    messages: list[Message]
    text: str | None
    tools: list[Any] | None = None  # Any: JSON schemas of functions
    max_tokens: int | None = None
    at_s: float | None = None


def read_chats(path: Path) -> Iterator[list[Written]]:
    """The requests of each record, one per turn of a conversation. Raises WorkloadError with file and line."""
    try:
        for number, record in read_records(path):
            yield list(_requests(f"{path}, line {number}", record))
    except TraceError as error:
        raise WorkloadError(str(error)) from error


def _requests(where: str, record: Record) -> Iterator[Written]:
    body = record["body"] if isinstance(record.get("body"), dict) else record
    limit = _number(where, body, LIMITS)
    at_s = _number(where, record, ("timestamp",))
    tools = body.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise WorkloadError(f"{where}: 'tools' is not a list; write the tools of OpenAI's chat API, or none")
    rest = tools or None, None if limit is None else int(limit), at_s
    for field in TURNS:
        if isinstance(body.get(field), list):
            yield from _turns(where, body, field, rest)
            return
    if isinstance(body.get("messages"), list):
        messages = [_message(f"{where}, messages[{n}]", message) for n, message in enumerate(body["messages"])]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()  # the answer
        if not messages:
            raise WorkloadError(f"{where}: 'messages' asks nothing; end it with a message of the user or of a tool")
        yield Written(messages, None, *rest)
        return
    for field in PROMPTS:
        if isinstance(body.get(field), str) and body[field]:
            yield Written([], body[field], *rest)
            return
    raise WorkloadError(
        f"{where}: there is no prompt; give 'prompt' (text), 'messages' (a chat) or 'conversations' (ShareGPT)"
    )


def _turns(where: str, body: Record, field: str, rest: tuple[Any, ...]) -> Iterator[Written]:
    """A request for each message that the user wrote, with the conversation before it."""
    messages: list[Message] = []
    if isinstance(body.get("system"), str) and body["system"]:
        messages.append({"role": "system", "content": body["system"]})
    for number, turn in enumerate(body[field]):
        if not isinstance(turn, dict):
            raise WorkloadError(f"{where}, {field}[{number}] is not an object; remove the conversation")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise WorkloadError(f"{where}, {field}[{number}] has no text; write 'from' and 'value'")
        messages.append({"role": ROLES.get(role, role), "content": text})
        if messages[-1]["role"] == "user":
            yield Written(list(messages), None, *rest)


def _message(where: str, message: Any) -> Message:  # Any: a parsed JSON value
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise WorkloadError(f"{where} is not a message; write role and content")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not calls:
        raise WorkloadError(f"{where} has no content; write text or a list of text parts")
    found: Message = {**message, "content": content or ""}
    if calls:
        found["tool_calls"] = [_call(where, call) for call in calls] if isinstance(calls, list) else calls
    return found


def _part(where: str, part: Any) -> str:  # Any: a parsed JSON value
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise WorkloadError(f"{where} has a part of type {kind!r}; only text can be sent, so remove the line")
    return text


def _call(where: str, call: Any) -> dict[str, Any]:  # Any: a parsed JSON value
    """A tool call with its arguments as an object, because that is what chat templates take; the API's own form is text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise WorkloadError(f"{where} has a tool call without a function; write id, type and function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError as error:
            raise WorkloadError(
                f"{where} has a tool call whose arguments are not JSON: {error}; repair them"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}


def _number(where: str, record: Record, fields: tuple[str, ...]) -> float | None:
    for field in fields:
        value = record.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise WorkloadError(f"{where}: {field!r} is not a number; repair or remove it")
        return float(value)
    return None


def to_api(messages: tuple[Message, ...]) -> list[Message]:
    """The messages in the form of the chat API, where the arguments of a tool call are text."""
    return [
        {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": orjson.dumps(function["arguments"]).decode()}}
