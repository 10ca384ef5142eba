"""Whatever a peer sends in the form of the wire, the node's directories stay sound: it is answered, or refused with a NodeError."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmc.cache.node.wire as wire
from lmc.cache.keys import ChunkKey, Namespace
from lmc.cache.node.domain import Domain, DomainName, open_rank
from lmc.cache.node.memory import Extents, Memory, Places
from lmc.cache.node.session import Mapping, Session
from lmc.errors import NodeError
from tests.cache import instance
from tests.cache.instance import CHUNK_TOKENS

NAMESPACE = Namespace("test", "m", "", "u8", "l", CHUNK_TOKENS)
TERMS = wire.Attach("e", NAMESPACE, "opaque", 4096, [0], [bytes(16)], 1, 0.05, 5.0, False)
few = st.integers(0, 3)
tokens = st.integers(0, 6 * CHUNK_TOKENS)
keys = st.tuples(few, st.integers(0, 5)).map(lambda one: b"".join(bytes([one[0], n]) * 16 for n in range(one[1])))
events = st.one_of(
    st.builds(wire.Begin, few, st.just("r"), st.sampled_from(["", "t"]), st.booleans()),
    st.builds(wire.Lookup, few, tokens, tokens, st.integers(0, 5), keys),
    st.builds(wire.Admit, few, tokens),
    st.builds(wire.Store, few, st.integers(0, 5), keys, tokens, tokens),
    st.builds(wire.End, few, st.floats(0, 10)),
    st.builds(wire.Done, st.integers(1, 30), st.sampled_from(["", "copy", "nonsense"])),
    st.builds(wire.Offer, st.sampled_from(["", "t"]), st.integers(0, 5), keys),
    st.builds(wire.Quiet, few),
    st.builds(wire.Where, keys),
    st.builds(wire.Use, st.sampled_from(["", "t"]), keys, st.just("r"), st.floats(0, 10)),
)


@contextmanager
def domain() -> Iterator[Domain]:
    memory = Memory(64 << 10)
    config = instance.settings()
    name = DomainName(NAMESPACE, 4096, (0,))
    places = Places(Extents(memory.size), [4096])
    opened = [open_rank(config, name, 0, places.most_slots)]
    one = Domain(config, name, memory, places, opened, time.monotonic, lambda: None)
    try:
        yield one
    finally:
        one.close(0.0)
        memory.close()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), events), max_size=60))
def test_no_event_harms_the_directory(sent: list[tuple[bool, wire.Event]]) -> None:
    with domain() as one:
        mappings = [[Mapping(bytes(16), 0, -1)], [Mapping(bytes(16), 0, -1)]]
        numbers = iter(range(1, 1000))
        sessions = [Session(next(numbers), one, TERMS, mapping) for mapping in mappings]
        now = 0.0
        for which, event in sent:
            now += 1.0
            session = sessions[which]
            try:
                for answer in session.handle([event], now):
                    if isinstance(answer, wire.Loads | wire.Stores):
                        assert len(answer.operations) == len(answer.slots) == len(answer.chunks)
            except NodeError:
                session.leave(now)
                session.settle(now)
                sessions[which] = Session(next(numbers), one, TERMS, mappings[which])
            one.directory.check()
        for session in sessions:
            session.leave(now)
            session.settle(now)
        one.directory.expire(now + 1000)
        assert (one.directory.num_open, one.directory.num_pins) == (0, 0)
        one.directory.check()


def test_an_engine_cannot_end_anothers_copy() -> None:
    with domain() as one:
        first, second = (Session(number, one, TERMS, []) for number in (1, 2))
        store = wire.Store(1, 0, bytes(32), CHUNK_TOKENS, CHUNK_TOKENS)
        (answer,) = first.handle([wire.Begin(1, "r", "", False), store], 0.0)
        assert isinstance(answer, wire.Stores) and len(answer.operations) == 1
        with pytest.raises(NodeError, match="does not have"):
            second.handle([wire.Done(answer.operations[0], "")], 1.0)
        assert one.directory.num_open == 1


def test_slots_in_use_are_looked_for_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin holds a chunk of the run that is to be given back."""
    with domain() as one:
        session = Session(1, one, TERMS, [])
        store = wire.Store(1, 0, bytes(32), CHUNK_TOKENS, CHUNK_TOKENS)
        (answer,) = session.handle([wire.Begin(1, "r", "", False), store], 0.0)
        assert isinstance(answer, wire.Stores)
        session.handle([wire.Done(answer.operations[0], "")], 0.0)
        one.directory.pin([ChunkKey(bytes(32))], "admin", 100.0)
        recall, recalls = one.directory.lending.recall, []
        monkeypatch.setattr(one.directory.lending, "recall", lambda slots: recalls.append(slots) or recall(slots))
        for tick in range(60):
            one.give_back(50.0 + tick / 20)
        assert len(recalls) == 3 and one.giving_back
        one.directory.unpin("admin")
        one.give_back(60.0)
        assert not one.giving_back and one.places.num_extents == 0


def test_without_memory_to_take_chunks_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with domain() as one:
        while one.grow():
            pass
        keys = [ChunkKey(bytes([number]) * 32) for number in range(one.directory.lending.num_free + 1)]
        lookups: list[object] = []
        monkeypatch.setattr(one.directory, "lookup", lambda *values: lookups.append(values))
        one.ensure_slots(keys, 0.0, store=True)
        assert not lookups
