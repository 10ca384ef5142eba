from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.policy import POLICIES, predictive, predictive_groups
from lmc.cache.policy.reuse import KEEP, NUM_BINS, appraise, count, index, make_life
from lmc.cache.policy.tournament import EMPTY
from lmc.sim.build import TraceBuilder
from lmc.sim.policy_replay import replay_policy
from tests.contracts.policy import Host, Key, NodePolicy, run_spec, workloads

SPEC = predictive.SPEC


def test_before_anything_is_learned_the_oldest_goes_first() -> None:
    host = run_spec(SPEC, [[label] for label in range(9)], 6)
    assert host.victims == [(0,), (1,), (2,)]


def test_chunks_that_never_return_make_room_for_those_that_do() -> None:
    """Twelve chats take turns, and between two turns pass requests that nobody repeats: LRU never keeps a chat until its next turn."""
    requests: list[list[int]] = []
    for turn in range(40 * 12):
        requests.append([100 + turn % 12, 0, 1])
        requests.extend([[1000 + 3 * turn + index, 2] for index in range(3)])
    hits = {name: sum(run_spec(POLICIES[name], requests, 50).hits) for name in ("lru", "predictive")}
    assert hits["lru"] == 0
    assert hits["predictive"] > 0.8 * 3 * 12 * 39


@settings(max_examples=30, deadline=None)
@given(workloads(), st.integers(1, 14))
def test_the_tree_knows_every_list_and_the_edges_every_age(requests: list[list[int]], capacity: int) -> None:
    policy = NodePolicy(SPEC, capacity, max(map(len, requests)))
    host = Host(policy, capacity)
    for labels in requests:
        host.request(labels)
        state = policy.state
        tree = state.tree
        for place in range(1, predictive_groups.LEAVES):
            assert tree[place] == min(tree[2 * place], tree[2 * place + 1])
        known = [
            int(state.group[node]) for node in range(state.where.size) if state.where[node] != predictive_groups.NOWHERE
        ]
        for group in set(known):
            assert state.size[group] == known.count(group)
            age = max(1, state.counter[predictive_groups.NOW] - state.last[group])
            assert state.life.lower[state.bins[group]] <= age < state.life.lower[state.bins[group] + 1]
        filled = set()
        for key in host.there:
            node = policy.node_of[key]
            if not state.chains.aside[node]:
                filled.add(predictive_groups.list_of(state, state.group[node]))
        for number in range(predictive_groups.NUM_LISTS):
            expected = state.life.value[number] if number in filled else EMPTY
            assert tree[predictive_groups.LEAVES + number] == expected


def test_classes_follow_turns_and_shared_beginnings() -> None:
    host = run_spec(SPEC, [[1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 6, 7], [1, 2, 8]], 99)
    policy = host.policy
    assert isinstance(policy, NodePolicy)
    state, node_of = policy.state, policy.node_of

    def kind(*labels: int) -> int:
        return int(state.kind[state.group[node_of[labels]]])

    def turn(*labels: int) -> int:
        return int(state.turns[node_of[labels]])

    assert [turn(1, 2, 3), turn(1, 2, 4, 5), turn(1, 2, 4, 6, 7), turn(1, 2, 8)] == [0, 1, 2, 0]
    assert kind(1, 2, 8) == predictive_groups.LAST
    assert kind(1, 2, 3) == kind(1, 2, 4, 5) == predictive_groups.OVERTAKEN
    assert kind(1, 2, 4, 6, 7) == predictive_groups.LAST + predictive_groups.STEPS
    assert kind(1, 2, 4, 6) == predictive_groups.BODY + predictive_groups.STEPS
    assert (
        kind(1, 2) == predictive_groups.SHARED + predictive_groups.STEPS - 2
    )  # three touches before, the last one just now


@settings(max_examples=100, deadline=None)
@given(workloads(), st.integers(2, 14))
def test_overtaken_is_what_a_request_left_beyond_chunks_of_the_same_past(
    requests: list[list[int]], capacity: int
) -> None:
    follow_paths(requests, capacity)


