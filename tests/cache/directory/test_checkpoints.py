"""Requests of a model with several kinds of KV: where a hit may end, what is stored for it, and all of it or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lmc.cache.directory import Capacity, Directory, Miss, Request, Ticket
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import Group, Parts, Step
from lmc.cache.policy.registry import get_policy

SIZE = 4
PARTS = Parts(SIZE, (Group("full", 2), Group("window", 2, 8), Group("window", 4, 4)), interval=4)  # two chunks and one


@dataclass
class Settings:
    load: Literal["always", "auto"] = "always"
    min_load_tokens: int = 1
    lookup_deadline: float = 1.0
    load_deadline: float = 1.0
    store_decode: bool = False


def keys(name: int, count: int, shared: int = 0) -> list[ChunkKey]:
    """The first `shared` are those of prompt 0."""
    return [ChunkKey(bytes([0 if chunk < shared else name, chunk]) * 16) for chunk in range(count)]


class World:
    def __init__(self, host_slots: int = 64, disk: int = 0, parts: Parts = PARTS) -> None:
        self.parts = parts
        self.directory = Directory(host_slots, {"disk": Capacity.of_chunks(disk)} if disk else {}, get_policy("lru"))
        self.now = 0.0

    def request(self, name: str = "r", **settings: Any) -> Request:
        return Request(name, self.directory, Settings(**settings), SIZE, "", self.now, self.parts)

    def end(self, tickets: list[Ticket], failure: str | None = None) -> None:
        for ticket in tickets:
            self.directory.complete(ticket.operation, failure, self.now)

    def write(self) -> None:
        self.end(self.directory.take_tickets())

    def serve(self, names: list[ChunkKey], steps: int = 100, tokens: int | None = None) -> int:
        """Returns the chunks that were loaded; computes the rest in steps of so many tokens."""
        tokens = len(names) * SIZE + 1 if tokens is None else tokens
        request = self.request("other")
        found = request.lookup(names, tokens, 0, self.now)
        assert found is not None
        for _, ticket in request.load(found):
            request.loaded(ticket.operation, None)
            self.directory.complete(ticket.operation, None, self.now)
        done = found
        while done < tokens:
            before, done = done, min(done + steps, tokens)
            last = (tokens - 1) // SIZE * SIZE
            if self.parts.has_states and before < last < done:
                done = last  # vLLM's steps end there
            states = [end // SIZE for end in (before, done) if end and end % SIZE == 0]
            self.end([ticket for _, ticket in request.store(names, done, tokens, self.now, Step(before, states))])
        request.end()
        self.write()
        self.directory.check()
        return found // SIZE

    def evict(self, leaf_of: list[ChunkKey], end: int, number: int = 0) -> ChunkKey:
        leaf = list(PARTS.leaves(leaf_of, end))[number]
        (ticket,) = self.directory.load([leaf.key])
        self.directory.complete(ticket.operation, "copy", self.now)
        return leaf.key


@pytest.mark.parametrize("steps", [100, 7, 4, 1])
def test_a_hit_ends_where_a_prompt_ended_or_at_a_checkpoint_inside_it(steps: int) -> None:
    world = World()
    prompt = keys(0, 11)
    assert world.serve(prompt, steps) == 0
    assert world.serve(prompt, steps) == 11
    assert world.serve(prompt + keys(1, 14)[11:], steps) == 11
    assert world.serve(keys(2, 12, shared=9), steps) == 8  # every fourth chunk
    assert world.serve(keys(3, 12, shared=7), steps) == 4


@pytest.mark.parametrize("steps", [100, 7, 4, 1])
def test_where_a_prompt_parts_it_leaves_a_checkpoint_for_the_next(steps: int) -> None:
    world = World()
    world.serve(keys(0, 11), steps)
    request = world.request()
    assert request.lookup(keys(1, 12, shared=7), 49, 0, 0.0) == 4 * SIZE
    assert request.miss() == Miss.NO_CHECKPOINT
    assert world.serve(keys(1, 12, shared=7), steps) == 4
    assert world.serve(keys(2, 12, shared=7), steps) == 7


def test_a_prompt_of_whole_chunks_ends_before_its_last_token_and_after_it() -> None:
    world = World()
    prompt = keys(0, 7)
    world.serve(prompt, tokens=28)
    request = world.request()
    assert request.lookup(prompt, 28, 0, 0.0) == 6 * SIZE  # its last token is computed
    assert request.lookup(prompt, 29, 0, 0.0) == 7 * SIZE


@pytest.mark.parametrize("number", range(3))
def test_a_checkpoint_that_lacks_one_part_is_none(number: int) -> None:
    world = World()
    prompt = keys(0, 11)
    world.serve(prompt)
    gone = world.evict(prompt, 11, number)
    assert not world.directory.tiers_of(gone)
    assert world.request().lookup(prompt, 45, 0, 0.0) == 8 * SIZE
    assert world.serve(prompt) == 8
    assert world.serve(prompt) == 11  # it was stored again


def test_all_of_a_hit_is_loaded_and_a_failed_part_lowers_the_next_offer() -> None:
    world = World()
    prompt = keys(0, 11)
    world.serve(prompt)
    request = world.request()
    assert request.lookup(prompt, 45, 0, 0.0) == 44
    copies = request.load(44)
    assert [(index, ticket.group) for index, ticket in copies] == [
        *((index, 0) for index in range(11)),
        (10, 1),
        (9, 1),
        (10, 2),
    ]
    for _, ticket in copies:
        failure = "copy" if ticket.group == 2 else None
        request.loaded(ticket.operation, failure)
        world.directory.complete(ticket.operation, failure, 0.0)
    assert request.lookup(prompt, 45, 0, 0.0) == 8 * SIZE
    request.end()
    world.directory.check()


@pytest.mark.parametrize("retired", [False, True])
def test_who_pins_a_prompt_at_its_end_pins_what_a_later_hit_needs(retired: bool) -> None:
    world = World()
    prompt = keys(0, 11)
    world.serve(prompt)
    request = world.request()
    assert request.lookup(prompt, 45, 0, 0.0) == 44
    if retired:
        request.retire()
    kept = request.end()
    assert set(kept) == (set() if retired else {*prompt, *(leaf.key for leaf in PARTS.leaves(prompt, 11))})
    assert world.directory.pin(kept, "asked", 9.0) == len(kept)
    assert list(kept[: len(prompt)]) == ([] if retired else prompt)  # where there is no room for all, leaves go first


def test_what_the_engine_holds_itself_is_not_loaded() -> None:
    world = World()
    prompt = keys(0, 11)
    world.serve(prompt)
    request = world.request()
    assert request.lookup(prompt, 45, 40, 0.0) == 4
    assert [(index, ticket.group) for index, ticket in request.load(4)] == [(10, 0), (10, 1), (10, 2)]


def staged(world: World) -> list[ChunkKey]:
    """A prompt that lies on disk only."""
    prompt = keys(0, 11)
    world.serve(prompt)
    for number in range(4, 12):
        world.serve(keys(number, 11))
    assert "host" not in world.directory.tiers_of(prompt[0])
    return prompt


def test_a_hit_waits_until_every_part_is_in_host_memory() -> None:
    world = World(host_slots=40, disk=1000)
    prompt = staged(world)
    request = world.request()
    assert request.lookup(prompt, 45, 0, 1.0) is None
    tickets = request.take_tickets()
    assert [ticket.group for ticket in tickets] == [0] * 11 + [1, 1, 2]
    world.end(tickets[:-1])
    assert request.lookup(prompt, 45, 0, 1.0) is None
    assert request.arriving() == [tickets[-1].key]
    world.end(tickets[-1:])
    assert request.lookup(prompt, 45, 0, 1.0) == 44
    for number in range(20, 30):  # what was promised stays, whatever comes
        world.serve(keys(number, 8))
    assert len(request.load(44)) == 14


@pytest.mark.parametrize("failure", ["corrupt", "absent", None])
def test_a_part_that_does_not_come_shortens_the_hit_to_nothing_that_lacks_it(failure: str | None) -> None:
    """Corrupt, missing, or late: the chunks of the spine that came are of no use then."""
    world = World(host_slots=40, disk=1000)
    prompt = staged(world)
    request = world.request()
    assert request.lookup(prompt, 45, 0, 1.0) is None
    tickets = request.take_tickets()
    world.end(tickets[:-1])
    if failure is not None:
        world.end(tickets[-1:], failure)
    assert request.lookup(prompt, 45, 0, 3.0) == 0
    assert request.miss() == (Miss.NO_CHECKPOINT if failure else Miss.LOAD_DEADLINE)
    request.end()
    if failure is None:
        world.end(tickets[-1:])
    world.directory.check()


def test_leaves_are_evicted_before_their_chunks_and_restored_with_them() -> None:
    world = World(host_slots=16)
    prompt = keys(0, 8)
    world.serve(prompt)
    world.serve(keys(1, 6))
    for chunk, key in enumerate(prompt):
        for leaf in PARTS.leaves(prompt, chunk + 1):
            assert world.directory.tiers_of(leaf.parent) or not world.directory.tiers_of(leaf.key)
        assert chunk == 0 or world.directory.tiers_of(prompt[chunk - 1]) or not world.directory.tiers_of(key)

    found = [*prompt, *(leaf.key for leaf in PARTS.leaves(prompt, 8))]
    parents = dict(zip(prompt[1:], prompt, strict=False)) | {leaf.key: leaf.parent for leaf in PARTS.leaves(prompt, 8)}
    again = World(host_slots=16, disk=100)
    again.directory.restore("disk", found, 0.0, parents)
    again.directory.check()
    request = again.request()
    assert request.lookup(prompt, 33, 0, 0.0) is None
    again.end(request.take_tickets())
    assert request.lookup(prompt, 33, 0, 0.0) == 32


def test_without_a_leaf_on_disk_a_restart_offers_no_hit_there() -> None:
    """The process was killed between a chunk's write and its leaf's."""
    prompt = keys(0, 8)
    leaves = [leaf.key for leaf in PARTS.leaves(prompt, 8)]
    world = World(disk=100)
    world.directory.restore("disk", [*prompt, *leaves[:-1]], 0.0, dict(zip(prompt[1:], prompt, strict=False)))
    assert world.request().lookup(prompt, 33, 0, 0.0) == 0


def test_leaves_that_another_instance_has_stored_are_asked_for() -> None:
    """The chunks first; then what a hit of all of them needs, or of the checkpoints inside."""
    prompt = keys(0, 11)
    directory = Directory(64, {}, get_policy("lru"), remote=["redis"])
    request = Request("r", directory, Settings(), SIZE, "", 0.0, PARTS)
    assert request.lookup(prompt, 45, 0, 0.0) is None
    assert request.take_question() == prompt and not request.asks_for_leaves
    directory.learn("redis", prompt, [True] * 11)
    request.answer(failed=False)
    assert request.lookup(prompt, 45, 0, 0.0) is None
    asked = request.take_question()
    assert request.asks_for_leaves and request.take_question() == ()
    assert set(asked) == {leaf.key for end in (11, 8, 4) for leaf in PARTS.leaves(prompt, end)}
    there = {leaf.key for leaf in PARTS.leaves(prompt, 8)}
    directory.learn("redis", asked, [key in there for key in asked])
    request.answer(failed=False)
    assert request.lookup(prompt, 45, 0, 0.0) is None
    tickets = request.take_tickets()
    assert [ticket.key for ticket in tickets] == [*prompt[:8], *(leaf.key for leaf in PARTS.leaves(prompt, 8))]
    for ticket in tickets:
        directory.complete(ticket.operation, None, 0.0)
    assert request.lookup(prompt, 45, 0, 0.0) == 32


@pytest.mark.parametrize("fails", [False, True])
def test_without_an_answer_about_leaves_there_is_no_hit(fails: bool) -> None:
    prompt = keys(0, 11)
    directory = Directory(64, {}, get_policy("lru"), remote=["redis"])
    directory.learn("redis", prompt, [True] * 11)
    request = Request("r", directory, Settings(), SIZE, "", 0.0, PARTS)
    assert request.lookup(prompt, 45, 0, 0.0) is None
    assert request.asks_for_leaves
    if fails:
        request.answer(failed=True)
    assert request.lookup(prompt, 45, 0, 2.0) == 0
    assert request.miss() == (Miss.REMOTE_FAILED if fails else Miss.REMOTE_DEADLINE)


STATES = Parts(SIZE, (Group("full", 2), Group("state", SIZE), Group("state", SIZE)), interval=4)


def test_a_state_is_kept_at_the_last_end_of_a_step_before_each_place_where_a_hit_may_end() -> None:
    world = World(parts=STATES)
    prompt = keys(0, 11)
    assert world.serve(prompt, steps=3 * SIZE) == 0  # states at 3, 6, 9 and 11 chunks
    assert world.serve(prompt) == 11
    assert world.serve(keys(2, 12, shared=9), steps=3 * SIZE) == 6  # the last before 8
    assert world.serve(keys(3, 12, shared=5), steps=SIZE) == 3  # the last before 4
    assert world.serve(keys(4, 12, shared=5), steps=SIZE) == 5  # where the one before parted


def test_a_prompt_in_one_step_leaves_the_state_of_its_end_only() -> None:
    world = World(parts=STATES)
    prompt = keys(0, 11)
    world.serve(prompt)
    held = [
        end for end in range(1, 12) if all(world.directory.tiers_of(leaf.key) for leaf in STATES.leaves(prompt, end))
    ]
    assert held == [11]
    assert world.serve(keys(1, 13, shared=11)) == 11
    assert world.serve(keys(2, 13, shared=9)) == 0


def test_no_state_is_kept_behind_which_no_step_ended() -> None:
    world = World(parts=STATES)
    prompt = keys(0, 8)
    world.serve(prompt, steps=3)  # none ends behind the fourth chunk; vLLM cuts the last one behind the eighth
    held = [
        end for end in range(1, 9) if all(world.directory.tiers_of(leaf.key) for leaf in STATES.leaves(prompt, end))
    ]
    assert held == [8]


def test_states_of_others_are_asked_for_at_many_lengths() -> None:
    prompt = keys(0, 11)
    directory = Directory(64, {}, get_policy("lru"), remote=["redis"])
    directory.learn("redis", prompt, [True] * 11)
    request = Request("r", directory, Settings(), SIZE, "", 0.0, STATES)
    assert request.lookup(prompt, 45, 0, 0.0) is None
    assert set(request.take_question()) == {leaf.key for end in range(1, 12) for leaf in STATES.leaves(prompt, end)}


def test_a_prompt_that_is_stored_in_several_steps_uses_its_leaves_once() -> None:
    prompt = keys(0, 11)
    touches = []
    for steps in (100, 16):  # these end at checkpoints
        world = World()
        world.serve(prompt, steps)
        places = world.directory._places
        leaves = [leaf.key for end in (4, 8, 11) for leaf in PARTS.leaves(prompt, end)]
        touches.append([places.touches[places.nodes.find(key)] for key in leaves])
    assert touches[0] == touches[1]


def test_each_leaf_is_pinned_once() -> None:
    world = World()
    request = world.request()
    prompt = keys(0, 11)
    request.lookup(prompt, 44, 0, 0.0)
    request.store(prompt, 44, 44, 0.0)
    pinned = list(request.end())
    assert len(pinned) == len(set(pinned)) > 11


def test_auto_loads_every_hit_with_leaves() -> None:
    """They are not weighed, so a slow tier is waited for, as with always."""
    world = World(disk=64)
    prompt = keys(0, 11)
    world.serve(prompt)
    world.directory.speeds.computed([(0, 45)], 1e-6)
    world.directory.speeds.loaded(1, 100.0)
    request = world.request(load="auto")
    assert request.lookup(prompt, 45, 0, 0.0) == 44
