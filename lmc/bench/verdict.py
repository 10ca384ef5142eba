"""Whether the figures of an arm may be believed.

An arm is invalid when its hits are not those that the simulator expects, its client lagged, requests failed or were not sent, it was not
empty at the start, or its greedy outputs differ from the reference arm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lmc.bench.records import ArmResult, OutputCheck, RequestRecord
from lmc.bench.stages import ArmData

HIT_SLACK = 0.02  # of prompt tokens, where the order of requests is not fixed


def judged(
    figures: ArmResult,
    runs: Sequence[ArmData],
    records: Sequence[RequestRecord],
    planned: int | None,
    exact: bool,
    outputs: OutputCheck | None,
) -> ArmResult:
    """The figures of an arm with the problems that were found.

    `planned` is the number of requests that had to be sent; None: a time limit may have ended the load. `exact`: hits must equal the
    expected ones to the token. `outputs` compares the arm with the reference arm, and is None for that arm itself.
    """
    problems = list(dict.fromkeys(problem for data in runs for problem in data.problems))
    problems += [f"{count} requests failed: {why}" for why, count in figures.failures.items()]
    if planned is not None and figures.requests < planned:
        problems.append(f"only {figures.requests} of {planned} requests were sent")
    problems += hit_problems(records, exact)
    if figures.self_check is not None:
        lagged = figures.self_check.lag_problem(figures.ttft_ms.get("p50", 0.0))
        problems += [lagged] if lagged is not None else []
    if outputs is not None and outputs.differences:
        problems.append(f"outputs differ from {outputs.reference}: {outputs.differences[0]}")
    problems += counter_problems(records, figures.hit_tokens_by_tier)
    problems += tier_problems(figures.expected_hit_tokens_by_tier, figures.hit_tokens_by_tier)
    return replace(figures, valid=not problems, problems=problems)


def hit_problems(records: Sequence[RequestRecord], exact: bool) -> list[str]:
    """One line if the measured hits differ from the expected ones, else none."""
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
    """One line if the hit tokens that responses report differ from those that engine and cache counted, else none.

    Nothing is judged if a request failed, or if a response or the engine did not count its hits.
    """
    hits = [r.cached_tokens for r in records]
    if "device" not in tiers or not all(r.ok for r in records) or any(h is None for h in hits):
        return []
    reported, counted = sum(h or 0 for h in hits), round(sum(tiers.values()))
    if reported == counted:
        return []
    return [f"responses report {reported:,} hit tokens, the counters of engine and cache {counted:,}"]


def tier_problems(expected: Mapping[str, float] | None, measured: Mapping[str, float]) -> list[str]:
    """One line for each tier whose hits differ from those that the simulator expects."""
    return [
        f"hits of tier {tier} are off: {measured.get(tier, 0):,.0f} tokens, the simulator expects {tokens:,.0f}"
        for tier, tokens in (expected or {}).items()
        if measured.get(tier, 0) != tokens
    ]
