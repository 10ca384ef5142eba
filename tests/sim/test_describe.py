from __future__ import annotations

from hypothesis import given, settings

from lmc.sim import stack
from lmc.sim.build import TraceBuilder
from lmc.sim.describe import describe, facts_json, facts_table
from lmc.sim.sessions import sessions_of
from lmc.sim.trace import Trace
from tests.sim.chained_traces import naive_lru, tokens_of, traces


def make(*requests: tuple[float, list[int], int], session: list[str] | None = None) -> Trace:
    builder = TraceBuilder("made", "test", 4)
    for number, (t, blocks, tokens) in enumerate(requests):
        builder.add(number + 1, blocks, t, tokens, 2, session=session[number] if session else None)
    return builder.finish()


def test_facts_of_a_small_trace() -> None:
    trace = make((0.0, [1, 2], 8), (1.0, [1, 2, 3], 10), (3.0, [1, 9], 8), (5.0, [7], 3))
    facts = facts_json(describe(trace))
    assert (facts["requests"], facts["blocks"], facts["unique_blocks"], facts["input_tokens"]) == (4, 8, 5, 29)
    assert (facts["hit_blocks"], facts["hit_tokens"]) == (3, 12)
    assert facts["block_hit_percent"] == 100 * 3 / 8
    assert facts["token_hit_percent"] == 100 * 12 / 29
    assert facts["last_half_token_hit_percent"] == 100 * 4 / 11
    assert facts["mean_request_hit_percent"] == 100 * (8 / 10 + 4 / 8) / 4
    assert facts["requests_with_hit_percent"] == 50
    assert (facts["duration_s"], facts["distinct_timestamps"], facts["requests_per_s"]) == (5.0, 4, 0.6)
    assert (facts["reuse_distance_p50"], facts["reuse_age_s_p99"]) == (1, 2.0)
    assert facts["sessions"] == 3
    assert facts["foreign_hit_percent"] == 100 * 1 / 3
    assert facts["common_start_percent"] == 75
    assert facts["used_once_percent"] == 100 * 3 / 5


def test_a_trace_without_reuse_can_be_described() -> None:
    facts = facts_json(describe(make((0.0, [1], 4), (0.0, [2], 4))))
    assert (facts["hit_blocks"], facts["reused_blocks"], facts["foreign_hit_percent"]) == (0, 0, 0)


def test_table_shows_every_fact() -> None:
    sections = describe(make((0.0, [1], 4), (2.0, [1], 4)))
    table = facts_table("made", sections)
    assert len(table.rows) == sum(len(facts) for facts in sections.values())


def test_sessions_of_the_trace_are_taken_as_they_are() -> None:
    trace = make((0.0, [1], 4), (1.0, [1, 2], 8), session=["a", "b"])
    sessions, named = sessions_of(stack.profile(trace))
    assert (sessions.tolist(), named) == ([0, 1], True)


def test_a_prompt_that_holds_an_earlier_prompt_continues_its_session() -> None:
    trace = make(
        (0.0, [1, 2, 3], 11),  # two full blocks
        (1.0, [1, 2, 4, 5], 16),  # holds them
        (2.0, [1, 9], 8),  # shares the first block only
        (3.0, [1, 2, 4, 5, 6], 20),
    )
    sessions, named = sessions_of(stack.profile(trace))
    assert (sessions.tolist(), named) == ([0, 0, 1, 0], False)


@settings(max_examples=100, deadline=None)
@given(traces())
def test_unlimited_hits_equal_a_naive_simulator(trace: Trace) -> None:
    facts = facts_json(describe(trace))
    hits = naive_lru(trace, trace.num_unique)
    assert facts["hit_blocks"] == sum(hits)
    assert facts["hit_tokens"] == sum(tokens_of(trace, request, found) for request, found in enumerate(hits))
    if sum(hits):
        half = facts["reuse_distance_p50"]
        assert sum(naive_lru(trace, half)) >= sum(hits) / 2 > sum(naive_lru(trace, half - 1))
