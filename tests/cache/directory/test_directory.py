"""The directory by example; test_directory_machine.py tries everything else."""

from __future__ import annotations

import dataclasses
import gc
import sys

import pytest
from blake3 import blake3

from lmc.cache.directory import HOST, Capacity, Directory, Miss, Ticket, evicted_from
from lmc.cache.directory.nodes import Nodes
from lmc.cache.directory.remote import BELIEVED_SECONDS, RemoteKeys
from lmc.cache.keys import ChunkKey
from lmc.cache.policy.registry import get_policy


def keys(name: str, count: int) -> list[ChunkKey]:
    return [ChunkKey(blake3(f"{name}{index}".encode()).digest()) for index in range(count)]


def make(host_slots: int = 4, disk: int = 0, **options) -> Directory:
    return Directory(
        host_slots,
        {"disk": Capacity.of_chunks(disk)} if disk else {},
        get_policy(options.pop("policy", "lru")),
        **options,
    )


def settle(directory: Directory, tickets=(), failure: str | None = None) -> list:
    """Everything under way ends; returns what was done."""
    done = list(tickets)
    for ticket in done:
        directory.complete(ticket.operation, failure, 0.0)
    while more := directory.take_tickets():
        done += more
        for ticket in more:
            directory.complete(ticket.operation, None, 0.0)
    directory.check()
    return done


def put(directory: Directory, chain: list[ChunkKey], now: float = 0.0, **options) -> list:
    return settle(directory, directory.store(chain, now, **options))


def test_a_chunk_is_visible_when_its_store_is_done():
    directory = make()
    chain = keys("a", 3)
    assert directory.lookup(chain, 0.0).miss == Miss.NEVER_STORED
    tickets = directory.store(chain, 0.0)
    assert [ticket.key for ticket in tickets] == chain and len({ticket.slot for ticket in tickets}) == 3
    assert directory.lookup(chain, 0.0).miss == Miss.IN_FLIGHT
    directory.complete(tickets[1].operation, None, 0.0)
    assert directory.lookup(chain, 0.0).num_chunks == 0
    directory.complete(tickets[0].operation, None, 0.0)
    assert directory.lookup(chain, 0.0).tiers == (HOST, HOST)
    directory.complete(tickets[2].operation, "copy", 0.0)
    assert directory.lookup(chain, 0.0).miss == Miss.STORE_FAILED


def test_only_what_is_missing_is_stored():
    directory = make(8)
    put(directory, keys("a", 3))
    assert [ticket.key for ticket in directory.store(keys("a", 5), 0.0)] == keys("a", 5)[3:]


def test_children_go_before_parents_and_the_reason_says_where_from():
    directory = make(4)
    put(directory, keys("a", 3))
    put(directory, keys("b", 2))
    found = directory.lookup(keys("a", 3), 0.0)
    assert found.tiers == (HOST, HOST) and found.miss == evicted_from(HOST) == "evicted from host"


def test_the_reason_names_the_tier_that_gave_a_chunk_up_last():
    directory = make(1, disk=2)
    for name in "abc":
        put(directory, keys(name, 1))
    assert directory.lookup(keys("a", 1), 0.0).miss == "evicted from disk"
    assert directory.lookup(keys("b", 1), 0.0).tiers == ("disk",)


def test_a_prompt_longer_than_the_host_keeps_its_head():
    directory = make(4)
    tickets = put(directory, keys("a", 6))
    assert [ticket.key for ticket in tickets] == keys("a", 4)
    found = directory.lookup(keys("a", 6), 0.0)
    assert found.num_chunks == 4 and found.miss == Miss.NO_ROOM
    assert directory.counts.stores_dropped == 2


def test_slots_of_a_load_are_not_given_away():
    directory = make(2)
    put(directory, keys("a", 2))
    loads = directory.load(keys("a", 2))
    assert directory.store(keys("b", 1), 0.0) == []
    settle(directory, loads)
    assert len(directory.store(keys("b", 1), 0.0)) == 1
    with pytest.raises(KeyError):
        directory.load(keys("a", 2))


