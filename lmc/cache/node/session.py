"""What a node keeps of one attached engine: its requests, the copies that it was told to make, and the processes that make them.

A slot that was named to an engine is the engine's until the copy has ended: as the engine says, or because no process of the engine's can
touch the memory any more. That is so when each of its workers has unmapped the memory or has died, or when the engine says, in a later
session, that its workers are done with this one. Time alone never ends a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import lmc.cache.node.wire as wire
from lmc.cache.directory import Change, Request, Ticket, store_offer, use_prefix
from lmc.cache.keys import ChunkKey
from lmc.cache.node.domain import Asking, Domain
from lmc.cache.plan import CAUSES, COPY, CRASH
from lmc.errors import NodeError

logger = logging.getLogger(__name__)

PROMISE_SECONDS = 30.0  # an engine that was told of a hit comes for it before, or asks again
MOST_REQUESTS = 100_000
MOST_CHANGES = 100_000  # that wait for an engine which does not read


@dataclass(eq=False)
class Mapping:
    """A worker process that was given the memory."""

    worker: bytes
    rank: int
    watch: int  # descriptor that tells of its end
    taken: bool = False
    gone: bool = False  # it has unmapped the memory, or died


class _Open(NamedTuple):
    kind: str
    asking: Asking | None  # of a load


@dataclass(eq=False)
class Session:
    number: int
    domain: Domain
    terms: wire.Attach  # the engine's own settings for its requests are among them
    mappings: Sequence[Mapping]
    ended: bool = False
    changes: list[Change] = field(default_factory=list)  # that the engine has not heard of
    forget: bool = False  # there were more
    num_requests: int = 0
    num_loads: int = 0
    _requests: dict[int, Asking] = field(default_factory=dict)
    _open: dict[int, _Open] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        return self.terms.engine

    @property
    def num_open(self) -> int:
        """Copies that the engine may be making."""
        return len(self._open)

    @property
    def fenced(self) -> bool:
        """No process can touch the memory for this session any more."""
        return all(mapping.gone for mapping in self.mappings)

    def handle(self, events: Sequence[wire.Event], now: float) -> list[wire.Reply]:
        """Raises NodeError for what no engine of this version sends."""
        answers: list[wire.Reply] = []
        for event in events:  # the most frequent ones first
            if isinstance(event, wire.Lookup):
                answers.append(self._lookup(event, now))
            elif isinstance(event, wire.Begin):
                self._begin(event, now)
            elif isinstance(event, wire.End):
                self._end(event, now)
            elif isinstance(event, wire.Done):
                self._done(event, now)
            elif isinstance(event, wire.Admit):
                answers.append(self._admit(event, now))
            elif isinstance(event, wire.Store):
                answers.append(self._store(event, now))
            elif isinstance(event, wire.Offer):
                answers.append(self._offer(event, now))
            elif isinstance(event, wire.Use):
                self._use(event, now)
            elif isinstance(event, wire.Where):
                answers.append(self._where(event))
        return answers

    def note(self, changes: Sequence[Change]) -> None:
        """Of chunks of the namespace, for an engine that announces them."""
        if len(self.changes) + len(changes) > MOST_CHANGES:
            self.changes.clear()
            self.forget = True
        else:
            self.changes += changes

    def take_changes(self) -> tuple[list[tuple[str, bytes, bool]], bool]:
        """As Answers has them."""
        told = [(change.tier, bytes(change.key), change.readable) for change in self.changes]
        forget, self.forget = self.forget, False
        self.changes.clear()
        return told, forget

    def leave(self, now: float) -> None:
        """The connection has ended: its requests hold nothing any more. Copies stay open until settle()."""
        self.ended = True
        for asking in self._requests.values():
            asking.request.end()
        self._requests.clear()

    def settle(self, now: float) -> None:
        """No process touches the memory for this session: end its copies. What was to be stored is not."""
        for operation, one in self._open.items():
            self.domain.ended(operation, CRASH if one.kind == "store" else None, now)
        self._open.clear()

    # Events

    def _begin(self, event: wire.Begin, now: float) -> None:
        if event.request in self._requests:
            raise NodeError(f"node: request {event.request} began twice")
        if len(self._requests) >= MOST_REQUESTS:
            raise NodeError(f"node: more than {MOST_REQUESTS} requests of one engine")
        self.domain.directory.expire(now)
        name = f"{self.number}/{event.request}/{event.name}"  # no other request of the directory has it
        request = Request(
            name, self.domain.directory, self.terms, self.domain.name.namespace.chunk_tokens, event.tenant, now
        )
        request.salt_differs = event.salt_differs
        self._requests[event.request] = Asking(request)
        self.num_requests += 1

    def _lookup(self, event: wire.Lookup, now: float) -> wire.Found:
        asking = self._asking(event.request)
        keys = self._keys(asking, event.known, event.keys)
        request = asking.request
        if self.domain.has_tiers:
            self.domain.ensure_slots(keys, now, store=False)
        gain = self.domain.lookup(asking, event.num_tokens, event.computed, now)
        if gain is None:
            return wire.Found(wire.ASK_AGAIN, {}, "")
        sources = {}
        if gain:
            request.promise(gain, now + PROMISE_SECONDS)  # else another engine's chunks could take their place
            sources = request.sources_of(gain)
        return wire.Found(gain, sources, request.miss() or "")

    def _admit(self, event: wire.Admit, now: float) -> wire.Loads:
        asking = self._asking(event.request)
        request = asking.request
        first_time = not request.admitted
        chunk = self.domain.name.namespace.chunk_tokens
        if event.num_load and (request.computed + event.num_load) // chunk > len(asking.keys):
            raise NodeError(f"node: request {event.request} loads more than it has asked for")
        try:
            tickets = request.load(event.num_load)
        except KeyError:  # the promise was over
            tickets = request.load(0)
        for _, ticket in tickets:
            self._open[ticket.operation] = _Open("load", asking)
        self.num_loads += len(tickets)
        if first_time:
            self.domain.admitted(asking, now)
        return wire.Loads(*self._copies(tickets))

    def _store(self, event: wire.Store, now: float) -> wire.Stores:
        asking = self._asking(event.request)
        keys = self._keys(asking, event.known, event.keys)
        request = asking.request
        self.domain.ensure_slots(keys, now, store=True)
        tickets = request.store(keys, event.num_valid, event.num_prompt, now)
        for _, ticket in tickets:
            self._open[ticket.operation] = _Open("store", None)
        return wire.Stores(*self._copies(tickets), request.num_stored)

    def _done(self, event: wire.Done, now: float) -> None:
        one = self._open.pop(event.operation, None)
        if one is None:
            raise NodeError(f"node: the engine ends copy {event.operation}, which it does not have")
        cause = None if not event.cause else event.cause if event.cause in CAUSES else COPY
        self.domain.ended(event.operation, cause, now)
        if one.asking is not None:
            one.asking.request.loaded(event.operation, cause)

    def _end(self, event: wire.End, now: float) -> None:
        asking = self._requests.pop(event.request, None)
        if asking is None:
            raise NodeError(f"node: request {event.request} ends, but never began")
        keys = asking.request.end()
        if event.pin_seconds > 0:
            self.domain.client_pins.ask(asking.request.name, keys, event.pin_seconds, now)

    def _offer(self, event: wire.Offer, now: float) -> wire.Stores:
        keys, known = wire.split(event.keys), event.known
        if known > len(keys):
            raise NodeError(f"node: {known} of {len(keys)} chunks are not on offer")
        self.domain.ensure_slots(keys[known:], now, store=True)
        tickets, kept = store_offer(self.domain.directory, keys, known, event.tenant, now)
        self.domain.client_pins.renew(now)
        for ticket in tickets.values():
            self._open[ticket.operation] = _Open("store", None)
        return wire.Stores(*self._copies(list(tickets.items())), len(keys) if kept else 0)

    def _use(self, event: wire.Use, now: float) -> None:
        keys = wire.split(event.keys)
        use_prefix(self.domain.directory, keys, event.tenant, now)
        if event.pin_seconds > 0:
            self.domain.client_pins.ask(f"{self.number}/{event.name}", keys, event.pin_seconds, now, later=True)

    def _where(self, event: wire.Where) -> wire.Places:
        directory, keys = self.domain.directory, wire.split(event.keys)
        return wire.Places([directory.tiers_of(key) for key in keys], [directory.arriving([key]) for key in keys])

    # Inside

    def _asking(self, number: int) -> Asking:
        asking = self._requests.get(number)
        if asking is None:
            raise NodeError(f"node: the engine speaks of request {number}, which never began")
        return asking

    def _keys(self, asking: Asking, known: int, more: bytes) -> list[ChunkKey]:
        if known != len(asking.keys):
            raise NodeError(f"node: the engine counts on {known} keys; {len(asking.keys)} have come")
        if more:
            asking.keys += wire.split(more)
        return asking.keys

    def _copies(self, tickets: Sequence[tuple[int, Ticket]]) -> tuple[list[int], list[int], list[int]]:
        """tickets: each with the index of its chunk."""
        unit, offset = self.domain.unit, self.domain.places.offset
        slots = [offset(ticket.slot) // unit for _, ticket in tickets]
        return [ticket.operation for _, ticket in tickets], [chunk for chunk, _ in tickets], slots