@pytest.mark.parametrize("seed", range(20))
def test_overtaken_chunks_are_forgotten_like_others(seed: int) -> None:
    """So many requests that the numbers of chunks are used again and again."""
    generator = random.Random(seed)
    requests = [[0]]
    for number in range(300):
        path = requests[-1 - generator.randrange(min(len(requests), 4))]
        path = path[: generator.randint(1, len(path))][:8]
        requests.append([*path, *range(10 * number + 10, 10 * number + 11 + generator.randrange(4))])
    follow_paths(requests, generator.randint(2, 12))


def test_overtaken_before_the_next_victim() -> None:
    host = run_spec(SPEC, [[1, 2, 3], [1, 2, 4]], 4)
    policy = host.policy
    assert isinstance(policy, NodePolicy)
    policy.victim(host.held)
    assert policy.state.kind[policy.state.group[policy.node_of[1, 2, 3]]] == predictive_groups.OVERTAKEN


@pytest.mark.parametrize("between", range(12, 28))
def test_a_request_leaves_a_path_that_is_forgotten_about_then(between: int) -> None:
    """The branch stays, pinned, while the ghost behind it goes, before the request or at its end."""
    host = run_spec(SPEC, [[1, 2, 3]], 5)
    policy = host.policy
    assert isinstance(policy, NodePolicy)
    host.pins.update([(1,), (1, 2)])
    for label in range(between):
        host.request([100 + label])
    host.request([7, 8, 9])  # more ghosts at once: the request below may get the number of the one behind the branch
    host.request([1, 2, 4, 5, 6])
    predictive.overtake(policy.state)
    left = {(1, 2, 3)}
    for label in range(30):
        state = policy.state
        known = {
            key: int(state.group[node])
            for key, node in policy.node_of.items()
            if state.where[node] != predictive_groups.NOWHERE
        }
        assert {key for key, group in known.items() if state.kind[group] == predictive_groups.OVERTAKEN} <= left
        assert all(state.size[group] == list(known.values()).count(group) for group in known.values())
        host.request([200 + label])


def test_counts_at_their_limit_say_nothing_about_a_path_that_was_left() -> None:
    kinds = []
    for times in (predictive.MOST, predictive.MOST + 1):
        host = run_spec(SPEC, [[1, 2, 3]] * times + [[1, 2, 4]], 9)
        policy = host.policy
        assert isinstance(policy, NodePolicy)
        predictive.overtake(policy.state)
        kinds.append(int(policy.state.kind[policy.state.group[policy.node_of[1, 2, 3]]]))
    assert kinds[0] == predictive_groups.OVERTAKEN
    assert kinds[1] == predictive_groups.SHARED + predictive_groups.STEPS - 1


def follow_paths(requests: list[list[int]], capacity: int) -> None:
    """The policy beside a plain account of who touched what last, how often, and what came next there."""
    policy = NodePolicy(SPEC, capacity, max(map(len, requests)))
    host = Host(policy, capacity)
    last: dict[Key, int] = {}
    uses: dict[Key, int] = {}
    following: dict[Key, Key | None] = {}
    overtaken: dict[Key, int] = {}  # since which request
    for number, labels in enumerate(requests):
        host.request(labels)
        predictive.overtake(policy.state)  # as the next request will
        where = policy.state.where
        remembered = {key for key, node in policy.node_of.items() if where[node] != predictive_groups.NOWHERE}
        chain = [key for depth in range(len(labels)) if (key := tuple(labels[: depth + 1])) in host.there]
        found = host.hits[-1]
        left = following[chain[found - 1]] if 0 < found < len(chain) else None
        if left is not None and left != chain[found] and left in remembered and left not in overtaken:
            branch = chain[found - 1]
            if last[left] == last[branch] and uses[left] == uses[branch]:
                for key in last:
                    if last[key] == last[branch] and key not in chain:
                        overtaken.setdefault(key, number)
        for key, after in zip(chain, [*chain[1:], None], strict=True):
            uses[key] = uses[key] + 1 if key in uses else 0
            last[key] = number
            following[key] = after
        overtaken = {key: since for key, since in overtaken.items() if key in remembered and key not in chain}
        for forgotten in set(last) - remembered:
            del last[forgotten], uses[forgotten], following[forgotten]
        state = policy.state
        groups = {key: state.group[policy.node_of[key]] for key in remembered}
        seen = {
            key: state.last[group] - 1
            for key, group in groups.items()
            if state.kind[group] == predictive_groups.OVERTAKEN
        }
        assert seen == overtaken


