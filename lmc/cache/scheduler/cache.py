"""The cache of one engine instance, as its scheduler sees it.

Drives the life of each request (directory/request.py), turns the directory's tickets into plans for the workers, and believes what they
report. Runs on the scheduler's thread, never waits and never copies. Any step may be late or fail; then the hit is shorter.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from lmc.cache.config import CacheConfig
from lmc.cache.directory import NOTHING_TOLD, Request, tell
from lmc.cache.keys import ChunkKey, KeyChain, hashed_name, root
from lmc.cache.observe.accounting import Accounting, Salts, explained
from lmc.cache.observe.stats import collect_stats
from lmc.cache.parts import ANY_STEP, Group, Step, parts_of
from lmc.cache.plan import (
    COPY,
    AllRanks,
    Ended,
    Plan,
    Report,
    RequestCopies,
    TierCopy,
    WorkerReady,
    block_copies,
    request_name,
)
from lmc.cache.scheduler.admin import Admin, Mailbox
from lmc.cache.scheduler.beside import BesideRequests
from lmc.cache.scheduler.client_pins import ClientPins
from lmc.cache.scheduler.open import common_namespace, open_directory, open_endpoint, open_presence
from lmc.cache.scheduler.prefetch import Prefetcher
from lmc.cache.scheduler.presence import Question
from lmc.cache.shape import shape_of
from lmc.errors import TransferError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What the chunks of a request depend on, apart from its tokens. What clients choose comes as a hashed name.

    The last two are no part of it: they are what the client says of the request.
    """

    lora: str = ""
    tenant: str = ""  # whose they are: quotas count by it
    salt: str = ""
    extra: Callable[[int, int], bytes] | None = None  # see KeyChain
    request_class: str = ""
    session: str = ""


@dataclass(slots=True)
class _Tracked:
    """A request between its first lookup and its end."""

    request: Request
    chain: KeyChain
    question: Question | None = None  # to the tiers that others write to
    answered: float | None = None  # when the first lookup had its answer