def test_a_failed_load_takes_the_chunk_out_when_nobody_reads_it_any_more():
    directory = make(2)
    put(directory, keys("a", 1))
    first, second = directory.load(keys("a", 1))[0], directory.load(keys("a", 1))[0]
    directory.complete(first.operation, "copy", 0.0)
    assert directory.lookup(keys("a", 1), 0.0).miss == Miss.LOAD_FAILED
    assert directory.usage()[HOST][0] == 1, "the slot is still being read"
    directory.complete(second.operation, None, 0.0)
    assert directory.usage()[HOST][0] == 0
    assert len(directory.store(keys("a", 1), 0.0)) == 1


def test_write_through_writes_parents_first_and_evicts_with_the_write():
    directory = make(4, disk=2)
    done = put(directory, keys("a", 2))
    assert [(ticket.kind, ticket.key) for ticket in done[2:]] == [("write", key) for key in keys("a", 2)]
    done = put(directory, keys("b", 1))
    write = next(ticket for ticket in done if ticket.kind == "write")
    assert write.evict == () or write.evict == (keys("a", 2)[1],)


def test_a_chunk_of_the_disk_is_staged_with_its_parents():
    directory = make(2, disk=8)
    put(directory, keys("a", 2))
    put(directory, keys("b", 2))
    assert directory.lookup(keys("a", 2), 0.0).tiers == ("disk", "disk")
    tickets = directory.stage(keys("a", 2), 0.0)
    assert [(ticket.kind, ticket.tier) for ticket in tickets] == [("stage", "disk")] * 2
    assert directory.arriving(keys("a", 2)) and directory.num_settled(keys("a", 2)) == 0
    settle(directory, tickets)
    assert directory.lookup(keys("a", 2), 0.0).tiers == (HOST, HOST)
    assert not directory.arriving(keys("a", 2)) and directory.num_settled(keys("a", 2)) == 2


@pytest.mark.parametrize(
    ("cause", "deleted"), [("corrupt", True), ("error", True), ("late", False), ("unavailable", False)]
)
def test_a_failed_stage_deletes_what_cannot_be_read(cause, deleted):
    directory = make(2, disk=8)
    put(directory, keys("a", 2))
    put(directory, keys("b", 2))
    done = settle(directory, directory.stage(keys("a", 1), 0.0), cause)
    assert [ticket.kind for ticket in done] == (["stage", "delete"] if deleted else ["stage"])
    assert directory.lookup(keys("a", 2), 0.0).num_chunks == (0 if deleted else 2)


@pytest.mark.parametrize(("cause", "deleted"), [("corrupt", True), ("error", False), ("absent", False)])
def test_chunks_of_others_are_deleted_only_when_they_are_corrupt(cause, deleted):
    directory = make(4, remote=("redis",))
    directory.learn("redis", keys("a", 3), [True, True, False])
    assert directory.lookup(keys("a", 3), 0.0).tiers == ("redis", "redis")
    done = settle(directory, directory.stage(keys("a", 2), 0.0), cause)
    assert [ticket.kind for ticket in done] == ["stage", "stage", *(["delete", "delete"] if deleted else [])]
    assert directory.lookup(keys("a", 3), 0.0).miss == Miss.LOAD_FAILED
    assert directory.known_remote() == {"redis": 0}


def test_remote_tiers_get_each_chunk_once():
    directory = make(4, disk=4, remote=("redis", "s3"))
    done = put(directory, keys("a", 1))
    assert [(ticket.kind, ticket.tier) for ticket in done[1:]] == [("write", tier) for tier in ("disk", "redis", "s3")]
    assert put(directory, keys("a", 1)) == []
    directory.learn("redis", keys("a", 1), [False])
    assert [(ticket.kind, ticket.tier) for ticket in put(directory, keys("a", 1))] == [("write", "redis")]


