"""Reads lmc's spans of the measured requests (GET /requests) and converts their times to this process's clock."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

CLOCK_READINGS = 5
# vLLM wraps the client's X-Request-Id: it adds the number of the prompt and, in newer releases, random digits.
_VLLM_IDS = (re.compile(r"cmpl-(.+)-\d+-[0-9a-f]{8}"), re.compile(r"cmpl-(.+)-\d+"))


@dataclass(frozen=True)
class RequestSpan:
    """Times are perf_counter seconds of this process; their error is at most half a round trip to the server."""

    hit_tokens: dict[str, int]
    miss: str | None
    asked_s: float
    answered_s: float
    admitted_s: float
    load_bytes: int
    load_s: float


async def read_spans(http: aiohttp.ClientSession, metrics: Sequence[str]) -> dict[str, RequestSpan]:
    """The spans by the id that the client sent. Pages without spans are skipped. Raises aiohttp.ClientError if a server is gone."""
    found: dict[str, RequestSpan] = {}
    for page in metrics:
        url = page.removesuffix("/metrics") + "/requests"
        offset_s = await _clock_offset(http, url)
        if offset_s is None:
            continue
        async with http.get(url) as response:
            answer = await response.json(content_type=None)
        for span in answer["requests"]:
            found[client_id(span["request"])] = RequestSpan(
                hit_tokens=span["hit_tokens"],
                miss=span["miss"],
                asked_s=span["asked_s"] + offset_s,
                answered_s=span["answered_s"] + offset_s,
                admitted_s=span["admitted_s"] + offset_s,
                load_bytes=span["load_bytes"],
                load_s=span["load_seconds"],
            )
    return found


def client_id(engine_id: str) -> str:
    """The client's request id. vLLM wraps it, SGLang keeps it."""
    wrapped = next(filter(None, (form.fullmatch(engine_id) for form in _VLLM_IDS)), None)
    return wrapped.group(1) if wrapped else engine_id


async def _clock_offset(http: aiohttp.ClientSession, url: str) -> float | None:
    """The seconds to add to the server's times; None if the page has no spans.

    The reading with the shortest round trip decides. The offset is 0 if that reading allows it, because processes of one machine share a
    clock; otherwise the server is assumed to have answered in the middle of the round trip.
    """
    best_s = offset_s = None
    for _ in range(CLOCK_READINGS):
        began = time.perf_counter()
        async with http.get(url, params={"newest": "0"}) as response:
            if response.status != 200:
                return None
            now_s = (await response.json(content_type=None))["now_s"]
        ended = time.perf_counter()
        if best_s is None or ended - began < best_s:
            best_s = ended - began
            offset_s = 0.0 if began <= now_s <= ended else (began + ended) / 2 - now_s
    return offset_s
