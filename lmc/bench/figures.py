"""The figures of an arm, computed from its requests and counters. lmc.bench.verdict says whether they may be believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lmc.bench.engine_counters import REPORTED
from lmc.bench.records import ArmResult, PartFigures, RequestRecord
from lmc.bench.schedule import Plan
from lmc.bench.selfcheck import check_client
from lmc.bench.stages import ArmData, hits_by_tier
from lmc.bench.workload import Slo, Workload

PERCENTILES = (50, 90, 99)
MANY_CONNECTIONS = 16  # from here on the start of a closed loop is another load than the rest


def arm_figures(runs: Sequence[ArmData], records: Sequence[RequestRecord], workload: Workload, plan: Plan) -> ArmResult:
    """All figures of one arm over its requests, not judged yet; `runs` are its repeats."""
    first = runs[0]
    answered = [record for record in records if record.ok]
    failures = Counter(f"{r.status}: {r.cause}" for r in records if not r.ok)
    wall = sum(data.wall_s for data in runs)
    hits = [r.cached_tokens for r in answered]
    tiers = _added(hits_by_tier(data.after, data.before) for data in runs if data.after and data.before)
    told = [data.expected_by_tier for data in runs if data.expected_by_tier is not None]
    complete = len(told) == len(runs) and len(answered) == len(plan.items) * len(runs)
    expected = [r.expected_hit_tokens for r in answered]
    start = [r for r in answered if r.opening] if (plan.concurrency or 1) > MANY_CONNECTIONS else []
    apart = bool(start) and 2 * len(start) <= len(answered)
    prompt_tokens, output_tokens = sum(r.prompt_tokens for r in answered), sum(r.output_tokens for r in answered)
    return ArmResult(
        name=first.name,
        valid=True,
        problems=[],
        about=first.arm.about,
        command=first.command,
        requests=len(records),
        ok=len(answered),
        failures=dict(failures.most_common()),
        prompt_tokens=prompt_tokens,
        hit_tokens=None if any(h is None for h in hits) else sum(h or 0 for h in hits),
        hit_tokens_by_tier={tier: round(tokens) for tier, tokens in tiers.items()},
        expected_hit_tokens=None if any(e is None for e in expected) else sum(e or 0 for e in expected),
        output_tokens=output_tokens,
        wall_s=wall,
        ttft_ms=percentiles([r.ttft_ms for r in answered if not (apart and r.opening)]),
        tpot_ms=percentiles([r.tpot_ms for r in answered]),
        itl_ms=percentiles([gap for r in answered for gap in r.itl_ms]),
        e2e_ms=percentiles([r.e2e_ms for r in answered]),
        output_tokens_per_s=output_tokens / wall if wall else 0.0,
        total_tokens_per_s=(prompt_tokens + output_tokens) / wall if wall else 0.0,
        goodput_share=goodput(records, workload.slo),
        parts=[part_figures(part, records, plan.is_ordered) for part in workload.parts],
        phases=[phase for data in runs for phase in data.phases],
        timeline=first.timeline,
        counters=_added(map(_own_counters, runs)),
        self_check=check_client([stretch for data in runs for stretch in data.measured], apart),
        settings=first.arm.model_dump(),
        notes=first.notes,
        start_requests=len(start) if apart else 0,
        start_ttft_p50_ms=percentiles([r.ttft_ms for r in start]).get("p50") if apart else None,
        expected_hit_tokens_by_tier={tier: int(tokens) for tier, tokens in _added(told).items()} if complete else None,
    )


def part_figures(part: str, records: Sequence[RequestRecord], is_ordered: bool) -> PartFigures:
    mine = [r for r in records if r.part == part]
    ok = [r for r in mine if r.ok]
    hits = [r.cached_tokens for r in ok]
    wall = sum((r.e2e_ms or 0.0) / 1e3 for r in ok)
    if not is_ordered:
        wall = sum(_span([r for r in ok if r.repeat == repeat]) for repeat in {r.repeat for r in ok})
    return PartFigures(
        part=part,
        requests=len(mine),
        ok=len(ok),
        prompt_tokens=sum(r.prompt_tokens for r in ok),
        hit_tokens=None if any(h is None for h in hits) else sum(h or 0 for h in hits),
        output_tokens=sum(r.output_tokens for r in ok),
        wall_s=wall,
        ttft_p50_ms=percentiles([r.ttft_ms for r in ok]).get("p50"),
    )


def _span(records: Sequence[RequestRecord]) -> float:
    return max(r.intended_s + (r.e2e_ms or 0.0) / 1e3 for r in records) - min(r.intended_s for r in records)


def percentiles(values: Sequence[float | None]) -> dict[str, float]:
    known = np.array([value for value in values if value is not None])
    return {f"p{p}": float(np.percentile(known, p)) for p in PERCENTILES} if known.size else {}


def goodput(records: Sequence[RequestRecord], slo: Slo) -> float | None:
    """The share of all sent requests that were answered within every bound; None without bounds."""
    bounds = [(name, bound) for name, bound in slo.model_dump().items() if bound is not None]
    if not bounds or not records:
        return None
    good = [
        r
        for r in records
        if r.ok and all((value := getattr(r, name)) is None or value <= bound for name, bound in bounds)
    ]
    return len(good) / len(records)


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _own_counters(data: ArmData) -> dict[str, float]:
    """How much each counter of lmc and each cache counter of the engine grew during the measured load."""
    if data.after is None or data.before is None:
        return {}
    grown: dict[str, float] = {}
    for (name, labels), value in sorted(data.after.samples.items(), key=lambda item: (item[0][0], sorted(item[0][1]))):
        if not name.endswith("_total") or not name.startswith(REPORTED):
            continue
        shown = ",".join(f"{key}={place}" for key, place in sorted(labels) if key not in ("engine", "model_name"))
        grown[f"{name}{{{shown}}}"] = value - data.before.samples.get((name, labels), 0.0)
    return grown