def test_a_queue_of_one_tier_does_not_hold_up_another():
    directory = make(8, disk=8, remote=("redis",), queue_depth=2)
    settle_all = [directory.complete(ticket.operation, None, 0.0) for ticket in directory.store(keys("a", 4), 0.0)]
    assert len(settle_all) == 4
    assert directory.num_writing == {"disk": 2, "redis": 2}
    assert directory.counts.writes_dropped == 4, "two of each tier"
    for ticket in directory.take_tickets():
        if ticket.tier == "disk":
            directory.complete(ticket.operation, None, 0.0)
    directory.store(keys("a", 4), 0.0)
    assert directory.num_writing == {"disk": 2, "redis": 2}
    assert directory.counts.writes_dropped == 6


def test_what_is_not_written_is_counted():
    full = make(2, disk=1)
    put(full, keys("a", 1))
    full.pin(keys("a", 1), "me", 10.0)
    assert [ticket.kind for ticket in put(full, keys("b", 1))] == ["store"]
    assert full.counts.writes_dropped == 1, "nothing on disk may go"
    hurried = make(1, disk=4, write="back")
    put(hurried, keys("a", 1))
    put(hurried, keys("b", 1))
    assert hurried.counts.writes_dropped == 1, "there was no time to write it"
    assert hurried.lookup(keys("a", 1), 0.0).miss == "evicted from host"


@pytest.mark.parametrize("failure", [None, "error"])
def test_write_back_gives_a_slot_up_when_the_chunk_is_below_and_not_before(failure):
    directory = make(2, disk=4, write="back")
    put(directory, keys("a", 1))
    stored = directory.store(keys("b", 1), 0.0)
    (write,) = directory.take_tickets()
    assert (write.kind, write.key) == ("write", keys("a", 1)[0]), "one slot is kept free ahead of need"
    assert directory.lookup(keys("a", 1), 0.0).tiers == (HOST,)
    directory.complete(write.operation, failure, 0.0)
    assert directory.lookup(keys("a", 1), 0.0).tiers == ((HOST,) if failure else ("disk",))
    settle(directory, stored)


@pytest.mark.parametrize("lost", ["disk", "redis"])
def test_a_chunk_whose_write_failed_is_not_there_and_is_written_at_its_next_touch(lost):
    directory = make(2, disk=4, remote=("redis",))
    (store,) = directory.store(keys("a", 1), 0.0)
    directory.complete(store.operation, None, 0.0)
    for write in directory.take_tickets():
        directory.complete(write.operation, "error" if write.tier == lost else None, 0.0)
    assert lost not in directory.tiers_of(keys("a", 1)[0]) and len(directory.tiers_of(keys("a", 1)[0])) == 2
    again = put(directory, keys("a", 1))
    assert [(write.kind, write.tier) for write in again] == [("write", lost)]
    assert len(directory.tiers_of(keys("a", 1)[0])) == 3


def written(directory: Directory, chain: list[ChunkKey], saved: int) -> list[Ticket]:
    """Store a chain whose chunks save so many bytes each below the host; returns the write tickets."""
    for ticket in directory.store(chain, 0.0):
        directory.complete(ticket.operation, None, 0.0)
    writes = directory.take_tickets()
    for ticket in writes:
        directory.complete(ticket.operation, None, 0.0, saved)
    directory.check()
    return writes


def test_a_tier_of_ten_chunks_holds_thirteen_that_are_compressed_and_room_for_one_that_may_not_be():
    directory = Directory(40, {"disk": Capacity(1000, 100, 20)}, get_policy("lru"))
    for number in range(30):
        written(directory, keys(f"{number}", 1), saved=30)
    assert directory.usage()["disk"] == (13, 20) and directory.room()["disk"] == (910, 1000)