class CacheScheduler(BesideRequests):
    """Raises ConfigError when the workers don't fit together."""

    def __init__(
        self,
        config: CacheConfig,
        ready: Sequence[WorkerReady],
        block_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        part: tuple[int, int] = (0, 1),
        groups: Sequence[Group] = (),
    ) -> None:
        """groups: the kinds of KV of a model that has several, the spine first."""
        first = ready[0]
        self.config = config
        self.namespace = common_namespace(ready)
        self.chunk_tokens = first.namespace.chunk_tokens
        self.chunk_bytes = first.chunk_bytes
        groups = groups or [Group("full", block_tokens)]
        self._parts = parts_of(groups, self.chunk_tokens, first.part_bytes, config.checkpoint_tokens)
        self.num_ranks = len(ready)
        num_parts = sum(worker.part is not None for worker in ready)
        self._bytes_of_all = self.chunk_bytes * num_parts
        self._clock = clock
        self._requests: dict[str, _Tracked] = {}
        self._loading: dict[int, Request] = {}  # operation -> the request that waits for it
        self._all_ranks = AllRanks(self.num_ranks)
        self._known_faults: dict[int, int] = {}  # rank -> Report.faults
        self._plan = Plan()
        self.directory, self._plan.tier_copies = open_directory(config, ready, clock(), part)
        self._presence = open_presence(config, ready, self.directory)
        self._prefetcher = Prefetcher(self.directory, self._presence, config.lookup_deadline)
        self._salts = Salts(self.chunk_tokens)
        self._classes: dict[str, int] = {}
        shape = shape_of(self._parts, first.part_bytes, num_parts).to_json() if self._parts.has_leaves else None
        self._accounting = Accounting(config, self.namespace, self.directory, self.chunk_bytes, num_parts, clock, shape)
        self.metrics = self._accounting.metrics
        self.client_pins = ClientPins(self.directory, config.clients, self._bytes_of_all, self.metrics)
        for worker in ready:
            self.metrics.note_copying(worker.rank, worker.copying)
        self._mailbox = Mailbox()
        tenant = hashed_name(config.tenant)
        admin = Admin(self.directory, self._prefetcher, self.chunk_tokens, self._root_of, clock, tenant)
        registry, spans = self.metrics.registry, self._accounting.spans.read
        self._endpoint = open_endpoint(config, admin, self._mailbox, registry, self.stats, spans)

    @property
    def metrics_url(self) -> str | None:
        return self._endpoint.url if self._endpoint else None

    @property
    def busy(self) -> bool:
        """True while copies are under way that will end, so that the engine must fetch reports."""
        waiting = bool(self._plan) or bool(self._mailbox.waiting) or bool(self._prefetcher.wishes)
        return waiting or self.directory.num_open > self.directory.num_stuck

    # A request's life

    def lookup(self, request_id: str, tokens: Sequence[int], computed: int, identity: Identity) -> int | None:
        """How many tokens beyond `computed` can be loaded now, or None: ask again. Promises nothing; may be asked any number of times.

        The last token is never offered: the engine must compute it.
        """
        started = time.perf_counter()
        try:
            if self._mailbox.waiting:
                self._mailbox.run()
            now = self._clock()
            tracked = self._requests.get(request_id)
            if tracked is None:
                tracked = self._requests[request_id] = self._track(request_id, tokens, identity, now)
            found = self._lookup(tracked, tokens, computed, now)
            if found is not None and tracked.answered is None:
                tracked.answered = now
            return found
        finally:
            self.metrics.lookup_seconds.observe(time.perf_counter() - started)

    def promise(self, request_id: str, num_tokens: int, seconds: float) -> None:
        """Keep the num_tokens tokens that the last lookup found from eviction until admit(), or until the time has passed."""
        self._requests[request_id].request.promise(num_tokens, self._clock() + seconds)

    def loads_in_background(self, num_load: int) -> bool:
        """Whether a load of num_load tokens is copied in the background, so that it does not delay the batch."""
        return num_load >= self.config.background_load_tokens

    def admit(
        self, request_id: str, num_load: int, blocks: Sequence[int], others: Sequence[Sequence[int]] = ()
    ) -> None:
        """The engine took the request in and will read num_load tokens beyond `computed` from the cache, into its blocks.

        others: its blocks in the groups behind the first, SKIP where it has none. Raises TransferError when a needed part has none.
        """
        tracked = self._requests[request_id]
        request = tracked.request
        first_time = not request.admitted
        tickets = request.load(num_load)
        if tickets:
            copies, gone = block_copies(self._parts, tickets, (blocks, *others), request.computed)
            if gone:
                raise TransferError(f"request {request.name}: the engine has no block for a part of what it loads")
            for _, ticket in tickets:
                self._loading[ticket.operation] = request
            background = self.loads_in_background(num_load)
            (self._plan.background_loads if background else self._plan.loads).append(RequestCopies(request_id, copies))
        if first_time:
            self._accounting.admitted(request, tracked.answered, self._clock())

    def loaded_from(self, request_id: str) -> Mapping[str, int]:
        """Tokens by tier of what the first admit() promised."""
        return self._requests[request_id].request.sources

    def wants_store(self, request_id: str, num_valid: int, num_prompt: int) -> bool:
        """Whether store() would have something to do; cheap enough to ask in every step."""
        tracked = self._requests.get(request_id)
        return tracked is not None and tracked.request.wants_store(num_valid, num_prompt)

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
        """After this step the first num_valid tokens of the request will have valid KV in its blocks: store the full chunks among them.

        others: its blocks in the groups behind the first, SKIP where it has none.
        """
        tracked = self._requests.get(request_id)
        if tracked is None or not tracked.request.wants_store(num_valid, num_prompt):
            return
        keys = tracked.chain.extend(tokens)
        now = self._clock()
        tickets = tracked.request.store(keys, num_valid, num_prompt, now, step)
        if tickets:
            copies, gone = block_copies(self._parts, tickets, (blocks, *others), 0, stores=True)
            for operation in gone:
                self._complete(Ended(operation, COPY, 0, None), now)
            self._plan.stores.append(RequestCopies(request_id, copies))

    def keys_of(self, request_id: str) -> Sequence[ChunkKey]:
        """The names of a request's full chunks, as far as they were looked at; empty for an unknown request."""
        tracked = self._requests.get(request_id)
        return tracked.chain.keys if tracked is not None else ()

    def explain(self, request_id: str) -> dict[str, object]:
        """Where a request's tokens came from, and why its hit ended where it did."""
        tracked = self._requests.get(request_id)
        return explained(tracked.request) if tracked is not None else {}

    def finish(self, request_id: str, pin_seconds: float = 0.0) -> None:
        """The request is gone, in whatever way. pin_seconds: its chunks stay for so long, within limits."""
        tracked = self._requests.pop(request_id, None)
        if tracked is not None:
            keys = tracked.request.end()
            for operation in tracked.request.loading:
                self._loading.pop(operation, None)
            if pin_seconds > 0:
                self.client_pins.ask(tracked.request.name, keys, pin_seconds, self._clock())

    # Plans and reports

    def take_plan(self) -> Plan:
        """The work of this step. The engine sends it to every rank."""
        if self._mailbox.waiting:
            self._mailbox.run()
        self.directory.expire(self._clock())
        if self._prefetcher.wishes:
            self._prefetch()
        self._plan.tier_copies += [TierCopy(ticket) for ticket in self.directory.take_tickets()]
        plan, self._plan = self._plan, Plan()
        plan.known_faults = dict(self._known_faults)
        return plan

    def apply(self, report: Report) -> None:
        """Update the directory and the requests with what the ranks report."""
        now = self._clock()
        self._known_faults.update(report.faults)
        for ended in self._all_ranks.ended(report):
            self._complete(ended, now)
        self.directory.mark_stuck(report.stuck)
        if self.config.load == "auto":
            for num_bytes, seconds in report.loads.values():
                self.directory.speeds.loaded(num_bytes / (self.chunk_bytes * self.num_ranks), seconds)
        self._accounting.reported(report)

    def computed(self, parts: Sequence[tuple[int, int]], seconds: float) -> None:
        """A pass with a prompt is over. parts: of each request, the position of its first token and the number of its tokens."""
        self.directory.speeds.computed(parts, seconds)

    def reset(self) -> None:
        """Forget all chunks and pins, in every tier, at once. The requests of before load and store nothing any more.

        What operations still hold, and what others may have stored, cannot be forgotten at once. Then all chunks get new names instead.
        """
        self._retire_all()
        in_use = self.directory.reset()
        if self._presence is None and in_use == 0:
            return
        renamed = f"{self.namespace.revision} reset {secrets.token_hex(8)}"
        self.namespace = dataclasses.replace(self.namespace, revision=renamed)
        self._salts = Salts(self.chunk_tokens)  # no prompt has come under the new names yet
        if self._presence is not None:
            logger.warning("lmc: reset: from now on this instance shares no chunks with others")

    def rename(self, model: str) -> None:
        """The engine holds other weights than before: from now on chunks are stored and found under their name.

        The requests of before load and store nothing any more, and no pin keeps what they could have loaded.
        """
        self._retire_all()
        self.directory.unpin_all()
        self.namespace = dataclasses.replace(self.namespace, model=model)
        self._salts = Salts(self.chunk_tokens)
        logger.warning("lmc: the weights have changed: chunks of before are not used any more")

    def stats(self) -> dict[str, object]:
        """The state of the cache in numbers. May be called from any thread."""
        return collect_stats(self.namespace, self.directory, self.metrics, self._bytes_of_all)

    def close(self, timeout: float | None = None) -> None:
        """Let questions under way be answered within timeout seconds (default: as configured), then close everything, whatever fails."""
        with ExitStack() as parts:
            if self._presence is not None:
                parts.callback(self._presence.close, self.config.close_timeout if timeout is None else timeout)
            if self._endpoint is not None:
                parts.callback(self._endpoint.close)
            parts.callback(self._accounting.close)

    # Inside

    def _lookup(self, tracked: _Tracked, tokens: Sequence[int], computed: int, now: float) -> int | None:
        request, question = tracked.request, tracked.question
        keys = tracked.chain.extend(tokens)
        answered = question is not None and question.done  # then its answers are among those learned now
        if self._presence is not None:
            self._learn()
        if answered and question is not None:
            request.answer(failed=question.failed)
        found = request.lookup(keys, len(tokens), computed, now)
        self._plan.tier_copies += [TierCopy(ticket, self.config.load_deadline) for ticket in request.take_tickets()]
        if self._presence is not None and (missing := request.take_question()):
            tracked.question = self._presence.ask(missing, every=request.asks_for_leaves)
        return found

    def _prefetch(self) -> None:
        self._learn()
        tickets = self._prefetcher.advance(self._clock())
        self._plan.tier_copies += [TierCopy(ticket) for ticket in tickets]

    def _track(self, request_id: str, tokens: Sequence[int], identity: Identity, now: float) -> _Tracked:
        self.directory.expire(now)  # else room for this request would be made at the cost of chunks that are still good
        start = root(self.namespace, lora=identity.lora, tenant=identity.tenant, salt=identity.salt)
        says = identity.request_class or identity.session
        told = tell(self._classes, identity.request_class, identity.session) if says else NOTHING_TOLD
        name, parts = request_name(request_id), self._parts
        request = Request(name, self.directory, self.config, self.chunk_tokens, identity.tenant, now, parts, told)
        if len(tokens) > self.chunk_tokens:
            request.salt_differs = self._salts.seen_elsewhere(tokens, start)
        return _Tracked(request, KeyChain(start, self.chunk_tokens, identity.extra))

    def _retire_all(self) -> None:
        for tracked in self._requests.values():
            tracked.request.retire()
        self.client_pins.forget()

    def _learn(self) -> None:
        """Tell the directory what the tiers have answered."""
        if self._presence is None:
            return
        for answer in self._presence.answers():
            self._accounting.answered(answer.tier, answer.seconds, answer.failure)
            self.directory.learn(answer.tier, answer.keys, answer.present)

    def _complete(self, ended: Ended, now: float) -> None:
        operation, cause, saved, seconds = ended
        ticket = self.directory.complete(operation, cause, now, saved, seconds)
        if ticket is None:
            return
        self._accounting.ended(ticket, cause)
        request = self._loading.pop(operation, None)
        if request is not None:
            request.loaded(operation, cause)

    def _root_of(self, tenant: str, salt: str, lora: str) -> ChunkKey:
        return root(self.namespace, lora=lora, tenant=tenant, salt=salt)
