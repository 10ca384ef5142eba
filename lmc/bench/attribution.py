"""Splits the time to first token into parts, from two sources.

lmc's spans are joined by request id and work at any load. Counters of the engine and of lmc are read before and after each request; they
are used only where one request runs at a time, because then their growth belongs to that request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lmc.bench.client import Outcome
from lmc.bench.counters import Counters, difference
from lmc.bench.spans import RequestSpan


@dataclass(frozen=True)
class Costs:
    """Measured times of one request. A field is None if neither the engine nor lmc reported it.

    The engine's counters give queue_ms and prefill_ms; prefill_ms lasts from the first scheduling to the first token and includes load_ms.
    stage_ms is the sum over the threads that copied from disk or a remote tier into host memory at the same time. lmc's spans give asked_ms
    (from the send to the cache's first lookup), lookup_ms (from then to the answer) and admit_ms (until the engine took the request in).
    """

    queue_ms: float | None = None
    prefill_ms: float | None = None
    load_ms: float | None = None
    load_bytes: float | None = None
    stage_ms: float | None = None
    asked_ms: float | None = None
    lookup_ms: float | None = None
    admit_ms: float | None = None
    cached_by_tier: Mapping[str, int] | None = None
    miss: str | None = None


@dataclass(frozen=True)
class TtftParts:
    """The time from the real send to the first token, in parts that add up to it. A part is None if it is not known.

    queue: the network, and the engine's handling and queue. lookup: asking remote tiers, and reading lower tiers into host memory. load:
    copying into the engine's memory. rest: the prefill of the tokens that were not loaded, and the way back; where a load overlaps with the
    prefill, that time counts as load.
    """

    ttft_queue_ms: float | None = None
    ttft_lookup_ms: float | None = None
    ttft_load_ms: float | None = None
    ttft_rest_ms: float | None = None
    load_gb_per_s: float | None = None


def request_costs(now: Counters, before: Counters) -> Costs:
    """The costs of one request, from the counters before and after it."""
    transfers = now.by_label("lmc_transfer_seconds_sum", "transfer")
    stages = [
        difference(now, before, "lmc_transfer_seconds_sum", transfer=name) or 0.0
        for name in transfers
        if "stage" in name
    ]
    return Costs(
        queue_ms=_ms(difference(now, before, "vllm:request_queue_time_seconds_sum")),
        prefill_ms=_ms(difference(now, before, "vllm:request_prefill_time_seconds_sum")),
        load_ms=_ms(difference(now, before, "lmc_transfer_seconds_sum", transfer="load")),
        load_bytes=difference(now, before, "lmc_transferred_bytes_total", transfer="load"),
        stage_ms=_ms(sum(stages)) if transfers else None,
    )


def with_span(costs: Costs, span: RequestSpan | None, outcome: Outcome, origin_s: float) -> Costs:
    """The costs with the span's times in place of the counters'. `origin_s` is the zero of the outcome's times, on this process's clock."""
    if span is None:
        return costs
    sent_s = origin_s + outcome.sent_s
    timed = span.load_bytes > 0 or not any(tokens for tier, tokens in span.hit_tokens.items() if tier != "device")
    return replace(
        costs,
        load_ms=span.load_s * 1e3 if timed else costs.load_ms,
        load_bytes=float(span.load_bytes) if timed else costs.load_bytes,
        asked_ms=max(0.0, span.asked_s - sent_s) * 1e3,
        lookup_ms=(span.answered_s - span.asked_s) * 1e3,
        admit_ms=(span.admitted_s - span.answered_s) * 1e3,
        cached_by_tier=span.hit_tokens,
        miss=span.miss,
    )


def ttft_parts(ttft_ms: float | None, costs: Costs) -> TtftParts:
    """The parts of `ttft_ms`, which counts from the real send."""
    load = costs.load_ms or 0.0
    rate = costs.load_bytes / load / 1e6 if costs.load_bytes and load else None
    if ttft_ms is None:
        return TtftParts(load_gb_per_s=rate)
    if costs.asked_ms is not None and costs.lookup_ms is not None and costs.admit_ms is not None:
        queue, lookup = costs.asked_ms + costs.admit_ms, costs.lookup_ms
        return TtftParts(queue, lookup, load, ttft_ms - queue - lookup - load, rate)
    if costs.prefill_ms is not None:
        return TtftParts(ttft_ms - costs.prefill_ms, None, load, costs.prefill_ms - load, rate)
    return TtftParts(load_gb_per_s=rate)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
