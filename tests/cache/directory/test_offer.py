"""Offers and uses of chunks that no request speaks for."""

from __future__ import annotations

from lmc.cache.directory import Directory, store_offer, use_prefix
from tests.cache.directory.test_directory import keys, make, put, settle


def complete(directory: Directory, tickets: dict) -> None:
    settle(directory, tickets.values())
    directory.check()


def test_an_offer_continues_what_is_held():
    directory = make(8)
    chain = keys("a", 4)
    put(directory, chain[:2])
    tickets, kept = store_offer(directory, chain, 2, "", 0.0)
    assert list(tickets) == [2, 3] and kept
    complete(directory, tickets)
    assert directory.lookup(chain, 0.0).num_chunks == 4
    assert store_offer(directory, chain, 2, "", 0.0) == ({}, True)


def test_an_offer_without_what_comes_before_stands_alone():
    directory = make(8)
    chain = keys("a", 4)
    tickets, kept = store_offer(directory, chain, 2, "", 0.0)
    assert list(tickets) == [2, 3] and kept
    complete(directory, tickets)
    assert directory.lookup(chain, 0.0).num_chunks == 0
    put(directory, chain[:2])
    assert directory.lookup(chain, 0.0).num_chunks == 4


def test_what_finds_no_room_is_not_kept():
    directory = make(2)
    tickets, kept = store_offer(directory, keys("a", 4), 0, "", 0.0)
    assert list(tickets) == [0, 1] and not kept
    complete(directory, tickets)


def _unreached(directory: Directory, chain: list) -> None:
    """The chain is on disk, which did not give its first chunk out when it was wanted."""
    directory.restore("disk", chain, 0.0)
    for ticket in directory.stage(chain[:1], 0.0):
        directory.complete(ticket.operation, "unavailable", 0.0)


def test_nobody_is_asked_for_a_chunk_that_is_not_on_offer():
    directory = make(8, disk=8)
    chain = keys("a", 4)
    _unreached(directory, chain[:2])
    tickets, kept = store_offer(directory, chain, 2, "", 0.0)
    assert list(tickets) == [2, 3] and kept
    complete(directory, tickets)
    assert directory.num_open == 0


def test_a_use_leaves_no_copy_open():
    directory = make(8, disk=8)
    chain = keys("a", 2)
    _unreached(directory, chain)
    use_prefix(directory, chain, "", 0.0)
    assert directory.num_open == 0
    directory.check()
