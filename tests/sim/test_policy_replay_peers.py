"""The policies against libcachesim, hit by hit, on traces without chains: one block a request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmc.cache.policy import POLICIES
from lmc.sim.belady import belady_hits
from lmc.sim.policy_check import trace_of
from lmc.sim.policy_replay import replay_policy
from tests.cache.policy.naive import NaiveArc
from tests.contracts.policy import Key

libcachesim = pytest.importorskip("libcachesim")

NUM_REQUESTS, NUM_UNIQUE = 8000, 1000
CASES = pytest.mark.parametrize(("seed", "capacity"), [(1, 20), (2, 50), (3, 100), (4, 300)])


def zipf_labels(seed: int) -> list[int]:
    weights = 1 / np.arange(1, NUM_UNIQUE + 1)
    labels = np.random.default_rng(seed).choice(NUM_UNIQUE, size=NUM_REQUESTS, p=weights / weights.sum())
    return [int(label) for label in labels]


def peer_hits(peer: Any, labels: list[int], next_use: list[int] | None = None) -> list[int]:
    hits = []
    for index, label in enumerate(labels):
        request = libcachesim.Request()
        request.obj_id, request.obj_size, request.clock_time = label + 1, 1, index
        if next_use is not None:
            request.next_access_vtime = next_use[index]
        hits.append(int(peer.get(request)))
    return hits


@CASES
@pytest.mark.parametrize(
    ("name", "peer"),
    [("lru", "LRU"), ("fifo", "FIFO"), ("lfu", "LFU"), ("sieve", "Sieve"), ("s3fifo", "S3FIFO"), ("2q", "TwoQ")],
)
def test_every_hit_equals_libcachesim(name: str, peer: str, seed: int, capacity: int) -> None:
    labels = zipf_labels(seed)
    trace, _ = trace_of([[label] for label in labels])
    [result] = replay_policy(trace, POLICIES[name], [capacity], workers=1)
    assert result.request_hits.tolist() == peer_hits(getattr(libcachesim, peer)(capacity, hashpower=16), labels)


class PaperArc(NaiveArc):
    """ARC as published: the balance moves, and ties are broken, before the eviction, because the paper's cache knows what comes."""

    coming: Key = ()

    def announce(self, key: Key) -> None:
        super().adapt(key)
        self.coming = key

    def adapt(self, key: Key) -> None:
        pass

    def from_once(self) -> bool:
        once = self.size("T1")
        tie = once == self.target and once > 0 and self.place.get(self.coming) == "B2"
        return tie or super().from_once()


@CASES
def test_arc_differs_from_libcachesim_only_in_when_the_balance_moves(seed: int, capacity: int) -> None:
    labels = zipf_labels(seed)
    peer = peer_hits(libcachesim.ARC(capacity, hashpower=16), labels)
    paper = PaperArc(capacity)
    hits = []
    for now, label in enumerate(labels):
        key = (label,)
        hits.append(int(key in paper.there))
        if key in paper.there:
            paper.hit(key, now)
            continue
        paper.announce(key)
        if len(paper.there) == capacity:
            gone = paper.victim(lambda other: False)
            assert gone is not None
            paper.evict(gone)
        paper.insert(key, now)
        paper.settle([key])
    assert hits == peer
    trace, _ = trace_of([[label] for label in labels])
    [result] = replay_policy(trace, POLICIES["arc"], [capacity], workers=1)
    assert abs(int(result.request_hits.sum()) - sum(peer)) <= 0.002 * len(labels)


@CASES
def test_belady_beats_or_equals_libcachesims_which_must_store_every_block(seed: int, capacity: int) -> None:
    labels = zipf_labels(seed)
    never = 2**62
    coming: dict[int, int] = {}
    next_use = [never] * len(labels)
    for index in range(len(labels) - 1, -1, -1):
        next_use[index] = coming.get(labels[index], never)
        coming[labels[index]] = index
    peer = sum(peer_hits(libcachesim.Belady(capacity, hashpower=16), labels, next_use))
    trace, _ = trace_of([[label] for label in labels])
    [bound] = belady_hits(trace, [capacity], workers=1)
    [one_more] = belady_hits(trace, [capacity - 1], workers=1)
    assert one_more.hit_blocks(trace) <= peer <= bound.hit_blocks(trace)