def test_a_chunk_that_is_not_shortened_takes_the_place_of_several():
    directory = Directory(40, {"disk": Capacity(100, 10, 40)}, get_policy("lru"))
    for number in range(20):
        written(directory, keys(f"{number}", 1), saved=7)
    assert directory.room()["disk"] == (20 * 3, 100)
    for number in range(20, 26):
        (write,) = written(directory, keys(f"{number}", 1), saved=0)
        taken, room = directory.room()["disk"]
        assert taken <= room and len(write.evict) <= 4
    assert directory.usage()["disk"][0] < 20


def test_what_was_evicted_for_a_write_that_finds_no_room_all_the_same_is_deleted():
    directory = Directory(40, {"disk": Capacity(20, 10, 40)}, get_policy("lru"))
    written(directory, keys("a", 2), saved=5)
    written(directory, keys("b", 1), saved=1)
    directory.pin(keys("b", 1), "user", 100.0)
    directory.pin(keys("a", 1), "user", 100.0)
    assert directory.room()["disk"] == (19, 20)
    assert [(ticket.kind, ticket.key) for ticket in written(directory, keys("c", 1), 0)] == [
        ("delete", keys("a", 2)[1])
    ]
    assert directory.room()["disk"] == (14, 20)
    assert directory.counts.writes_dropped == 1


def test_restoring_keeps_the_youngest_and_names_the_rest():
    directory = make(2, disk=3)
    assert directory.restore("disk", keys("a", 5), 0.0) == keys("a", 2)
    assert directory.usage()["disk"] == (3, 3)
    assert directory.tiers_of(keys("a", 5)[2]) == ["disk"]


def test_a_chunk_staged_while_its_expired_copy_is_being_deleted_is_not_expired():
    directory = make(disk=4, remote=["redis"], ttl=2.0)
    chain = keys("a", 1)
    put(directory, chain)
    directory.expire(5.0)
    directory.learn("redis", chain, [True])
    (stage,) = directory.stage(chain, 5.0)
    directory.complete(stage.operation, None, 5.0)
    assert directory.lookup(chain, 5.0).tiers == (HOST,)
    settle(directory)


def test_pins_hold_until_they_are_given_up_or_expire():
    directory = make(2)
    put(directory, keys("a", 2))
    assert directory.pin(keys("a", 3), "me", 10.0) == 2
    assert directory.pins() == {"me": (2, 10.0)}
    assert directory.store(keys("b", 1), 0.0) == []
    directory.expire(9.0)
    assert directory.store(keys("b", 1), 9.0) == []
    directory.expire(10.0)
    assert directory.num_pins == 0
    assert len(directory.store(keys("b", 1), 10.0)) == 1


def test_a_pin_is_added_to_and_ends_at_the_expiry_given_last():
    directory = make(4)
    put(directory, keys("a", 3))
    directory.pin(keys("a", 1), "me", 10.0)
    assert directory.pin(keys("a", 3), "me", 20.0) == 3
    directory.expire(15.0)
    assert directory.store(keys("b", 4), 15.0)[1:] == []
    assert directory.unpin("me") and not directory.unpin("me")
    directory.check()


def test_clearing_a_prefix_leaves_its_siblings():
    directory = make(8)
    root, one, other = keys("root", 1), keys("one", 2), keys("other", 2)
    put(directory, root + one)
    put(directory, root + other)
    assert directory.clear_from([*root, one[0]]) == 0
    assert directory.lookup(root + one, 0.0).num_chunks == 1
    assert directory.lookup(root + one, 0.0).miss == Miss.CLEARED
    assert directory.lookup(root + other, 0.0).num_chunks == 3


def test_clearing_a_tenant_reaches_every_tier():
    directory = make(4, disk=4, remote=("redis",))
    put(directory, keys("a", 2), tenant="a")
    put(directory, keys("b", 2), tenant="b")
    assert directory.clear("a") == 0
    done = settle(directory)
    assert sorted((ticket.kind, ticket.tier) for ticket in done) == [("delete", "disk")] * 2 + [("delete", "redis")] * 2
    assert directory.lookup(keys("b", 2), 0.0).num_chunks == 2


