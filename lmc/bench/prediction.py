"""Predicts each arm's time to first token with the simulator's cost model, to be compared with the measured one.

The prefill model is fitted on the arms without lmc; the load rate comes from lmc's own counters. The arms with lmc are predicted from
their hits, and their times are not part of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmc.bench.records import Prediction, RequestRecord
from lmc.bench.workload import Arm
from lmc.errors import ConfigError
from lmc.sim.cost import CostModel, Prefill, TierCost, fit_prefill

MIN_FIT = 3


def predict(arms: Mapping[str, Arm], records: Mapping[str, Sequence[RequestRecord]]) -> list[Prediction]:
    """One prediction per arm that ran; it has no time if there are too few measurements to fit the model."""
    prefill = _fit([record for name in records if arms[name].cache is None for record in records[name] if record.ok])
    return [_predict_arm(name, [r for r in records[name] if r.ok], prefill, arms[name].cache) for name in records]


def _fit(records: Sequence[RequestRecord]) -> Prefill | None:
    usable = [r for r in records if r.service_ttft_ms and r.cached_tokens is not None]
    if len(usable) < MIN_FIT:
        return None
    try:
        return fit_prefill(
            [r.cached_tokens or 0 for r in usable],
            [r.prompt_tokens - (r.cached_tokens or 0) for r in usable],
            [(r.service_ttft_ms or 0.0) / 1e3 for r in usable],
        )
    except ConfigError:
        return None


def _predict_arm(
    name: str, records: Sequence[RequestRecord], prefill: Prefill | None, cache: dict[str, Any] | None
) -> Prediction:  # Any: settings of lmc; only their presence matters
    measured = [r.service_ttft_ms for r in records if r.service_ttft_ms is not None]
    expected = [r.expected_hit_tokens for r in records]
    known = [e for e in expected if e is not None]
    hits = [r.cached_tokens for r in records]
    predicted = break_even = rate = None
    if prefill is not None and records and len(known) == len(records):
        tokens = np.array([r.prompt_tokens for r in records], dtype=np.int64)
        loaded: dict[str, Any] = {}  # Any: int64 arrays by tier
        model = CostModel(prefill, 0)
        if cache is not None and (host := _host_tier(records)) is not None:
            token_bytes, tier = host
            rate = tier.bytes_per_s
            model = CostModel(prefill, token_bytes, {"host": tier})
            loaded = {"host": np.array(known, dtype=np.int64)}
            break_even = model.break_even_tokens("host")
            times, _ = model.serve(tokens, loaded)
        else:
            position = np.array(known, dtype=np.int64)
            times = prefill.seconds(position, tokens - position)
        predicted = float(np.median(times) * 1e3)
    return Prediction(
        arm=name,
        expected_hit_tokens=sum(known) if len(known) == len(expected) and records else None,
        measured_hit_tokens=None if any(h is None for h in hits) else sum(h or 0 for h in hits),
        predicted_ttft_p50_ms=predicted,
        measured_ttft_p50_ms=float(np.median(measured)) if measured else None,
        load_bytes_per_s=rate,
        break_even_tokens=break_even,
    )


def _host_tier(records: Sequence[RequestRecord]) -> tuple[int, TierCost] | None:
    """(bytes per token, tier) from the measured loads; None without loads."""
    loads = [r for r in records if r.load_bytes and r.load_ms and r.cached_tokens]
    if not loads:
        return None
    total_bytes = sum(r.load_bytes or 0.0 for r in loads)
    seconds = sum(r.load_ms or 0.0 for r in loads) / 1e3
    token_bytes = round(total_bytes / sum(r.cached_tokens or 0 for r in loads))
    return token_bytes, TierCost("host", total_bytes / seconds)
