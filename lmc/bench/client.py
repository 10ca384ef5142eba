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

from lmc.bench.prompts import Request

READ_BUFFER_BYTES = 1 << 18
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
    logprobs: bool = True
    extra: Mapping[str, object] = field(default_factory=dict)


def new_session(target: Target) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s),
        read_bufsize=READ_BUFFER_BYTES,
    )


async def complete(
    session: aiohttp.ClientSession, target: Target, request: Request, request_id: str, intended_s: float
) -> Outcome:
    """Send one request and read its stream. A failure of the server or the network is not raised: it is in Outcome.status."""
    body = orjson.dumps(_payload(target, request, request_id), option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
    outcome = Outcome(request, intended_s, time.perf_counter())
    try:
        async with session.post(f"{target.base_url}/completions", data=body, headers=headers) as response:
            if response.status != 200:
                outcome.status, outcome.cause = "http_error", f"HTTP {response.status}: {_short(await response.text())}"
                return outcome
            await _read_stream(response, outcome)
    except TimeoutError:
        outcome.status, outcome.cause = "timeout", f"the stream did not end within {target.timeout_s:g} s"
    except aiohttp.ClientError as error:
        outcome.status, outcome.cause = "disconnected", type(error).__name__
    except asyncio.CancelledError:
        outcome.cause = "cancelled"
        raise
    return outcome


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    pending = b""
    read = response.content.readany
    while data := await read():
        now = time.perf_counter()
        pending += data
        *events, pending = pending.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data:"):
                continue
            payload = event[5:].lstrip()
            if payload == b"[DONE]":
                _finish(outcome)
                return
            try:
                chunk = orjson.loads(payload)
                if "error" in chunk:
                    outcome.status, outcome.cause = "http_error", _short(str(chunk["error"]))
                    return
                _take(chunk, outcome, now)
            except (ValueError, TypeError, KeyError, AttributeError):
                shown = _short(payload.decode(errors="replace"))
                outcome.status, outcome.cause = (
                    "bad_response",
                    f"the server sent something else than a completion: {shown}",
                )
                return
    outcome.status, outcome.cause = "disconnected", "the stream ended before [DONE]"


def _take(chunk: Any, outcome: Outcome, now: float) -> None:  # Any: one parsed event of the server
    for choice in chunk.get("choices", ()):
        logprobs = choice.get("logprobs")
        if logprobs:
            count = len(logprobs["tokens"])
            ids = choice.get("token_ids")  # SGLang's way; vLLM writes them in place of the texts as well
            if ids is None:
                ids = [int(token.removeprefix(TOKEN_ID_PREFIX)) for token in logprobs["tokens"]]
            outcome.tokens += ids
            chosen = logprobs.get("token_logprobs") or [-math.inf] * count
            outcome.gaps += map(gap_to_second, chosen, logprobs["top_logprobs"])
        else:
            count = 1 if choice.get("text") else 0
        if count:
            outcome.token_times_s += [now] * count
    usage = chunk.get("usage")
    if usage:
        outcome.prompt_tokens = usage.get("prompt_tokens")
        outcome.output_tokens = usage.get("completion_tokens") or 0
        details = usage.get("prompt_tokens_details") or {}
        outcome.cached_tokens = details.get("cached_tokens")


def gap_to_second(chosen: float, best: dict[str, float]) -> float:
    """Best minus second best log-probability of a greedy token; infinite if unknown, so that a difference there is no tie.

    SGLang names tokens by their texts; if the two best have the same text, `best` holds only the less likely one.
    """
    first, *others = sorted({chosen, *best.values()} if len(best) == 1 else best.values(), reverse=True)
    return first - others[0] if others else math.inf


def _finish(outcome: Outcome) -> None:
    if not outcome.token_times_s:
        outcome.status, outcome.cause = "bad_response", "the stream had no token before [DONE]"
        return
    sent = len(outcome.request.prompt)
    if outcome.prompt_tokens not in (None, sent):
        outcome.status = "bad_response"
        outcome.cause = (
            f"{sent} prompt tokens were sent, the server counted {outcome.prompt_tokens}: another tokenizer?"
        )
        return
    outcome.status = "ok"
    outcome.first_s, outcome.last_s = outcome.token_times_s[0], outcome.token_times_s[-1]
    outcome.output_tokens = outcome.output_tokens or len(outcome.token_times_s)


def _payload(target: Target, request: Request, request_id: str) -> dict[str, object]:
    """The body of a request. SGLang takes the request's id from it (rid), vLLM from a header."""
    payload: dict[str, object] = {
        "model": target.model,
        "rid": request_id,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.logprobs:
        payload |= {"logprobs": 2, "return_tokens_as_token_ids": True, "return_token_ids": True}
    payload.update(target.extra)
    return payload


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
