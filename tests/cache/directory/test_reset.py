"""A reset while copies are under way."""

from __future__ import annotations

from tests.cache.directory.test_directory import keys, make, put, settle


def test_after_a_reset_only_chunks_that_were_there_are_waited_for() -> None:
    """What is being deleted is gone already. The end of each copy looks at its own prefix, not at all that the reset could not forget."""
    directory = make(4, disk=64)
    for number in range(20):
        put(directory, keys(f"prompt {number}", 2))
    busy = keys("busy", 2)
    tickets = directory.store(busy, 0.0)
    assert directory.reset() == 2
    assert directory._doomed == set(busy)
    settle(directory, tickets[1:])
    assert directory._doomed == set(busy[:1]), "the first one's copy is still under way"
    settle(directory, tickets[:1])
    assert not directory._doomed and directory.num_open == 0
    assert not any(directory.tiers_of(key) for key in busy)
    directory.check()


def test_a_failed_copy_lets_the_chunks_before_it_go() -> None:
    directory = make(8)
    chain = keys("a", 3)
    put(directory, chain[:2])
    tickets = directory.store(chain, 0.0)
    assert len(tickets) == 1 and directory.reset() == 3
    settle(directory, tickets, failure="copy")
    assert not directory._doomed
    assert directory.usage()["host"][0] == 0
    directory.check()
