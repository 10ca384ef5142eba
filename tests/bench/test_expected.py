from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.bench.expected import expected_hits, to_trace
from lmc.bench.prompts import Request

CHUNK = 4


def _requests(prompts: list[list[int]]) -> list[Request]:
    return [Request("p", i, 0, np.array(tokens, dtype=np.int32), 1) for i, tokens in enumerate(prompts)]


def _naive(prompts: list[list[int]], capacity: float) -> list[int]:
    """LRU over whole prefixes, written down again: touched from the last chunk to the first, so that a parent outlives its child."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    hits = []
    for tokens in prompts:
        chain = [tuple(tokens[: end * CHUNK]) for end in range(1, len(tokens) // CHUNK + 1)]
        hit = 0
        while hit < len(chain) and chain[hit] in cache:
            hit += 1
        hits.append(min(hit, (len(tokens) - 1) // CHUNK) * CHUNK)
        for name in reversed(chain):
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24), min_size=1, max_size=25)


@settings(deadline=None)
@given(prompts=PROMPTS, capacity=st.one_of(st.just(float("inf")), st.integers(7, 40)))
def test_hits_equal_a_plain_lru(prompts: list[list[int]], capacity: float) -> None:
    assert expected_hits(_requests(prompts), CHUNK, capacity) == _naive(prompts, capacity)


@settings(deadline=None)
@given(prompts=PROMPTS, split=st.integers(0, 25))
def test_what_was_seen_before_counts_as_sent(prompts: list[list[int]], split: int) -> None:
    requests = _requests(prompts)
    whole = expected_hits(requests, CHUNK)
    assert expected_hits(requests[split:], CHUNK, seen=requests[:split]) == whole[split:]


def test_the_last_token_is_always_computed() -> None:
    assert expected_hits(_requests([[1] * 8, [1] * 8, [1] * 9]), CHUNK) == [0, 4, 8]


def test_prompts_shorter_than_a_chunk_hit_nothing() -> None:
    assert expected_hits(_requests([[1], [1]]), CHUNK) == [0, 0]
    assert expected_hits(_requests([[1], [1] * 5, [1]]), CHUNK) == [0, 0, 0]


def test_a_trace_of_the_requests_holds_each_distinct_chunk_once() -> None:
    assert to_trace(_requests([[1] * 8, [1] * 12, [2] * 4]), CHUNK).num_unique == 4


@pytest.mark.parametrize("chunk", [16, 128])
def test_chunks_of_one_prompt_repeated(chunk: int) -> None:
    prompt = list(range(1000))
    assert expected_hits(_requests([prompt, prompt]), chunk) == [0, 999 // chunk * chunk]
