"""Sends one streamed completion: exact tokens go out, each arriving token gets a timestamp, each failure gets a cause.

The stream is split by hand, because at 40,000 tokens/s a general SSE parser costs more time than the server. Times are perf_counter
seconds.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from lmc.bench.access import Access
from lmc.bench.dialect import Dialect, payload
from lmc.bench.prompts import Request

TOKEN_ID_PREFIX = "token_id:"


@dataclass
class Outcome:
    """What happened to one request. A time is None if the request did not get that far; cached_tokens is None if it was not reported."""

    request: Request
    intended_s: float
    sent_s: float
    status: str = "unfinished"  # ok, http_error, timeout, disconnected, bad_response, unfinished
    cause: str = ""
    first_s: float | None = None
    last_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # best minus second best log-probability, per token
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    http_status: int | None = None
    finished: bool = False  # the server said why it ended, or counted the tokens
    opening: bool = False  # the first request of its connection in a closed loop

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def shift(self, by_s: float) -> None:
        """Add by_s to all times."""
        self.intended_s += by_s
        self.sent_s += by_s
        self.token_times_s = [moment + by_s for moment in self.token_times_s]
        if self.first_s is not None and self.last_s is not None:
            self.first_s, self.last_s = self.first_s + by_s, self.last_s + by_s


@dataclass(frozen=True)
class Target:
    """The server that requests go to: `base_url` ends in /v1, and `extra` is added to the body of every request."""

    base_url: str
    model: str
    timeout_s: float = 600.0
    extra: Mapping[str, object] = field(default_factory=dict)
    dialect: Dialect = field(default_factory=Dialect)
    access: Access = field(default_factory=Access)


def new_session(target: Target) -> aiohttp.ClientSession:
    return target.access.session(target.timeout_s)


async def complete(
    session: aiohttp.ClientSession, target: Target, request: Request, request_id: str, intended_s: float
) -> Outcome:
    """Send one request and read its stream. A failure of the server or the network is not raised: it is in Outcome.status."""
    asked = {**payload(target.dialect, target.model, request, request_id), **target.extra}
    body = orjson.dumps(asked, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {**target.access.headers, "Content-Type": "application/json", "X-Request-Id": request_id}
    outcome = Outcome(request, intended_s, time.perf_counter())
    try:
        async with session.post(f"{target.base_url}/{target.dialect.path}", data=body, headers=headers) as response:
            outcome.http_status = response.status
            if response.status != 200:
                outcome.status, outcome.cause = "http_error", f"HTTP {response.status}: {_short(await response.text())}"
                return outcome
            await _read_stream(response, outcome, target.dialect)
    except TimeoutError:
        outcome.status, outcome.cause = "timeout", f"the stream did not end within {target.timeout_s:g} s"
    except aiohttp.ClientError as error:
        outcome.status, outcome.cause = "disconnected", type(error).__name__
    except asyncio.CancelledError:
        outcome.cause = "cancelled"
        raise
    return outcome


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome, dialect: Dialect) -> None:
    pending = b""
    read = response.content.readany
    while data := await read():
        now = time.perf_counter()
        pending += data
        if b"\r" in pending:  # JSON has no bare CR, so each ends a line of the stream
            pending = pending.replace(b"\r\n", b"\n")
        *events, pending = pending.split(b"\n\n")
        for event in events:
            if _take_event(event, outcome, now):
                break
        else:
            continue
        break
    else:
        if pending.strip():
            _take_event(pending.strip(), outcome, time.perf_counter())
    if outcome.status != "unfinished":
        return
    if outcome.finished:
        _finish(outcome, dialect)
    else:
        outcome.status, outcome.cause = "disconnected", "the stream ended before [DONE]"


def _take_event(event: bytes, outcome: Outcome, now: float) -> bool:
    """Take one event; returns whether the stream is over, because it ended or is none."""
    if not event.startswith(b"data:"):  # a comment, or fields before the data
        event = next((line for line in event.split(b"\n") if line.startswith(b"data:")), b"")
        if not event:
            return False
    body = event[5:].strip()
    if body == b"[DONE]":
        outcome.finished = True
        return True
    try:
        chunk = orjson.loads(body)
        if chunk.get("error"):
            outcome.status, outcome.cause = "http_error", _short(str(chunk["error"]))
            return True
        _take(chunk, outcome, now)
    except (ValueError, TypeError, KeyError, AttributeError):
        shown = _short(body.decode(errors="replace"))
        outcome.status, outcome.cause = "bad_response", f"the server sent something else than a completion: {shown}"
        return True
    return False


def _take(chunk: Any, outcome: Outcome, now: float) -> None:  # Any: one parsed event of the server
    for choice in chunk.get("choices") or ():
        if choice.get("finish_reason") is not None:
            outcome.finished = True
        logprobs = choice.get("logprobs")
        if logprobs:
            listed = _chat_logprobs(logprobs["content"] or ()) if "content" in logprobs else logprobs
            count = len(listed["tokens"])
            ids = choice.get("token_ids")  # SGLang's way; vLLM writes them in place of the texts as well
            if ids is None:
                ids = [int(token.removeprefix(TOKEN_ID_PREFIX)) for token in listed["tokens"]]
            outcome.tokens += ids
            chosen = listed.get("token_logprobs") or [-math.inf] * count
            outcome.gaps += map(gap_to_second, chosen, listed["top_logprobs"])
        else:
            count = 1 if choice.get("text") or _says_something(choice.get("delta")) else 0
        if count:
            outcome.token_times_s += [now] * count
    usage = chunk.get("usage")
    if usage:
        outcome.finished |= not chunk.get("choices")  # some servers count in every event
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.output_tokens = usage.get("completion_tokens") or 0
        details = usage.get("prompt_tokens_details") or {}
        outcome.cached_tokens = details.get("cached_tokens")


def _says_something(delta: Any) -> bool:  # Any: part of a parsed event of a chat
    return bool(delta) and any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _chat_logprobs(content: Any) -> dict[str, list[Any]]:  # Any: part of a parsed event of a chat
    """In the form that completions have."""
    return {
        "tokens": [entry["token"] for entry in content],
        "token_logprobs": [entry["logprob"] for entry in content],
        "top_logprobs": [{best["token"]: best["logprob"] for best in entry["top_logprobs"]} for entry in content],
    }


def gap_to_second(chosen: float, best: dict[str, float]) -> float:
    """Best minus second best log-probability of a greedy token; infinite if unknown, so that a difference there is no tie.

    SGLang names tokens by their texts; if the two best have the same text, `best` holds only the less likely one.
    """
    first, *others = sorted({chosen, *best.values()} if len(best) == 1 else best.values(), reverse=True)
    return first - others[0] if others else math.inf


def _finish(outcome: Outcome, dialect: Dialect) -> None:
    if not outcome.token_times_s:
        outcome.status, outcome.cause = "bad_response", "the stream had no token before [DONE]"
        return
    sent = len(outcome.request.prompt)
    known = dialect.prompt_ids and dialect.added_tokens is not None
    if known and outcome.prompt_tokens not in (None, sent + (dialect.added_tokens or 0)):
        outcome.status = "bad_response"
        outcome.cause = (
            f"{sent} prompt tokens were sent, the server counted {outcome.prompt_tokens}: another tokenizer?"
        )
        return
    outcome.status = "ok"
    outcome.first_s, outcome.last_s = outcome.token_times_s[0], outcome.token_times_s[-1]
    outcome.output_tokens = outcome.output_tokens or len(outcome.token_times_s)


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
