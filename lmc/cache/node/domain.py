"""The cache of one namespace in a node: a directory that several engines use, its slots, and the tiers below with their threads.

It lives on the node's thread. Threads of the tiers only leave reports behind. It knows requests and tickets, and no connection.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Request
from lmc.cache.keys import ChunkKey, Element, Namespace, root
from lmc.cache.node.memory import UNIT, Memory, Places, RankSlots
from lmc.cache.node.wire import Figures
from lmc.cache.observe.accounting import Accounting
from lmc.cache.observe.stats import collect_stats
from lmc.cache.plan import AllRanks, CopyReading, Report, TierCopy, WorkerReady
from lmc.cache.plan import BreakerReading as Reading
from lmc.cache.scheduler.admin import Admin
from lmc.cache.scheduler.client_pins import ClientPins
from lmc.cache.scheduler.open import open_directory, open_presence
from lmc.cache.scheduler.prefetch import Prefetcher
from lmc.cache.scheduler.presence import Question
from lmc.cache.tiers.breaker import DIRECTIONS, BoundedBreaker, Breaker
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.lent import LentMemory
from lmc.cache.tiers.open import open_tiers
from lmc.cache.tiers.stored import Moved
from lmc.cache.worker.tier_copies import TierCopier
from lmc.cache.worker.worker import note_moved, scan_tiers

logger = logging.getLogger(__name__)

_RECALL_SECONDS = 1.0  # a look at all chunks, for slots that a copy or a pin still holds


@dataclass(frozen=True)
class DomainName:
    """What engines must agree on to share chunks: all that decides the bytes of a slot."""

    namespace: Namespace
    rank_bytes: int
    ranks: tuple[int, ...]
    element: Element = "opaque"

    def label(self) -> str:
        return self.namespace.label()

    @property
    def engine_ranks(self) -> int:
        """Ranks of the whole engine, where each has a directory of its own (SGLang); else those of the name."""
        return max(len(self.ranks), self.namespace.tp_size)


@dataclass
class OpenedTiers:
    """Of one rank. It takes seconds to open and to scan them, so that happens on a thread."""

    tiers: dict[str, Breaker]
    ready: WorkerReady


def open_rank(config: CacheConfig, name: DomainName, rank: int, host_slots: int) -> OpenedTiers:
    """Raises ConfigError, and TierError if the configuration is strict."""
    scope = TierScope(name.label(), rank, name.namespace.layout, name.rank_bytes, element=name.element)
    tiers, warnings = open_tiers(config, scope, name.engine_ranks)
    scan = scan_tiers(tiers)
    remote = tuple(tier for tier in tiers if not isinstance(tiers[tier], BoundedBreaker))
    reading = CopyReading({}, {}, 0, 0, "")
    ready = WorkerReady(
        name.namespace,
        rank,
        name.rank_bytes,
        host_slots,
        scan.stored,
        reading,
        remote,
        (*warnings, *scan.warnings),
        scan.parents,
        rank,
    )
    return OpenedTiers(tiers, ready)


@dataclass
class Asking:
    """A request of one engine, and the question that was asked for it."""

    request: Request
    keys: list[ChunkKey] = field(default_factory=list)
    question: Question | None = None
    answered: float | None = None


class Domain:
    """wake() is called from any thread when there is something for settle() to do."""

    def __init__(
        self,
        config: CacheConfig,
        name: DomainName,
        memory: Memory,
        places: Places,
        opened: Sequence[OpenedTiers],
        clock: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        """Raises ConfigError when a tier's capacity is less than one chunk."""
        self.name = name
        self.config = config
        self.places = places
        self.unit = UNIT  # slots are named to engines in units of so many bytes from the start
        self.num_engines = 0
        self.wants = 0  # chunks that made room, or found none, since the memory was last shared out
        self.may_grow = True
        self._recalled = -1  # the run of slots that is being given back
        self._recall_at = float("-inf")  # when what is left of it is recalled again
        self._clock = clock
        self._wake = wake
        self._namespace = name.namespace
        self._chunk_tokens = name.namespace.chunk_tokens
        ready = [one.ready for one in opened]
        share = config.disk.capacity * len(ready) // name.engine_ranks
        limited = config.model_copy(update={"disk": config.disk.model_copy(update={"capacity": share})})
        self.directory, deletions = open_directory(limited, ready, clock())
        self._presence = open_presence(config, ready, self.directory)
        self._prefetcher = Prefetcher(self.directory, self._presence, config.lookup_deadline)
        self._accounting = Accounting(config, self._namespace, self.directory, name.rank_bytes, len(ready), clock)
        self.metrics = self._accounting.metrics
        self.spans = self._accounting.spans
        self.client_pins = ClientPins(self.directory, config.clients, name.rank_bytes * len(ready), self.metrics)
        self.directory.lending.withhold_all()  # the pins have a share of all that there could be
        self._lock = threading.Lock()
        self._report = Report()
        self._all_ranks = AllRanks(len(opened))
        self._moved = (0, 0)
        self._tiers = [one.tiers for one in opened]
        for tiers in self._tiers:
            for breaker in tiers.values():
                breaker.lend(LentMemory(memory.descriptor, memory.bytes.ctypes.data, memory.size, memory.bytes))
        self._copiers = [
            TierCopier(
                one.tiers,
                RankSlots(memory, places, index, name.rank_bytes),
                one.ready.rank,
                io_threads={
                    tier: config.redis.connections if tier == "redis" else config.io_threads for tier in one.tiers
                },
                finish=self._finished,
                measure=self._measured,
                moved=self._moved_bytes,
            )
            for index, one in enumerate(opened)
        ]
        self.has_tiers = any(one.tiers for one in opened)
        for deletion in deletions:
            self._begin(deletion)

    # Requests

    def lookup(self, asking: Asking, num_tokens: int, computed: int, now: float) -> int | None:
        """As CacheScheduler.lookup()."""
        request = asking.request
        question = asking.question
        answered = question is not None and question.done
        self._learn()
        if answered and question is not None:
            request.answer(failed=question.failed)
        found = request.lookup(asking.keys, num_tokens, computed, now)
        staging = request.take_tickets()
        if self._presence is not None and (missing := request.take_question()):
            asking.question = self._presence.ask(missing)
        for ticket in staging:
            self._begin(TierCopy(ticket, self.config.load_deadline))
        if found is not None and asking.answered is None:
            asking.answered = now
        return found

    def ensure_slots(self, keys: Sequence[ChunkKey], now: float, *, store: bool) -> None:
        """Take more of the memory, while there is some that nobody has, to store these chunks or to bring up those that are below."""
        lending = self.directory.lending
        if lending.num_free >= len(keys) or not self.may_grow or not self.places.can_grow:
            return
        found = self.directory.lookup(keys, now)
        wanted = (len(keys) if store else found.num_chunks) - found.tiers.count(HOST)
        while lending.num_free < wanted and self.grow():
            pass

    def grow(self) -> bool:
        """Take one more run of extents. False if there is none that is free."""
        slots = self.places.grow()
        if slots is not None:
            self.directory.lending.give(slots)
        return slots is not None

    def give_back(self, now: float) -> None:
        """Give one run of extents back, or go on with that, once a second; it is free when nothing uses its slots any more."""
        if self._recalled < 0:
            self._recalled = self.places.best_to_give()
        elif now < self._recall_at:
            return
        self._recall_at = now + _RECALL_SECONDS
        if self.directory.lending.recall(self.places.slots_of(self._recalled)) == 0:
            self.places.give_back(self._recalled)
            self._recalled = -1

    @property
    def giving_back(self) -> bool:
        return self._recalled >= 0

    def admitted(self, asking: Asking, now: float) -> None:
        self._accounting.admitted(asking.request, asking.answered, now)

    def ended(self, operation: int, cause: str | None, now: float, saved: int = 0) -> None:
        """A copy ended on all ranks of its engine, or of this domain. saved: bytes by which compression made a written chunk shorter."""
        ticket = self.directory.complete(operation, cause, now, saved)
        if ticket is not None:
            self._accounting.ended(ticket, cause)

    # Now and then

    def dispatch(self) -> None:
        """Start the writes and deletions that have become due."""
        for ticket in self.directory.take_tickets():
            self._begin(TierCopy(ticket))

    def settle(self) -> None:
        """Process what the tiers' threads have left behind."""
        with self._lock:
            report, self._report = self._report, Report()
        if not report.finished:
            return
        now = self._clock()
        for ended in self._all_ranks.ended(report):
            self.ended(ended.operation, ended.cause, now, ended.saved)
        self._accounting.reported(report)
        self.dispatch()

    def tick(self, now: float) -> None:
        """Expiries, late copies, prefetches, metrics."""
        self.directory.expire(now)
        if self._prefetcher.wishes:
            self._learn()
            for wish in self._prefetcher.wishes:
                self.ensure_slots(wish.keys, now, store=False)
            for ticket in self._prefetcher.advance(now):
                self._begin(TierCopy(ticket))
        report = Report()
        for opened, copier in zip(self._tiers, self._copiers, strict=True):
            if opened:
                report.stuck |= copier.settle()
            for name, tier in opened.items():
                for direction in DIRECTIONS:
                    counters = tier.counters(direction)
                    is_open = tier.state(direction) != "closed"
                    report.breakers[copier.rank, name, direction] = Reading(
                        is_open, counters.failures, counters.refusals, counters.openings
                    )
        self.directory.mark_stuck(report.stuck)
        self._accounting.reported(report)
        self._note_wants()
        self.dispatch()
        self.settle()

    def figures(self) -> Figures:
        directory = self.directory
        usage = directory.usage()
        usage[HOST] = (usage[HOST][0], self.places.most_slots)  # what the namespace could have of the memory
        return Figures(usage, directory.known_remote(), directory.num_writing)

    def stats(self) -> dict[str, object]:
        """May be called from any thread."""
        chunk_bytes = self.name.rank_bytes * len(self.name.ranks)
        return collect_stats(self._namespace, self.directory, self.metrics, chunk_bytes) | {"engines": self.num_engines}

    def admin(self, tenant: str) -> Admin:
        return Admin(
            self.directory,
            self._prefetcher,
            self._chunk_tokens,
            lambda tenant, salt, lora: root(self._namespace, lora=lora, tenant=tenant, salt=salt),
            self._clock,
            tenant,
        )

    def close(self, timeout: float) -> None:
        """Let the writes under way end within timeout seconds."""
        until = self._clock() + timeout
        self.dispatch()
        for opened, copier in zip(self._tiers, self._copiers, strict=True):
            if copier.close(max(until - self._clock(), 0.0)):
                for tier in opened.values():
                    tier.close()
        if self._presence is not None:
            self._presence.close(max(until - self._clock(), 0.0))
        self._accounting.close()

    # Inside

    def _learn(self) -> None:
        if self._presence is None:
            return
        for answer in self._presence.answers():
            self._accounting.answered(answer.tier, answer.seconds, answer.failure)
            self.directory.learn(answer.tier, answer.keys, answer.present)

    def _note_wants(self) -> None:
        """More memory would have been of use if chunks were evicted to make room, or found none."""
        counts = self.directory.counts
        before, self._moved = self._moved, (counts.evicted.get(HOST, 0), counts.stores_dropped)
        self.wants += sum(self._moved) - sum(before)

    def _begin(self, copy: TierCopy) -> None:
        for copier in self._copiers:
            copier.begin(copy)

    def _finished(self, operations: Sequence[int], cause: str | None) -> None:
        with self._lock:
            self._report.finished.update(Counter(operations))
            if cause is not None:
                self._report.failed.update(dict.fromkeys(operations, cause))
        self._wake()

    def _moved_bytes(self, copy: TierCopy, raw_bytes: int, moved: Moved, seconds: float) -> None:
        with self._lock:
            note_moved(self._report, copy, raw_bytes, moved, seconds)

    def _measured(self, what: str, num_bytes: int, seconds: float) -> None:
        with self._lock:
            self._report.transfers.append((what, num_bytes, seconds))