def test_what_is_in_use_is_not_cleared():
    directory = make(4)
    put(directory, keys("a", 2))
    loads = directory.load(keys("a", 1))
    assert directory.clear() == 1
    settle(directory, loads)
    assert directory.clear() == 0


def test_policies_see_touches_and_new_chunks_from_the_last_to_the_first():
    """So a parent is younger than its child, and evictions find a leaf at once."""
    seen = []

    def note(what, call):
        def noted(state, node, now):
            seen.append((what, node))
            call(state, node, now)

        return noted

    lru = get_policy("lru")
    spec = dataclasses.replace(lru, on_insert=note("new", lru.on_insert), on_hit=note("touch", lru.on_hit))
    directory = Directory(8, {}, spec)
    put(directory, keys("a", 3))  # nodes 0, 1 and 2
    put(directory, keys("a", 5))
    assert seen == [
        ("new", 2),
        ("new", 1),
        ("new", 0),
        ("new", 4),
        ("new", 3),
        ("touch", 2),
        ("touch", 1),
        ("touch", 0),
    ]


def test_a_prompt_longer_than_the_host_asks_for_no_victim_in_vain():
    asked = []

    def victim(state, held):
        asked.append(lru.victim(state, held))
        return asked[-1]

    lru = get_policy("lru")
    directory = Directory(4, {}, dataclasses.replace(lru, victim=victim))
    put(directory, keys("a", 3))
    assert len(put(directory, keys("b", 10))) == 4 and len(asked) == 3
    assert put(directory, keys("b", 12)) == [] and len(asked) == 3
    assert -1 not in asked
    assert directory.lookup(keys("b", 12), 0.0).miss == Miss.NO_ROOM
    assert len(put(directory, keys("a", 2))) == 2, "another prompt gets room"


def test_nodes_find_what_was_added_and_not_removed():
    nodes = Nodes(64)
    known = {}
    for turn in range(1000):
        key = keys(f"n{turn * 7919 % 97}", 1)[0]
        if key in known:
            nodes.remove(known.pop(key))
        elif not nodes.full:
            known[key] = nodes.add(key)
        assert len(nodes) == len(known) and sorted(nodes) == sorted(known.values())
    assert all(nodes.find(key) == node for key, node in known.items())
    assert nodes.find(keys("other", 1)[0]) == -1


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_memory_does_not_grow_with_use(policy):
    """Counts the interpreter's memory blocks over 16,000 stores and evictions; benchmarks/directory.py does a million."""
    directory = make(100, disk=300, policy=policy, ttl=1e9, tenant_quota=80)

    def use(first: int, count: int) -> int:
        for number in range(first, first + count):
            tickets = directory.store(keys(f"{number}/", 8), float(number), tenant=str(number % 7))
            while tickets:
                for ticket in tickets:
                    directory.complete(ticket.operation, None, 0.0)
                tickets = directory.take_tickets()
        gc.collect()
        return sys.getallocatedblocks()

    filled = use(0, 1_000)  # the reasons of misses, 8,192 at most, are all there
    assert use(1_000, 2_000) - filled < 6_000, "one block kept for each chunk would be 16,000"
    directory.check()


def test_what_is_known_of_a_remote_tier_is_bounded():
    known = RemoteKeys("redis", 3)
    for key in keys("a", 5):
        known.learn(key)
    known.learn(keys("a", 3)[2])
    known.learn(keys("b", 1)[0])
    assert [key in known for key in keys("a", 5)] == [False, False, True, False, True] and len(known) == 3


def test_a_chunk_in_use_is_published_again_when_it_was_known_long_ago():
    """Nothing tells when a Redis was emptied."""
    directory = make(remote=["redis"])
    chain = keys("a", 2)
    assert [ticket.kind for ticket in put(directory, chain)] == ["store", "store", "write", "write"]
    assert put(directory, chain, 1.0 + BELIEVED_SECONDS / 2) == []
    again = directory.store(chain, 1.0 + BELIEVED_SECONDS)
    assert again == [] and [ticket.key for ticket in directory.take_tickets()] == chain


