"""A reset and a change of weights, in whatever order their steps come back."""

from __future__ import annotations

import pytest

from tests.engines.scheduler_side import DrivenSide

BLOCK = 16
TEXT = list(range(100, 400))
HIT = 18 * BLOCK


@pytest.fixture
def driven() -> DrivenSide:
    side = DrivenSide(BLOCK, slots=200, chunk_tokens=BLOCK)
    assert [side.serve(side.request(TEXT)) for _ in range(2)] == [0, HIT]
    return side


def test_after_a_reset_nothing_is_looked_up_or_stored_until_the_workers_have_read_their_weights(
    driven: DrivenSide,
) -> None:
    running = driven.request(list(range(500, 800)))
    driven.admit(running)
    driven.side.reset()
    request = driven.request(TEXT)
    assert driven.side.lookup(request, 0) == (None, False)
    running.append_output_token_ids(list(range(64)))
    step = driven.side.step(driven.output({running.request_id: 64}))
    assert step.asks_model == 1 and step.plan.stores == []
    assert driven.side.step(driven.output({})).asks_model == 0  # once is enough
    driven.model = "new weights"
    driven.side.learn(driven.answer(step))
    assert driven.scheduler.namespace.model == "new weights"
    assert [driven.serve(driven.request(TEXT)) for _ in range(2)] == [0, HIT]


def test_the_same_weights_keep_their_name(driven: DrivenSide) -> None:
    driven.side.reset()
    assert driven.serve(driven.request(TEXT)) == 0
    assert driven.scheduler.namespace == driven.namespace


def test_an_engine_without_requests_is_not_asked_since_its_weights_may_still_change(driven: DrivenSide) -> None:
    driven.side.reset()
    assert driven.side.step(driven.output({})).asks_model == 0
    driven.side.lookup(driven.request(TEXT), 0)
    assert driven.side.step(driven.output({})).asks_model == 1


def test_an_answer_from_before_a_second_reset_settles_nothing(driven: DrivenSide) -> None:
    """vLLM plans ahead: the step that was asked may come back after the next reset, and say what no longer holds."""
    driven.side.reset()
    driven.side.lookup(driven.request(TEXT), 0)
    early = driven.answer(driven.side.step(driven.output({})))
    driven.side.reset()
    driven.model = "new weights"
    driven.side.learn(early)
    assert driven.side.lookup(driven.request(TEXT), 0) == (None, False)
    driven.step({})
    assert driven.scheduler.namespace.model == "new weights"