chances = st.lists(st.floats(0.0, 1.0), min_size=NUM_BINS, max_size=NUM_BINS)


@settings(deadline=None)
@given(chances)
def test_value_is_the_best_rate_of_hits_over_all_times_to_give_up(chance: list[float]) -> None:
    life = make_life(2)
    life.value[NUM_BINS:] = chance
    index(life, NUM_BINS)
    for k in range(NUM_BINS - 1):
        best, hits, wait, alive = 0.0, 0.0, 0.0, 1.0
        for later in range(k, NUM_BINS - 1):
            hits += alive * chance[later]
            wait += alive * float(life.lower[later + 1] - life.lower[later]) * (1.0 - chance[later] / 2)
            alive *= 1.0 - chance[later]
            best = max(best, hits / wait)
        assert life.value[NUM_BINS + k] == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert not life.value[:NUM_BINS].any()


def test_chances_come_from_the_counts() -> None:
    """Of 1,000 touches 300 are repeated by the next request; the others live on without another touch."""
    life = make_life(2)
    for k in range(9):
        count(life.reached, 0, k, 1000 if k == 0 else 700)
    count(life.reused, 0, 0, 300)
    appraise(life, 0, chunks=0.001)
    assert life.value[0] == pytest.approx(0.3 / 0.85, rel=1e-3)
    assert life.value[2] < 0.01 * life.value[0]


def test_before_anything_is_known_the_older_promises_less() -> None:
    life = make_life(2)
    appraise(life, 0, chunks=1.0)
    assert (np.diff(life.value[:NUM_BINS]) < 0).all()


def test_a_class_without_history_leans_on_the_others() -> None:
    life = make_life(2)
    count(life.reached, 0, 0, 100_000)
    count(life.reused, 0, 0, 90_000)
    appraise(life, 1, chunks=1.0)
    assert life.value[NUM_BINS] == pytest.approx(0.9 / 0.55, rel=0.01)


def test_old_counts_fade() -> None:
    life = make_life(2)
    count(life.reached, 0, 0, 100)
    count(life.reached, 1, 0, 50)
    appraise(life, 0, chunks=1.0)
    assert life.reached[0, 0] == pytest.approx(100 * KEEP)
    assert life.reached[-1, 0] == pytest.approx(50 + 100 * KEEP)


def test_the_class_of_a_request_tells_which_chats_return() -> None:
    """Chats of one class return once and those of another never. Nothing else tells them apart when they ask for the first time."""
    builder = TraceBuilder("chats", "test", 1)
    for number in range(4000):
        for asked, kind in ((number, "returns" if number % 2 else "leaves"), (number - 24, "over")):
            if asked >= 0 and (kind != "over" or asked % 2):
                hashes = [asked * 10 + block for block in range(5)]
                builder.add(number, hashes, float(number), 5, 1, request_class=kind)
    told = builder.finish()
    untold = replace(told, classes=np.zeros_like(told.classes))
    # Twelve chats of five chunks are to return at each time; 66 places hold them and one request, if nothing else is kept.
    hits = [replay_policy(trace, SPEC, [66], workers=1)[0].hit_blocks(trace) for trace in (told, untold)]
    assert hits[0] > 0.98 * 5 * 2000 * (4000 - 24) / 4000
    assert hits[0] > 1.1 * hits[1]
