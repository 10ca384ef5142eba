"""Where the time to first token went. Two sources, kept apart: lmc's spans, joined by request id, at any load; and counters of the engine
and of lmc, read before and after each request where one runs at a time, because then their growth belongs to that request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lmc.bench.client import Outcome
from lmc.bench.counters import Counters, difference
from lmc.bench.spans import RequestSpan


@dataclass(frozen=True)
class Costs:
    """What is known of one request; None: nobody told.

    Counters of the engine: queue_ms, and prefill_ms from the first scheduling to the first token, which holds load_ms. stage_ms (from disk
    or a remote tier into host memory) adds up threads that ran side by side. Spans of lmc: asked_ms from the send to the cache's first
    lookup, lookup_ms until that was answered, admit_ms until the engine took the request in.
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
    """The time from the real send to the first token, in parts that add up; None: unknown.

    queue: network, the engine's handling and queue. lookup: remote tiers were asked, and lower tiers read into host memory. load: into the
    engine's memory. rest: the prefill of what was not loaded, and the way back; a load that overlaps with it counts as load.
    """

    ttft_queue_ms: float | None = None
    ttft_lookup_ms: float | None = None
    ttft_load_ms: float | None = None
    ttft_rest_ms: float | None = None
    load_gb_per_s: float | None = None


def request_costs(now: Counters, before: Counters) -> Costs:
    """From two readings of counters with one request between them."""
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
    """`origin_s` is where the outcome's times begin, on this process's clock. What a span says goes before counters."""
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
    """`ttft_ms` counts from the real send."""
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
