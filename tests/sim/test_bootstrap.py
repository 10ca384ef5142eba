from __future__ import annotations

import numpy as np
import pytest

from lmc.sim.bootstrap import share_interval


def test_value_is_the_share_of_sums() -> None:
    found = share_interval(np.array([1, 0, 9]), np.array([10, 10, 10]), np.array([0, 1, 2], dtype=np.int32))
    assert found.value == 1 / 3
    assert found.low <= found.value <= found.high
    assert (found.low, found.high) == (0.0, 0.9)


def test_interval_covers_the_true_share_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        hits = generator.binomial(100, 0.3, size=40)
        found = share_interval(hits, np.full(40, 100), np.arange(40, dtype=np.int32), seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert 0.88 <= covered / 200 <= 1.0


def test_requests_of_one_session_do_not_make_it_surer() -> None:
    hits = np.array([0, 100] * 20)
    totals = np.full(40, 100)
    apart = share_interval(hits, totals, np.arange(40, dtype=np.int32))
    together = share_interval(np.repeat([0, 100], 20), totals, np.repeat([0, 1], 20).astype(np.int32))
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_differences_may_be_negative() -> None:
    found = share_interval(np.array([-5, -5]), np.array([10, 10]), np.array([0, 1], dtype=np.int32))
    assert (found.value, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
