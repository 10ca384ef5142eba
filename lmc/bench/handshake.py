"""Finds the dialect of a running server: one request with everything; if the server refuses it, one more for every option.

Servers that follow OpenAI's schema to the letter refuse what vLLM and SGLang add to it.
"""

from __future__ import annotations

import time
from dataclasses import replace

import aiohttp

from lmc.bench.client import Outcome, Target, complete
from lmc.bench.dialect import Dialect
from lmc.bench.prompts import Request
from lmc.errors import RunError

OPTIONS = ("prompt_ids", "usage", "ignore_eos", "token_ids", "request_id")
REFUSED = (400, 404, 405, 415, 422, 501)
FALLS_AWAY = {
    "prompt_ids": "prompts are sent as text: their lengths are those that the server counts, and hits are not predicted",
    "usage": "the server does not count tokens: output tokens are the events of the stream, and hits are unknown",
    "ignore_eos": "the model ends its answers where it likes, so output lengths differ",
    "token_ids": "the server does not name its tokens, so outputs are not compared",
}


async def learn(http: aiohttp.ClientSession, target: Target, request: Request) -> tuple[Dialect, list[str]]:
    """The dialect of the server, and a line for each measurement that falls away.

    Raises RunError if the server refuses even a plain request, or fails for another reason than what it was asked.
    """
    asked = replace(target.dialect, added_tokens=None, prompt_ids=target.dialect.api != "chat")
    outcome = await _try(http, target, asked, request)
    if not outcome.ok:
        asked, outcome = await _plain(http, target, asked, request)
        for option in OPTIONS:
            if option == "prompt_ids" and asked.api == "chat":
                continue
            wider = _with(asked, {option: True})
            answer = await _try(http, target, wider, request)
            if answer.ok:
                asked, outcome = wider, answer
    return _checked(target, asked, outcome, request)


async def _plain(
    http: aiohttp.ClientSession, target: Target, asked: Dialect, request: Request
) -> tuple[Dialect, Outcome]:
    plain = _with(asked, dict.fromkeys(OPTIONS, False))
    outcome = await _try(http, target, plain, request)
    if not outcome.ok and "max_completion_tokens" in outcome.cause:
        plain = replace(plain, limit="max_completion_tokens")
        outcome = await _try(http, target, plain, request)
    if not outcome.ok:
        other = "completions" if plain.api == "chat" else "chat"
        hint = f"; does the server have the other API (--api {other})?" if outcome.http_status in (404, 405) else ""
        raise RunError(f"{target.base_url} refuses a plain request: {outcome.cause}{hint}")
    return plain, outcome


async def _try(http: aiohttp.ClientSession, target: Target, dialect: Dialect, request: Request) -> Outcome:
    """One request. Raises RunError if it fails for another reason than what it asked for."""
    outcome = await complete(http, replace(target, dialect=dialect), request, "before/handshake", time.perf_counter())
    if outcome.http_status in (401, 403):
        raise RunError(
            f"{target.base_url} refuses the key (HTTP {outcome.http_status}); set LMC_BENCH_API_KEY, or give --header"
        )
    if outcome.ok or outcome.status == "bad_response" or outcome.http_status in REFUSED:
        return outcome
    raise RunError(f"{target.base_url} failed at the first request: {outcome.status}: {outcome.cause}")


def _with(dialect: Dialect, options: dict[str, bool]) -> Dialect:
    return replace(dialect, **options)  # type: ignore[arg-type]


def _checked(target: Target, asked: Dialect, outcome: Outcome, request: Request) -> tuple[Dialect, list[str]]:
    """The dialect without what the server took and then left out of its answer."""
    usage = asked.usage and outcome.prompt_tokens is not None
    found = replace(asked, usage=usage, token_ids=asked.token_ids and bool(outcome.tokens))
    notes = [line for option, line in FALLS_AWAY.items() if not getattr(found, option)]
    if asked.api == "chat":
        notes[0] = "prompts are sent as messages" + notes[0].removeprefix("prompts are sent as text")
    if not found.prompt_ids or outcome.prompt_tokens is None:
        return found, notes
    added = outcome.prompt_tokens - len(request.prompt)
    if added not in (0, 1):
        raise RunError(
            f"{target.base_url} counts {outcome.prompt_tokens} tokens where {len(request.prompt)} were sent; "
            "does it have another tokenizer (--tokenizer)?"
        )
    if added:
        notes.append("the server adds a token to every prompt (BOS), which counts as a prompt token")
    return replace(found, added_tokens=added), notes
