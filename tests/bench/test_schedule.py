from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.bench.client import Outcome, Target
from lmc.bench.load import STEP_S, Measured, run_load
from lmc.bench.prompts import Conversation, Request
from lmc.bench.schedule import Plan, arrival_times, make_plan, split
from lmc.bench.selfcheck import check_client
from lmc.bench.workload import OpenLoop, Workload
from lmc.errors import WorkloadError
from tests.bench.conftest import small_workload

EMPTY = np.zeros(1, dtype=np.int32)


def _sessions(*turns: int) -> list[Conversation]:
    return [
        [Request("p", s, t, EMPTY, 1, at_s=float(10 - s + t)) for t in range(count)] for s, count in enumerate(turns)
    ]


def _plan(sessions: list[Conversation], load: dict[str, Any], **limits: Any) -> Plan:
    return make_plan(sessions, Workload.model_validate(small_workload(bars=[], load=load, limits=limits)))


def _ids(plan: Plan) -> list[str]:
    return [item.request.id.removeprefix("p/") for item in plan.items]


def test_closed_orders() -> None:
    sessions = _sessions(2, 1, 3)
    assert _ids(_plan(sessions, {"kind": "closed"})) == ["0/0", "0/1", "1/0", "2/0", "2/1", "2/2"]
    turns = _plan(sessions, {"kind": "closed", "order": "turns"})
    assert _ids(turns) == ["0/0", "1/0", "2/0", "0/1", "2/1", "2/2"]
    assert turns.units == [[0], [1], [2], [3], [4], [5]]
    assert _plan(sessions, {"kind": "closed", "concurrency": 2}).units == [[0, 1], [2], [3, 4, 5]]


def test_only_one_request_at_a_time_is_a_fixed_order() -> None:
    assert _plan(_sessions(2), {"kind": "closed"}).is_ordered
    assert not _plan(_sessions(2), {"kind": "closed", "concurrency": 2}).is_ordered
    assert not _plan(_sessions(2), {"kind": "constant", "rate": 1}).is_ordered


@settings(deadline=None)
@given(
    turns=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    load=st.sampled_from(
        [
            {"kind": "closed"},
            {"kind": "closed", "order": "turns", "concurrency": 3},
            {"kind": "closed", "order": "shuffled"},
            {"kind": "poisson", "rate": 2.0},
            {"kind": "gamma", "rate": 2.0, "burstiness": 0.3},
            {"kind": "constant", "rate": 2.0},
            {"kind": "users", "users": 2, "rate": 1.0},
            {"kind": "trace", "speed": 2.0},
        ]
    ),
    limit=st.one_of(st.none(), st.integers(1, 20)),
)
def test_every_turn_is_sent_once_after_the_turn_before_it(
    turns: list[int], load: dict[str, Any], limit: int | None
) -> None:
    sessions = _sessions(*turns)
    plan = _plan(sessions, load, **({"requests": limit} if limit else {}))
    ids = _ids(plan)
    assert len(set(ids)) == len(ids) == min(sum(turns), limit or sum(turns))
    for index, item in enumerate(plan.items):
        if item.request.turn == 0:
            assert item.after is None
        else:
            assert item.after is not None and item.after < index
            before = plan.items[item.after].request
            assert (before.session, before.turn) == (item.request.session, item.request.turn - 1)
    if plan.units is not None:
        assert [index for unit in plan.units for index in unit] == list(range(len(ids)))


@settings(deadline=None)
@given(
    kind=st.sampled_from(["constant", "poisson", "gamma"]),
    rate=st.floats(0.1, 1000),
    burstiness=st.floats(0.05, 5),
    count=st.integers(1, 200),
)
def test_arrivals_start_at_zero_and_last_exactly_count_by_rate(
    kind: Any, rate: float, burstiness: float, count: int
) -> None:
    times = arrival_times(OpenLoop(kind=kind, rate=rate, burstiness=burstiness), count, np.random.default_rng(1))
    assert times[0] == 0.0
    assert np.all(np.diff(times) >= 0)
    assert times[-1] <= count / rate * (1 + 1e-9)


def test_burstiness_sets_the_spread_of_gaps() -> None:
    def spread(kind: Any, burstiness: float) -> float:
        gaps = np.diff(
            arrival_times(OpenLoop(kind=kind, rate=1, burstiness=burstiness), 20_000, np.random.default_rng(1))
        )
        return float(gaps.std() / gaps.mean())

    assert spread("poisson", 9.0) == pytest.approx(1.0, abs=0.05)
    assert spread("gamma", 0.25) == pytest.approx(2.0, abs=0.15)
    assert spread("gamma", 4.0) == pytest.approx(0.5, abs=0.05)
    assert spread("constant", 1.0) == pytest.approx(0.0, abs=1e-9)


