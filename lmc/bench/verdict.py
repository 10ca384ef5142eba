"""From what an arm gave to its figures, and whether they may be believed.

An arm is invalid when its hits are not those the simulator expects, its client lagged, requests failed or were not sent, it was not
empty at the start, or its greedy outputs differ from the reference arm's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lmc.bench.counters import Counters
from lmc.bench.engine_counters import REPORTED, pool
from lmc.bench.expected import expected_hits
from lmc.bench.prompts import Request
from lmc.bench.records import ArmResult, OutputCheck, PartFigures, RequestRecord
from lmc.bench.schedule import Plan
from lmc.bench.selfcheck import check_client
from lmc.bench.stages import ArmData, hits_by_tier
from lmc.bench.workload import Arm, Slo, Workload
from lmc.cache.config import CacheConfig, chunk_tokens_for

PERCENTILES = (50, 90, 99)
HIT_SLACK = 0.02  # of prompt tokens, where the order of requests is not fixed


def arm_expectation(
    arm: Arm, plan: Plan, counters: Counters | None, seen: Sequence[Request], before: Sequence[Request]
) -> tuple[list[int] | None, bool]:
    """Expected hit tokens of each planned request, and whether they must hold to the token.

    `before` was sent to this very engine ahead of the load; `seen` to the arm whose disk this one kept.
    """
    requests = [item.request for item in plan.items]
    if arm.reuse == "unknown" or counters is None:
        return None, False
    if arm.reuse == "none":
        return [0] * len(requests), True
    space = pool(counters)
    block_tokens = space.block_tokens if space is not None else 0
    if arm.reuse == "engine":
        if space is None:
            return None, False
        blocks = space.num_blocks
        if not space.is_exact:  # then only what needs no forgetting can be told: all beside the longest request
            blocks -= max(-(-(len(r.prompt) + r.output_tokens) // block_tokens) for r in requests)
        hits = expected_hits(requests, block_tokens, max(blocks, 0), before)
        fits = hits == expected_hits(requests, block_tokens, np.inf, before)
        return (hits, plan.is_ordered and fits) if fits or space.is_exact else (None, False)
    settings = CacheConfig.model_validate(arm.cache or {})
    chunk_tokens = chunk_tokens_for(settings, block_tokens or 1)
    remote = settings.redis.url is not None or settings.s3.bucket is not None
    capacity = np.inf if remote else max(counters.by_label("lmc_slots", "tier").values(), default=np.inf)
    hits = expected_hits(requests, chunk_tokens, capacity, [*seen, *before])
    fits = hits == expected_hits(requests, chunk_tokens, np.inf, [*seen, *before])
    # What one instance stores, another one sees only once it is written.
    return hits, plan.is_ordered and fits and arm.instances == 1


def hit_problems(records: Sequence[RequestRecord], exact: bool) -> list[str]:
    """Where the measured hits are not the expected ones."""
    known = [r for r in records if r.ok and r.cached_tokens is not None and r.expected_hit_tokens is not None]
    off = [r for r in known if r.cached_tokens != r.expected_hit_tokens]
    if exact:
        if not off:
            return []
        worst = off[0]
        return [
            f"hits are off for {len(off)} of {len(known)} requests: "
            f"{worst.request_id} hit {worst.cached_tokens} tokens, the simulator expects {worst.expected_hit_tokens}"
        ]
    measured, wanted = sum(r.cached_tokens or 0 for r in known), sum(r.expected_hit_tokens or 0 for r in known)
    total = sum(r.prompt_tokens for r in known)
    if total and abs(measured - wanted) > HIT_SLACK * total:
        return [f"hit rate is off: {measured:,} tokens hit, the simulator expects {wanted:,} of {total:,}"]
    return []


def counter_problems(records: Sequence[RequestRecord], tiers: Mapping[str, float]) -> list[str]:
    """What responses report and what engine and cache count must agree; not judged where a request failed or a part is not counted."""
    hits = [r.cached_tokens for r in records]
    if "device" not in tiers or not all(r.ok for r in records) or any(h is None for h in hits):
        return []
    reported, counted = sum(h or 0 for h in hits), round(sum(tiers.values()))
    if reported == counted:
        return []
    return [f"responses report {reported:,} hit tokens, the counters of engine and cache {counted:,}"]


def tier_problems(expected: Mapping[str, float] | None, measured: Mapping[str, float]) -> list[str]:
    """Where hits did not come from the tier that the simulator expects."""
    return [
        f"hits of tier {tier} are off: {measured.get(tier, 0):,.0f} tokens, the simulator expects {tokens:,.0f}"
        for tier, tokens in (expected or {}).items()
        if measured.get(tier, 0) != tokens
    ]


def arm_result(
    runs: Sequence[ArmData],
    records: Sequence[RequestRecord],
    workload: Workload,
    plan: Plan,
    exact: bool,
    outputs: OutputCheck | None,
) -> ArmResult:
    """All figures of one arm over its requests; `runs` are its repeats."""
    first = runs[0]
    problems = list(dict.fromkeys(problem for data in runs for problem in data.problems))
    answered = [record for record in records if record.ok]
    failures = Counter(f"{r.status}: {r.cause}" for r in records if not r.ok)
    problems += [f"{count} requests failed: {why}" for why, count in failures.most_common()]
    planned = len(plan.items) * len(runs)
    if len(records) < planned and workload.limits.seconds is None:
        problems.append(f"only {len(records)} of {planned} requests were sent")
    problems += hit_problems(records, exact)
    ttft = percentiles([r.ttft_ms for r in answered])
    check = check_client([stretch for data in runs for stretch in data.measured])
    if (lagged := check.lag_problem(ttft.get("p50", 0.0))) is not None:
        problems.append(lagged)
    if outputs is not None and outputs.differences:
        problems.append(f"outputs differ from {outputs.reference}: {outputs.differences[0]}")
    wall = sum(data.wall_s for data in runs)
    hits = [r.cached_tokens for r in answered]
    tiers = _added(hits_by_tier(data.after, data.before) for data in runs if data.after and data.before)
    problems += counter_problems(records, tiers)
    told = [data.expected_by_tier for data in runs if data.expected_by_tier is not None]
    tiers_expected = _added(told) if len(told) == len(runs) and len(answered) == planned else None
    problems += tier_problems(tiers_expected, tiers)
    expected = [r.expected_hit_tokens for r in answered]
    prompt_tokens, output_tokens = sum(r.prompt_tokens for r in answered), sum(r.output_tokens for r in answered)
    return ArmResult(
        name=first.name,
        valid=not problems,
        problems=problems,
        about=first.arm.about,
        command=first.command,
        requests=len(records),
        ok=len(answered),
        failures=dict(failures),
        prompt_tokens=prompt_tokens,
        hit_tokens=None if any(h is None for h in hits) else sum(h or 0 for h in hits),
        hit_tokens_by_tier={tier: int(tokens) for tier, tokens in tiers.items()},
        expected_hit_tokens=None if any(e is None for e in expected) else sum(e or 0 for e in expected),
        output_tokens=output_tokens,
        wall_s=wall,
        ttft_ms=ttft,
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
        self_check=check,
        settings=first.arm.model_dump(),
        expected_hit_tokens_by_tier=None
        if tiers_expected is None
        else {tier: int(tokens) for tier, tokens in tiers_expected.items()},
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
    """Share of all sent requests that were answered within every bound; None without bounds."""
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
    """Growth of every lmc counter and of the engine's cache counters over the measured load."""
    if data.after is None or data.before is None:
        return {}
    grown: dict[str, float] = {}
    for (name, labels), value in sorted(data.after.samples.items(), key=lambda item: (item[0][0], sorted(item[0][1]))):
        if not name.endswith("_total") or not name.startswith(REPORTED):
            continue
        shown = ",".join(f"{key}={place}" for key, place in sorted(labels) if key not in ("engine", "model_name"))
        grown[f"{name}{{{shown}}}"] = value - data.before.samples.get((name, labels), 0.0)
    return grown
