"""Where the time to first token went: counters of the engine and of lmc, read before and after each request.

Exact where one request runs at a time, because then a counter's growth belongs to that request; otherwise there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmc.bench.counters import Counters, difference


@dataclass(frozen=True)
class Costs:
    """Parts of one request. prefill_ms is from the first scheduling to the first token and holds load_ms; stage_ms (from disk or a
    remote tier into host memory) adds up threads that ran side by side. None: nobody counted it."""

    queue_ms: float | None = None
    prefill_ms: float | None = None
    load_ms: float | None = None
    load_bytes: float | None = None
    stage_ms: float | None = None


def request_costs(now: Counters, before: Counters) -> Costs:
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


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