def test_what_was_brought_up_from_a_remote_tier_is_known_to_be_there():
    directory = make(2, remote=["redis"])
    chain = keys("a", 2)
    directory.learn("redis", chain, [True, True])
    directory.lookup(chain, 1.0 + BELIEVED_SECONDS)
    for ticket in directory.stage(chain, 1.0 + BELIEVED_SECONDS):
        directory.complete(ticket.operation, None, 1.0 + BELIEVED_SECONDS)
    assert directory.take_tickets() == []
    directory.store(chain, 2.0 + BELIEVED_SECONDS)
    assert directory.take_tickets() == []


def test_a_full_medium_costs_some_chunks_once_for_all_writes_that_were_under_way():
    directory = make(8, disk=100)
    put(directory, keys("a", 4))
    fresh = directory.store(keys("b", 4), 0.0)
    for ticket in fresh:
        directory.complete(ticket.operation, None, 0.0)
    for ticket in directory.take_tickets():
        directory.complete(ticket.operation, "full", 0.0)
    (relief,) = directory.take_tickets()
    assert (relief.kind, relief.key) == ("delete", keys("a", 4)[-1])
    assert directory.counts.evicted == {"disk": 1}
    directory.complete(relief.operation, None, 0.0)
    assert [ticket.kind for ticket in put(directory, keys("b", 4))] == ["write"] * 4
    assert directory.usage()["disk"][0] == 7


def test_a_stage_that_hangs_is_not_waited_for_and_keeps_only_its_slot():
    directory = make(4, disk=10)
    chain = keys("a", 2)
    directory.restore("disk", chain, 0.0)
    first, second = directory.stage(chain, 0.0)
    directory.mark_stuck([first.operation])
    assert not directory.arriving([chain[0]])
    directory.complete(second.operation, "unavailable", 0.0)
    tickets = directory.take_tickets()
    assert [ticket.kind for ticket in tickets] == ["delete"]
    settle(directory, tickets)
    stored = put(directory, chain)
    assert [ticket.kind for ticket in stored] == ["store", "store", "write"], "what could not be read is stored anew"
    assert first.slot not in {ticket.slot for ticket in stored}
    assert len(put(directory, keys("b", 4))) < 8, "one slot is still taken"
    assert (directory.num_open, directory.num_stuck) == (1, 1)
    directory.complete(first.operation, None, 0.0)
    assert (directory.num_open, directory.num_stuck) == (0, 0)
    directory.clear()
    settle(directory)
    assert len([t for t in put(directory, keys("c", 4)) if t.kind == "store"]) == 4


def test_writes_that_never_end_hold_a_small_share_of_the_host():
    """A disk that is slower than the stores must not cost the hits of host memory."""
    directory = make(200, disk=1000, queue_depth=1024)
    hot = [keys(f"hot{number}", 10) for number in range(8)]
    hits = 0
    for turn in range(300):
        chain = hot[turn % 8] if turn % 3 == 0 else keys(f"once{turn}", 10)
        hits += directory.lookup(chain, 0.0).num_chunks if turn % 3 == 0 and turn > 30 else 0
        for ticket in directory.store(chain, 0.0):
            directory.complete(ticket.operation, None, 0.0)
        directory.take_tickets()
    assert directory.num_writing == {"disk": 25}
    assert directory.counts.stores_dropped == 0
    unhindered = make(175)
    expected = 0
    for turn in range(300):
        chain = hot[turn % 8] if turn % 3 == 0 else keys(f"once{turn}", 10)
        expected += unhindered.lookup(chain, 0.0).num_chunks if turn % 3 == 0 and turn > 30 else 0
        put(unhindered, chain)
    assert hits >= expected