def test_users_send_at_their_own_pace() -> None:
    plan = _plan(_sessions(2, 2, 1), {"kind": "users", "users": 2, "rate": 1.0})
    times = {item.request.id.removeprefix("p/"): item.at_s for item in plan.items}
    assert times == {"0/0": 0.0, "1/0": 1.0, "0/1": 2.0, "1/1": 3.0, "2/0": 4.0}
    assert plan.requested_rate == pytest.approx(1.0)


def test_trace_times_are_divided_by_speed_and_sorted() -> None:
    plan = _plan(_sessions(1, 1), {"kind": "trace", "speed": 2.0})
    assert [(item.request.session, item.at_s) for item in plan.items] == [(1, 0.0), (0, 0.5)]


def test_same_seed_same_plan() -> None:
    load = {"kind": "poisson", "rate": 3.0}
    first, second = (_plan(_sessions(1, 1, 1), load) for _ in range(2))
    assert [item.at_s for item in first.items] == [item.at_s for item in second.items]


@settings(deadline=None)
@given(
    turns=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    size=st.integers(1, 9),
    order=st.sampled_from(["turns", "sessions"]),
)
def test_blocks_hold_the_plan_in_order(turns: list[int], size: int, order: str) -> None:
    plan = _plan(_sessions(*turns), {"kind": "closed", "order": order})
    stretches = split(plan, size)
    assert [i.request.id for stretch in stretches for i in stretch.items] == [i.request.id for i in plan.items]
    assert all(len(stretch.items) >= size for stretch in stretches[:-1])
    for stretch in stretches:
        assert stretch.units is not None and stretch.is_ordered
        assert [index for unit in stretch.units for index in unit] == list(range(len(stretch.items)))
        for index, item in enumerate(stretch.items):
            if item.after is not None:
                assert item.after < index
                assert stretch.items[item.after].request.turn == item.request.turn - 1


def test_an_open_loop_is_one_block() -> None:
    plan = _plan(_sessions(1, 1), {"kind": "constant", "rate": 1})
    assert split(plan, 1) == [plan]


def test_trace_times_must_be_there() -> None:
    with pytest.raises(WorkloadError, match=r"parts\.p: its requests have no times, which load\.kind trace needs"):
        _plan([[Request("p", 0, 0, EMPTY, 1)]], {"kind": "trace"})


def test_the_achieved_rate_of_an_open_loop_that_keeps_up_is_the_requested_one() -> None:
    request = Request("p", 0, 0, np.arange(4, dtype=np.int32), 2)
    outcomes = [Outcome(request, index / 10, index / 10, "ok") for index in range(11)]
    open_loop = check_client([Measured(outcomes, 5.0, 1.0, 0.5, [], 10.0)])
    assert (open_loop.requested_rate, open_loop.achieved_rate, open_loop.client_cpu) == (10.0, 10.0, 0.1)
    closed = check_client([Measured(outcomes, 5.5, 5.0, 0.5, [], None)])
    assert (closed.requested_rate, closed.achieved_rate) == (None, 2.0)
    assert check_client([]).achieved_rate == 0.0


def test_connections_of_a_closed_loop_begin_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests at the same moment make the client late, and then the figures of its start are those of the client."""
    sent: list[float] = []
    all_sent = asyncio.Event()

    async def complete(http: Any, target: Target, request: Request, request_id: str, intended_s: float) -> Outcome:
        sent.append(intended_s)
        if len(sent) == 100:
            all_sent.set()
        await all_sent.wait()
        return Outcome(request, intended_s, intended_s, "ok")

    async def on_done(outcome: Outcome) -> bool:
        return True

    monkeypatch.setattr("lmc.bench.load.complete", complete)
    plan = _plan(_sessions(*[1] * 150), {"kind": "closed", "concurrency": 100})
    measured = asyncio.run(run_load(plan, [Target("http://127.0.0.1:9/v1", "m")], "x", on_done))
    assert min(later - earlier for earlier, later in itertools.pairwise(sent[:100])) > 0
    assert sent[99] - sent[0] >= 90 * STEP_S, "timers may be a millisecond early"
    assert [outcome.opening for outcome in measured.outcomes].count(True) == 100


def test_the_start_is_not_judged() -> None:
    request = Request("p", 0, 0, EMPTY, 2)
    late = [Outcome(request, 0.0, 0.1, "ok", opening=True) for _ in range(100)]
    steady = [Outcome(request, 1.0, 1.001, "ok") for _ in range(200)]
    stretch = Measured([*late, *steady], 5.0, 1.0, 0.5, [], None)
    assert check_client([stretch]).send_lag_p99_ms > 90
    judged = check_client([stretch], without_start=True)
    assert judged.send_lag_p99_ms == pytest.approx(1.0)
    assert judged.requests == 300
