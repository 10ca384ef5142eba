"""The scheduler's half of an engine that is attached to a node: the calls of CacheScheduler, answered by the node.

It hashes prompts, keeps what the node has said of each request, and turns the node's slots into plans. Whatever the node does not answer in
time is a miss.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import lmc.cache.node.wire as wire
from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Change, Miss, Ticket, Told
from lmc.cache.keys import ChunkKey, KeyChain, root
from lmc.cache.node.link import Link
from lmc.cache.node.mirror import Mirror
from lmc.cache.node.ordered import OrderedCopies
from lmc.cache.node.tracked import Tracked, Wish
from lmc.cache.observe.accounting import Accounting, Salts, explained
from lmc.cache.observe.stats import collect_stats
from lmc.cache.parts import ANY_STEP, Step
from lmc.cache.plan import COPY, AllRanks, BlockCopy, Plan, Report, RequestCopies, WorkerReady, blocks_of, request_name
from lmc.cache.scheduler.admin import Clear, Mailbox, Pin, Prefetch, Result, Unpin
from lmc.cache.scheduler.cache import Identity
from lmc.cache.scheduler.open import common_namespace, open_endpoint
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

FIRST_SECONDS = 10.0  # that a start waits for the node


class NodeScheduler:
    """Raises ConfigError when the workers don't fit together."""

    def __init__(
        self,
        config: CacheConfig,
        ready: Sequence[WorkerReady],
        block_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        engine: str = "",
        announces: bool = False,
    ) -> None:
        """engine: its name in the node's metrics. announces: take_changes() is called regularly."""
        assert config.node is not None
        first = ready[0]
        if not all(worker.mapping for worker in ready):
            raise ConfigError("node is set for some ranks only; give all ranks the same settings")
        self.config = config
        self.namespace = common_namespace(ready)
        self.chunk_tokens = first.namespace.chunk_tokens
        self.chunk_bytes = first.chunk_bytes
        self.num_ranks = len(ready)
        self._block_tokens = block_tokens
        self._blocks_per_chunk = self.chunk_tokens // block_tokens
        self._clock = clock
        self._requests: dict[str, Tracked] = {}
        self._last_request = 0
        self._all_ranks = AllRanks(self.num_ranks)
        self._known_faults: dict[int, int] = {}
        self._wishes: list[Wish] = []
        self._salts = Salts(self.chunk_tokens)
        attach = wire.Attach(
            engine or f"{first.namespace.engine}-{os.getpid()}",
            first.namespace,
            first.element,
            first.chunk_bytes,
            [worker.rank for worker in ready],
            [bytes.fromhex(worker.mapping) for worker in ready],
            config.min_load_tokens,
            config.lookup_deadline,
            config.load_deadline,
            config.store_decode,
            announces,
        )
        self._link = Link(config.node, attach, config.node_deadline, self._refuse)
        self._ordered = OrderedCopies(self._link)
        self._link.wait(FIRST_SECONDS)
        self.directory = Mirror(self._link, self._ordered)
        self._accounting = Accounting(config, self.namespace, self.directory, self.chunk_bytes, self.num_ranks, clock)
        self.metrics = self._accounting.metrics
        for worker in ready:
            self.metrics.note_copying(worker.rank, worker.copying)
        self._mailbox = Mailbox()
        registry, spans = self.metrics.registry, self._accounting.spans.read
        self._endpoint = open_endpoint(config, _NoCommands(self._link), self._mailbox, registry, self.stats, spans)

    @property
    def metrics_url(self) -> str | None:
        return self._endpoint.url if self._endpoint else None

    @property
    def busy(self) -> bool:
        """True while workers make copies, so that the engine must fetch reports, or while the node must hear something in the next step."""
        return bool(self._ordered) or bool(self._wishes) or bool(self._mailbox.waiting) or self._link.waiting

    # A request's life

    def lookup(self, request_id: str, tokens: Sequence[int], computed: int, identity: Identity) -> int | None:
        """As CacheScheduler.lookup(). What is found is kept for a moment."""
        started = time.perf_counter()
        try:
            now = self._clock()
            tracked = self._requests.get(request_id)
            if tracked is None:
                tracked = self._requests[request_id] = self._track(request_id, tokens, identity, now)
            found = self._lookup(tracked, tokens, computed)
            if found is not None and tracked.answered is None:
                tracked.answered = now
            return found
        finally:
            self.metrics.lookup_seconds.observe(time.perf_counter() - started)

    def loads_in_background(self, num_load: int) -> bool:
        return num_load >= self.config.background_load_tokens

    def admit(
        self, request_id: str, num_load: int, blocks: Sequence[int], others: Sequence[Sequence[int]] = ()
    ) -> None:
        """The next plan loads; if the node does not say from where, its blocks fail there. others: none, as there is one KV group."""
        tracked = self._requests[request_id]
        first_time, tracked.admitted = not tracked.admitted, True
        if num_load:
            self._wishes.append(Wish(tracked, tuple(blocks), wire.Admit(tracked.number, num_load)))
        elif self._known(tracked):
            self._link.tell_later([wire.Admit(tracked.number, 0)])
        if first_time:
            if not num_load:
                tracked.sources = {}
            self._accounting.admitted(tracked, tracked.answered, self._clock())

    def loaded_from(self, request_id: str) -> Mapping[str, int]:
        return self._requests[request_id].sources

    def wants_store(self, request_id: str, num_valid: int, num_prompt: int) -> bool:
        tracked = self._requests.get(request_id)
        return tracked is not None and self._wants_store(tracked, num_valid, num_prompt)

    def store(
        self,
        request_id: str,
        tokens: Sequence[int],
        num_valid: int,
        num_prompt: int,
        blocks: Sequence[int],
        others: Sequence[Sequence[int]] = (),
        step: Step = ANY_STEP,
    ) -> None:
        """As CacheScheduler.store(), of one KV group."""
        tracked = self._requests.get(request_id)
        if tracked is None or not self._wants_store(tracked, num_valid, num_prompt):
            return
        tracked.chain.extend(tokens)
        event = wire.Store(tracked.number, 0, b"", num_valid, num_prompt)  # the keys follow when it is sent
        self._wishes.append(Wish(tracked, tuple(blocks), event))

    def offer(
        self, keys: Sequence[ChunkKey], known: int, blocks: Sequence[int], tenant: str
    ) -> tuple[Plan, bool] | None:
        """As CacheScheduler.offer()."""
        answers = self._exchange([wire.Offer(tenant, known, wire.join(keys))]) if self._link.ready else None
        if answers is None:
            return None
        slots = answers[0]
        assert isinstance(slots, wire.Stores)
        plan = Plan(memory=self._link.node)
        if slots.operations:
            plan.stores.append(RequestCopies("offer", self._copies(keys, blocks, known, slots)))
        return plan, slots.settled == len(keys)

    def use(self, keys: Sequence[ChunkKey], tenant: str, name: str = "", pin_seconds: float = 0.0) -> None:
        """As CacheScheduler.use()."""
        if keys:
            self._link.tell_later([wire.Use(tenant, wire.join(keys), name, pin_seconds)])

    def promise(self, request_id: str, num_tokens: int, seconds: float) -> None:
        """The node keeps what it has found for a moment anyway."""

    def where(self, keys: Sequence[ChunkKey]) -> list[tuple[Sequence[str], bool]]:
        """As CacheScheduler.where(). Nowhere, if the node does not answer."""
        answers = self._exchange([wire.Where(wire.join(keys))]) if self._link.ready else None
        if answers is None:
            return [((), False)] * len(keys)
        places = answers[0]
        assert isinstance(places, wire.Places)
        return list(zip(places.tiers, places.arriving, strict=True))

    def take_changes(self) -> tuple[bool, Sequence[Change]]:
        """As CacheScheduler.take_changes()."""
        link = self._link
        forget, told = link.forget, link.changes
        link.forget, link.changes = False, []
        return forget, [Change(tier, ChunkKey(key), readable) for tier, key, readable in told]

    def keys_of(self, request_id: str) -> Sequence[ChunkKey]:
        tracked = self._requests.get(request_id)
        return tracked.chain.keys if tracked is not None else ()

    def explain(self, request_id: str) -> dict[str, object]:
        tracked = self._requests.get(request_id)
        return explained(tracked) if tracked is not None else {}

    def finish(self, request_id: str, pin_seconds: float = 0.0) -> None:
        tracked = self._requests.pop(request_id, None)
        if tracked is None:
            return
        tracked.retired = tracked.finished = True  # a wish of its must not begin it again
        if self._known(tracked):
            self._link.tell_later([wire.End(tracked.number, max(pin_seconds, 0.0))])
            tracked.session = 0

    # Plans and reports

    def take_plan(self) -> Plan:
        if self._mailbox.waiting:
            self._mailbox.run()
        plan = Plan(known_faults=dict(self._known_faults))
        if self._wishes:
            wishes, self._wishes = self._wishes, []
            self._plan(plan, wishes)
        else:
            self._link.look()
        self._ordered.note_session()
        self._link.send_later()
        return plan

    def apply(self, report: Report) -> None:
        self._ordered.note_session()
        self._known_faults.update(report.faults)
        events: list[wire.Event] = []
        for ended in self._all_ranks.ended(report):
            events += self._complete(ended.operation, ended.cause)
        self._link.tell_later(events)
        self._ordered.note_session()  # an earlier session may be over now
        self._accounting.reported(report)

    def reset(self) -> None:
        """From now on this engine uses no chunk of before, and no other engine's: its chunks get new names."""
        self._retire()
        self.namespace = dataclasses.replace(
            self.namespace, revision=f"{self.namespace.revision} reset {secrets.token_hex(8)}"
        )
        self._salts = Salts(self.chunk_tokens)
        logger.warning("lmc: reset: from now on this engine shares no chunks with others")

    def rename(self, model: str) -> None:
        """As CacheScheduler.rename()."""
        self._retire()
        self.namespace = dataclasses.replace(self.namespace, model=model)
        self._salts = Salts(self.chunk_tokens)
        logger.warning("lmc: the weights have changed: chunks of before are not used any more")

    def stats(self) -> dict[str, object]:
        """The state of the node's namespace as this engine last heard of it, and its own counters. From any thread."""
        own = collect_stats(self.namespace, self.directory, self.metrics, self.chunk_bytes * self.num_ranks)
        return own | {"attached": self._link.connected, "node_metrics": self._link.metrics}

    def close(self, timeout: float | None = None) -> None:
        """Close everything, whatever fails. It lets nothing end, so it needs no timeout; the thread that connects gets a second."""
        with ExitStack() as parts:
            parts.callback(self._link.close)
            if self._endpoint is not None:
                parts.callback(self._endpoint.close)
            parts.callback(self._accounting.close)

    # Inside

    def _track(self, request_id: str, tokens: Sequence[int], identity: Identity, now: float) -> Tracked:
        start = root(self.namespace, lora=identity.lora, tenant=identity.tenant, salt=identity.salt)
        differs = len(tokens) > self.chunk_tokens and self._salts.seen_elsewhere(tokens, start)
        self._last_request += 1
        chain = KeyChain(start, self.chunk_tokens, identity.extra)
        told = Told(0, identity.request_class, identity.session)  # the node's policy knows no classes
        name = request_name(request_id)
        return Tracked(self._last_request, request_id, name, chain, identity.tenant, differs, now, told)

    def _lookup(self, tracked: Tracked, tokens: Sequence[int], computed: int) -> int | None:
        keys = tracked.chain.extend(tokens)
        tracked.num_tokens, tracked.computed = len(tokens), computed
        if not tracked.admitted:
            tracked.sources = {}
        if tracked.retired:
            tracked.why = Miss.CLEARED
            return 0
        if not self._link.ready:
            tracked.why = self._unanswered()
            return 0
        if not keys:
            tracked.why = None
            return 0
        events = self._introduction(tracked)
        events.append(wire.Lookup(tracked.number, len(tokens), computed, *self._unsent(tracked)))
        answers = self._exchange(events)
        if answers is None:
            tracked.why = self._unanswered()
            return 0
        found = answers[0]
        assert isinstance(found, wire.Found)
        if found.gain == wire.ASK_AGAIN:
            return None
        tracked.why = found.miss or None
        if not tracked.admitted:
            tracked.sources = found.sources
        return found.gain

    def _unanswered(self) -> Miss:
        return Miss.NODE_DEADLINE if self._link.connected else Miss.NODE_AWAY

    def _plan(self, plan: Plan, wishes: Sequence[Wish]) -> None:
        """Ask the node for slots, and order the copies. Loads that it does not answer fail in this plan."""
        answers: Sequence[wire.Reply] | None = None
        if self._link.ready:
            events: list[wire.Event] = []
            asked = []
            for wish in wishes:
                tracked = wish.tracked
                if isinstance(wish.event, wire.Store):
                    if tracked.retired:
                        continue
                    events += self._introduction(tracked)
                    known, keys = self._unsent(tracked)
                    event = wish.event
                    events.append(wire.Store(event.request, known, keys, event.num_valid, event.num_prompt))
                elif self._known(tracked):
                    events.append(wish.event)
                else:
                    if not tracked.finished:
                        self._fail(plan, wish)  # it was promised by a session that is over, or before a reset
                    continue
                asked.append(wish)
            wishes = asked
            answers = self._exchange(events) if events else ()
        if answers is None:
            for wish in wishes:
                if isinstance(wish.event, wire.Admit) and not wish.tracked.finished:
                    self._fail(plan, wish)
            return
        plan.memory = self._link.node
        for wish, slots in zip(wishes, answers, strict=True):
            if isinstance(wish.event, wire.Store):
                assert isinstance(slots, wire.Stores)
                self._plan_store(plan, wish, slots)
                continue
            assert isinstance(slots, wire.Loads)
            if slots.operations:
                self._plan_load(plan, wish, wish.event.num_load, slots)
            else:
                self._fail(plan, wish)  # it is not there any more

    def _plan_load(self, plan: Plan, wish: Wish, num_load: int, slots: wire.Loads) -> None:
        tracked = wish.tracked
        held = tracked.computed // self._block_tokens  # blocks that the engine has, which others may be reading
        copies = self._copies(tracked.keys, wish.blocks, 0, slots, tracked, held)
        background = self.loads_in_background(num_load)
        (plan.background_loads if background else plan.loads).append(RequestCopies(tracked.id, copies))

    def _plan_store(self, plan: Plan, wish: Wish, slots: wire.Stores) -> None:
        wish.tracked.stored = slots.settled
        if slots.operations:
            copies = self._copies(wish.tracked.keys, wish.blocks, 0, slots)
            plan.stores.append(RequestCopies(wish.tracked.id, copies))

    def _copies(
        self,
        keys: Sequence[ChunkKey],
        blocks: Sequence[int],
        first: int,
        slots: wire.Loads | wire.Stores,
        load: Tracked | None = None,
        held: int = 0,
    ) -> tuple[BlockCopy, ...]:
        """blocks: those of the chunks from index `first` on, the first `held` of which are not to be copied."""
        per_chunk = self._blocks_per_chunk
        copies = []
        for operation, chunk, slot in zip(slots.operations, slots.chunks, slots.slots, strict=True):
            number = self._ordered.add(operation, keys[chunk], chunk, load)
            chosen = blocks_of(blocks, (chunk - first) * per_chunk, per_chunk, held)
            copies.append(BlockCopy(number, keys[chunk], slot, chosen))
        return tuple(copies)

    def _fail(self, plan: Plan, wish: Wish) -> None:
        """The engine computes what it was promised."""
        assert isinstance(wish.event, wire.Admit)
        first = wish.tracked.computed // self._block_tokens
        end = (wish.tracked.computed + wish.event.num_load) // self._block_tokens
        plan.failed_blocks += wish.blocks[first:end]
        if self.loads_in_background(wish.event.num_load):
            plan.failed_requests.append(wish.tracked.id)

    def _complete(self, number: int, cause: str | None) -> list[wire.Event]:
        """A copy ended on all ranks. Returns what the node must hear of it."""
        copying = self._ordered.pop(number)
        if copying is None:
            return []
        kind: Literal["load", "store"] = "store" if copying.load is None else "load"
        self._accounting.ended(Ticket(number, kind, copying.key, HOST, -1), cause)
        if copying.load is not None and cause is not None and not copying.load.retired:
            copying.load.stored = min(copying.load.stored, copying.chunk)
        return self._ordered.ended(copying, cause)

    def _refuse(self, session: int, answers: Sequence[wire.Reply]) -> None:
        """Answers that came too late: none of their copies is made."""
        ended: list[wire.Event] = []
        for answer in answers:
            if isinstance(answer, wire.Stores):
                ended += [wire.Done(operation, COPY) for operation in answer.operations]
            elif isinstance(answer, wire.Loads):  # there is nothing wrong with the chunks
                ended += [wire.Done(operation, "") for operation in answer.operations]
        if ended:
            self._link.tell(ended)

    def _exchange(self, events: list[wire.Event]) -> Sequence[wire.Reply] | None:
        self._ordered.note_session()
        return self._link.exchange(events)

    def _introduction(self, tracked: Tracked) -> list[wire.Event]:
        if self._known(tracked):
            return []
        tracked.session, tracked.sent = self._link.session, 0
        return [wire.Begin(tracked.number, tracked.name, tracked.tenant, tracked.salt_differs)]

    def _unsent(self, tracked: Tracked) -> tuple[int, bytes]:
        """(number of keys that the session has, those that it gets now)."""
        known = tracked.sent if self._known(tracked) else 0
        keys = tracked.chain.keys
        tracked.sent = len(keys)
        return known, wire.join(keys[known:])

    def _known(self, tracked: Tracked) -> bool:
        """Whether the session in use has heard of the request."""
        return bool(tracked.session) and tracked.session == self._link.session

    def _wants_store(self, tracked: Tracked, num_valid: int, num_prompt: int) -> bool:
        if tracked.retired or not self._link.connected:
            return False
        end = num_valid if self.config.store_decode or num_valid < num_prompt else num_prompt
        return end // self.chunk_tokens > tracked.stored

    def _retire(self) -> None:
        self._link.forget_changes()  # the chunks are there, but not for this engine
        for tracked in self._requests.values():
            tracked.retired = True
            if self._known(tracked):
                self._link.tell_later([wire.End(tracked.number, 0.0)])
                tracked.session = 0


class _NoCommands:
    def __init__(self, link: Link) -> None:
        self._link = link

    def run(self, command: Pin | Unpin | Prefetch | Clear) -> Result:
        raise ConfigError(f"this engine uses a node's cache: send commands to {self._link.metrics or 'the node'}")
