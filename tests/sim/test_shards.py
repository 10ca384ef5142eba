from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from lmc.errors import ConfigError
from lmc.sim import shards, stack
from lmc.sim.formats import read_trace
from lmc.sim.trace import Trace
from tests.sim.chained_traces import traces


@settings(max_examples=100, deadline=None)
@given(traces().filter(lambda trace: trace.num_unique > 1))
def test_a_full_sample_is_exact(trace: Trace) -> None:
    capacities = [1, 2, 3, math.inf]
    for window in ("all", "last-half"):
        curve = stack.hit_curve(stack.profile(trace), window)  # type: ignore[arg-type]
        if curve.total_blocks == 0:
            continue
        found = shards.estimate(trace, 1.0, capacities, window, runs=2)  # type: ignore[arg-type]
        assert found.block_hit_rate == pytest.approx([curve.at(size)[0] / curve.total_blocks for size in capacities])
        assert found.token_hit_rate == pytest.approx([curve.at(size)[1] / curve.total_tokens for size in capacities])
        assert found.error == pytest.approx([0, 0, 0, 0], abs=1e-12)


@settings(max_examples=1)
@given(traces(max_requests=5).filter(lambda trace: 1 < trace.num_unique < 50))
def test_bad_rates_are_refused(trace: Trace) -> None:
    with pytest.raises(ConfigError, match="no share"):
        shards.estimate(trace, 0, [1])
    with pytest.raises(ConfigError, match="higher rate"):
        shards.estimate(trace, 1e-9, [1])


@pytest.mark.data
@pytest.mark.parametrize(("rate", "bound"), [(0.1, 0.003), (0.01, 0.01)])
def test_sampled_curve_of_the_conversation_trace_is_close(rate: float, bound: float) -> None:
    path = Path(os.environ.get("LMC_DATA_DIR", "../shared/data")) / "mooncake_conversation_trace.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set LMC_DATA_DIR to the folder that holds it")
    trace = read_trace(path)
    capacities = [1000 * 1.5**step for step in range(14)] + [math.inf]
    curve = stack.hit_curve(stack.profile(trace))
    exact = np.array([curve.at(size)[0] / curve.total_blocks for size in capacities])
    found = shards.estimate(trace, rate, capacities)
    assert np.abs(found.block_hit_rate - exact).mean() < bound
    assert found.sampled_blocks == pytest.approx(5 * rate * trace.num_blocks, rel=0.2)
    exact_tokens = np.array([curve.at(size)[1] / curve.total_tokens for size in capacities])
    assert (
        np.abs(found.token_hit_rate - exact_tokens) < 5 * found.error + 0.002
    ).all()  # the error it claims is honest
