"""Several client processes send what one would have sent, and are merged to what one would have measured."""

from __future__ import annotations

import asyncio
import multiprocessing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.bench.client import Outcome, Target
from lmc.bench.fleet import processes_for, run_in_processes
from lmc.bench.prompts import Request
from lmc.bench.schedule import Plan, Planned, make_plan, share_out
from lmc.bench.workload import Workload
from lmc.errors import RunError
from tests.bench.conftest import RunSmall, small_workload

NONE = {"reuse": "none", "args": ["--no-enable-prefix-caching"]}
LOADS: list[dict[str, Any]] = [
    {"kind": "closed", "concurrency": 4, "order": "sessions"},
    {"kind": "closed", "concurrency": 5, "order": "turns"},
    {"kind": "closed", "concurrency": 3, "order": "shuffled"},
    {"kind": "poisson", "rate": 50.0},
    {"kind": "users", "users": 3, "rate": 50.0},
]


def plan_of(turns: list[int], load: dict[str, Any], **limits: int) -> Plan:
    sessions = [
        [Request("p", number, turn, np.arange(4, dtype=np.int32), 2) for turn in range(count)]
        for number, count in enumerate(turns)
    ]
    return make_plan(sessions, Workload.model_validate(small_workload(load=load, limits=limits)))


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.sampled_from(LOADS),
    st.integers(1, 6),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 20),
)
def test_shares_are_the_plan(
    turns: list[int], load: dict[str, Any], count: int, concurrency: int | None, requests: int | None
) -> None:
    limits = {name: value for name, value in (("concurrency", concurrency), ("requests", requests)) if value}
    plan = plan_of(turns, load, **limits)
    shares = share_out(plan, count)
    assert 1 <= len(shares) <= count
    places = [place for _, indexes in shares for place in indexes]
    assert sorted(places) == list(range(len(plan.items))), "everything is sent exactly once"
    for part, indexes in shares:
        for item, place in zip(part.items, indexes, strict=True):
            whole = plan.items[place]
            assert (item.request, item.at_s) == (whole.request, whole.at_s)
            before = None if item.after is None else indexes[item.after]
            assert before == whole.after, "a turn waits for the turn that it waited for"
        if plan.units is not None:
            assert part.units is not None
            units = [[indexes[index] for index in unit] for unit in part.units]
            assert units == [unit for unit in plan.units if unit in units], "units stay whole and in order"
    if plan.concurrency is not None:
        parts = [part.concurrency for part, _ in shares]
        assert all(parts)
        assert sum(part or 0 for part in parts) == plan.concurrency


@pytest.mark.parametrize(
    ("rate", "tokens", "concurrency", "needed"),
    [(100.0, 8, None, 1), (1600.0, 1, None, 2), (1000.0, 30, None, 2), (None, 8, 4, 1), (None, 8, 4000, 2)],
)
def test_processes_follow_rate_and_concurrency(
    rate: float | None, tokens: int, concurrency: int | None, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    items = [Planned(Request("p", index, 0, np.arange(4, dtype=np.int32), tokens), None, None) for index in range(50)]
    assert processes_for(Plan(items, None, concurrency, rate)) == needed


@pytest.mark.parametrize("load", LOADS, ids=lambda load: "-".join(str(value) for value in load.values()))
def test_two_processes_measure_what_one_does(run_small: RunSmall, load: dict[str, Any]) -> None:
    runs = [run_small(load=load, limits={"processes": processes}, arms={"none": NONE}, bars=[]) for processes in (1, 2)]
    (one, alone), (two, together) = runs
    for results, processes in ((one, 1), (two, 2)):
        assert [p for p in results.problems if "lagged" not in p] == []
        assert results.arms[0].self_check is not None
        assert results.arms[0].self_check.processes == processes
    assert [r.request_id for r in together] == [r.request_id for r in alone]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    if load["kind"] in ("poisson", "users"):
        planned = [(a, b) for a, b in zip(together, alone, strict=True) if a.turn == 0]
        assert all(a.intended_s == pytest.approx(b.intended_s, abs=1e-6) for a, b in planned), "the same schedule"
    early = 0.002  # timers of the event loop have a resolution of a millisecond
    assert all(0 <= r.intended_s <= r.sent_s + early < 60 and r.ttft_ms for r in together)
    assert {r.status for r in together} == {"ok"}


def test_a_server_that_dies_leaves_what_it_delivered(run_small: RunSmall) -> None:
    dying = {**NONE, "args": ["--fault", "die"]}
    load = {"kind": "closed", "concurrency": 2}
    results, records = run_small(load=load, limits={"processes": 2}, arms={"none": NONE, "x": dying}, bars=[])
    arm = results.arms[1]
    assert not arm.valid
    assert any("exit code 3" in problem for problem in arm.problems)
    assert 1 <= arm.ok < 11
    assert sum(record.arm == "x" and record.ok for record in records) == arm.ok


def test_a_client_process_that_ends_early_is_an_error() -> None:
    items = [Planned(Request("p", index, 0, np.arange(4, dtype=np.int32), 2), index / 10, None) for index in range(64)]
    plan = Plan(items, None, None, 10.0)

    async def kill_one(outcome: Outcome) -> bool:
        for child in multiprocessing.active_children()[:1]:
            child.kill()
        return True

    nobody = Target("http://127.0.0.1:9/v1", "m", 5.0)
    with pytest.raises(RunError, match=r"client process \d ended before its load did"):
        asyncio.run(run_in_processes(plan, [nobody], "x", kill_one))
    assert multiprocessing.active_children() == []
