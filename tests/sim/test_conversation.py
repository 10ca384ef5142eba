"""Known integers of the Mooncake conversation trace (FAST'25 release): two independent simulators agree on each."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from lmc.sim import stack
from lmc.sim.formats import read_trace
from lmc.sim.trace import Trace, coarsen, select_requests

NAME = "mooncake_conversation_trace.jsonl.gz"
pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def conversation() -> Trace:
    path = Path(os.environ.get("LMC_DATA_DIR", "../shared/data")) / NAME
    if not path.exists():
        pytest.skip(f"{NAME} is not there; set LMC_DATA_DIR to the folder that holds it")
    return read_trace(path)


def test_size_of_the_trace(conversation: Trace) -> None:
    assert (conversation.num_requests, conversation.num_blocks, conversation.num_unique) == (12_031, 288_500, 182_790)
    assert (conversation.num_tokens, conversation.longest) == (144_793_823, 247)
    assert len(set(conversation.timestamps_s.tolist())) == 1_180
    assert conversation.notes == ()


def test_lru_hit_blocks_of_the_whole_trace(conversation: Trace) -> None:
    expected = {
        1000: 12847,
        3000: 18850,
        5859: 39258,
        10000: 61046,
        20000: 83035,
        30000: 93978,
        50000: 102290,
        100000: 104924,
        math.inf: 105710,
    }
    curve = stack.hit_curve(stack.profile(conversation))
    assert {capacity: curve.at(capacity)[0] for capacity in expected} == expected


def test_lru_hit_tokens_of_the_last_half(conversation: Trace) -> None:
    expected = {
        44: 3080192,
        88: 3080581,
        176: 3080581,
        352: 3083336,
        704: 3114315,
        1409: 3320864,
        2818: 4362064,
        5637: 8928755,
        11275: 15849049,
        22550: 21501492,
        45100: 25426292,
        90200: 26550644,
        math.inf: 27038068,
    }
    curve = stack.hit_curve(stack.profile(conversation), "last-half")
    assert curve.total_tokens == 67915607
    assert {capacity: curve.at(capacity)[1] for capacity in expected} == expected


@pytest.mark.parametrize(
    ("chunk_tokens", "rates"),
    [
        (512, (0.1437, 0.2976, 0.3710, 0.3734)),
        (1024, (0.1024, 0.2588, 0.3372, 0.3396)),
        (2048, (0.1008, 0.2489, 0.3187, 0.3210)),
        (4096, (0.1006, 0.2300, 0.2894, 0.2912)),
    ],
)
def test_token_hit_rates_by_chunk_size(conversation: Trace, chunk_tokens: int, rates: tuple[float, ...]) -> None:
    curve = stack.hit_curve(stack.profile(coarsen(conversation, chunk_tokens)))
    found = [
        round(curve.at(tokens / chunk_tokens)[1] / curve.total_tokens, 4) for tokens in (3e6, 10e6, 50e6, math.inf)
    ]
    assert found == list(rates)


def test_block_hit_rates_at_shares_of_the_unique_blocks(conversation: Trace) -> None:
    curve = stack.hit_curve(stack.profile(conversation))
    shares = (0.01, 0.05, 0.10, 0.25, 0.50, 1)
    found = [curve.at(share * conversation.num_unique)[0] / curve.total_blocks for share in shares]
    assert found == pytest.approx([0.052, 0.195, 0.278, 0.353, 0.363, 0.366], abs=0.005)


@pytest.mark.parametrize(("instances", "rate"), [(1, 0.2878), (4, 0.1215), (16, 0.0642)])
def test_round_robin_over_instances_splits_the_hits(conversation: Trace, instances: int, rate: float) -> None:
    number = np.arange(conversation.num_requests) % instances
    hits = 0
    for instance in range(instances):
        part = select_requests(conversation, number == instance)
        hits += stack.hit_curve(stack.profile(part)).at(20_000 // instances)[0]
    assert round(hits / conversation.num_blocks, 4) == rate
