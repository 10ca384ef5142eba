"""The cache of one engine instance, as its scheduler sees it: what can be loaded, what shall be stored, what became of it.

Puts the directory to work for requests. Runs on the scheduler's thread, never waits and never copies: plans go to the workers, reports come
back. Any step may be late or fail; the answer to that is a shorter hit.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lmc.cache.config import CacheConfig
from lmc.cache.directory import HOST, Found, Miss, Ticket
from lmc.cache.directory.request import CachedRequest
from lmc.cache.keys import ChunkKey, KeyChain, root
from lmc.cache.observe.accounting import DEVICE, Accounting
from lmc.cache.observe.salts import Salts
from lmc.cache.observe.stats import collect_stats
from lmc.cache.plan import SKIP, BlockCopy, Plan, Report, RequestCopies, TierCopy, WorkerReady
from lmc.cache.scheduler.admin import Admin, Mailbox
from lmc.cache.scheduler.endpoint import Endpoint
from lmc.cache.scheduler.open import open_directory, open_presence
from lmc.cache.scheduler.prefetch import Prefetcher
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

_PIN_GRACE_SECONDS = 60.0  # a staged request may wait so long for a place in the batch
_NO_OPERATION = 0  # of deletions that nobody waits for


@dataclass(frozen=True)
class Identity:
    """What a request's chunks depend on beside its tokens."""

    lora: str = ""
    tenant: str = ""
    extra: Callable[[int, int], bytes] | None = None  # see KeyChain


class CacheScheduler:
    """Raises ConfigError when the workers don't fit together."""

    def __init__(
        self,
        config: CacheConfig,
        ready: Sequence[WorkerReady],
        block_tokens: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        first = ready[0]
        if any(worker.namespace != first.namespace for worker in ready):
            raise ConfigError("the ranks disagree on the namespace; start them with the same model and settings")
        self.config = config
        self.namespace = first.namespace
        self.chunk_tokens = first.namespace.chunk_tokens
        self.chunk_bytes = first.chunk_bytes
        self._block_tokens = block_tokens
        self._blocks_per_chunk = self.chunk_tokens // block_tokens
        self.num_ranks = len(ready)
        self._clock = clock
        self._requests: dict[str, CachedRequest] = {}
        self._loading: dict[int, str] = {}  # operation -> request
        self._ended: dict[int, int] = {}  # operation -> ranks that reported it
        self._causes: dict[int, str] = {}
        self._known_faults: dict[int, int] = {}  # rank -> Report.faults
        self._plan = Plan()
        self.directory, superfluous = open_directory(config, ready, clock())
        self._plan.tier_copies += [
            TierCopy(_NO_OPERATION, "delete", tier, key, -1) for tier, keys in superfluous.items() for key in keys
        ]
        self._presence = open_presence(config, ready, self.directory)
        self._prefetcher = Prefetcher(self.directory, self._presence, config.lookup_deadline)
        self._salts = Salts(self.chunk_tokens)
        self._accounting = Accounting(config, self.namespace, self.directory, self.chunk_bytes, self.num_ranks, clock)
        self.metrics = self._accounting.metrics
        for worker in ready:
            self.metrics.note_copying(worker.rank, worker.copying)
        self._mailbox = Mailbox()
        self._endpoint = self._open_endpoint()

    @property
    def metrics_url(self) -> str | None:
        return self._endpoint.url if self._endpoint else None

    @property
    def busy(self) -> bool:
        """True while copies are under way, so that somebody must fetch reports."""
        waiting = bool(self._plan) or bool(self._mailbox) or bool(self._prefetcher)
        return waiting or self.directory.num_open > 0

    # A request's life

    def lookup(self, request_id: str, tokens: Sequence[int], computed: int, identity: Identity) -> int | None:
        """How many tokens beyond `computed` can be loaded now, or None: ask again. Promises nothing; may be asked any number of times.

        The last token is never offered: the engine must compute it.
        """
        started = time.perf_counter()
        try:
            found = self._lookup(request_id, tokens, computed, identity)
            request = self._requests[request_id]
            if found is not None and request.answered is None:
                request.answered = self._clock()
            return found
        finally:
            self.metrics.lookup_seconds.observe(time.perf_counter() - started)

    def loads_in_background(self, num_load: int) -> bool:
        """Whether a load of so many tokens shall not hold the batch up."""
        return num_load >= self.config.background_load_tokens

    def admit(self, request_id: str, num_load: int, blocks: Sequence[int]) -> None:
        """The engine took the request in and will read num_load tokens beyond `computed` from the cache, into its blocks."""
        request = self._requests[request_id]
        first = request.computed // self.chunk_tokens
        last = (request.computed + num_load) // self.chunk_tokens
        if num_load:
            keys = request.chain.keys[first:last]
            tickets = self.directory.load(keys)
            held = request.computed // self._block_tokens  # blocks that the engine has, which others may be reading
            copies = []
            for index, ticket in enumerate(tickets, start=first):
                copies.append(self._block_copy(ticket, index, blocks, held))
                request.loading[ticket.operation] = index
                self._loading[ticket.operation] = request_id
            background = self.loads_in_background(num_load)
            (self._plan.background_loads if background else self._plan.loads).append(
                RequestCopies(request_id, tuple(copies))
            )
        self.directory.unpin(request_id)
        if not request.admitted:
            request.admitted = True
            request.sources = request.sources_of(first, last, self.chunk_tokens)
            self._accounting.admitted(request_id, request, self._clock())

    def loaded_from(self, request_id: str) -> Mapping[str, int]:
        """Tokens by tier of what the first admit() promised."""
        return self._requests[request_id].sources

    def wants_store(self, request_id: str, num_valid: int, num_prompt: int) -> bool:
        """Whether store() would have something to do; cheap enough to ask in every step."""
        request = self._requests.get(request_id)
        return request is not None and self._storable(num_valid, num_prompt) > request.stored

    def store(
        self, request_id: str, tokens: Sequence[int], num_valid: int, num_prompt: int, blocks: Sequence[int]
    ) -> None:
        """After this step the first num_valid tokens of the request will have valid KV in its blocks: store the full chunks among them."""
        request = self._requests.get(request_id)
        if request is None:
            return
        full = self._storable(num_valid, num_prompt)
        if full <= request.stored:
            return
        keys = request.chain.extend(tokens)[:full]
        tickets = self.directory.store(keys, self._clock(), tenant=request.tenant, touch=not request.touched)
        request.touched = True
        request.stored = self.directory.num_settled(keys)
        if tickets:
            position = {key: index for index, key in enumerate(keys)}
            copies = tuple(self._block_copy(ticket, position[ticket.key], blocks, 0) for ticket in tickets)
            self._plan.stores.append(RequestCopies(request_id, copies))

    def keys_of(self, request_id: str) -> Sequence[ChunkKey]:
        """The names of a request's full chunks, as far as they were looked at; empty for an unknown request."""
        request = self._requests.get(request_id)
        return request.chain.keys if request is not None else ()

    def prefetch(self, tokens: Sequence[int], identity: Identity) -> int:
        """A request with these tokens is expected: bring its chunks into host memory. Returns how many are known to be stored."""
        start = root(self.namespace, lora=identity.lora, tenant=identity.tenant)
        keys = KeyChain(start, self.chunk_tokens, identity.extra).extend(tokens)
        return self._prefetcher.want(keys, identity.tenant, self._clock())

    def explain(self, request_id: str) -> dict[str, object]:
        """Where a request's tokens came from, and why its hit ended where it did; for people."""
        request = self._requests.get(request_id)
        if request is None:
            return {}
        miss = request.miss()
        return {
            "prompt_tokens": request.num_tokens,
            "hit_tokens": {DEVICE: request.computed, **request.sources},
            "miss": str(miss) if miss is not None else None,
        }

    def finish(self, request_id: str, pin_seconds: float = 0.0) -> None:
        """The request is gone, in whatever way; its chunks may stay pinned for a while."""
        request = self._requests.pop(request_id, None)
        self.directory.unpin(request_id)
        if request is not None and pin_seconds > 0:
            self.directory.pin(request.chain.keys, f"{request_id} asked", self._clock() + pin_seconds)
        if request is not None:
            for operation in request.loading:
                self._loading.pop(operation, None)

    # Plans and reports

    def take_plan(self) -> Plan:
        """The work of this step; the engine hands it to every rank."""
        self._mailbox.run()
        self.directory.expire(self._clock())
        if self._prefetcher:
            self._prefetch()
        self._plan.tier_copies += [self._tier_copy(ticket) for ticket in self.directory.take_tickets()]
        plan, self._plan = self._plan, Plan()
        plan.known_faults = dict(self._known_faults)
        return plan

    def apply(self, report: Report) -> None:
        """Believe what the ranks report."""
        now = self._clock()
        self._causes.update(report.failed)
        self._known_faults.update(report.faults)
        for operation, ranks in report.finished.items():
            ended = self._ended.pop(operation, 0) + ranks
            if ended < self.num_ranks:
                self._ended[operation] = ended
                continue
            self._complete(operation, self._causes.pop(operation, None), now)
        self._accounting.reported(report)

    def reset(self) -> bool:
        """Forget all chunks, in every tier. False if some are in use and stay.

        What others may have stored cannot be forgotten; so with tiers that others write to, all chunks get new names instead.
        """
        in_use = self.directory.clear()
        if self._presence is None:
            return in_use == 0
        renamed = f"{self.namespace.revision} reset {secrets.token_hex(8)}"
        self.namespace = dataclasses.replace(self.namespace, revision=renamed)
        self._salts = Salts(self.chunk_tokens)  # no prompt has come under the new names yet
        logger.warning("lmc: reset: from now on this instance shares no chunks with others")
        return True

    def stats(self) -> dict[str, object]:
        """The state in numbers, for people; may be called from any thread."""
        return collect_stats(self.namespace, self.directory, self.metrics, self.chunk_bytes * self.num_ranks)

    def close(self) -> None:
        self._accounting.close()
        if self._endpoint is not None:
            self._endpoint.close()
        if self._presence is not None:
            self._presence.close(self.config.close_timeout)

    # Inside

    def _lookup(self, request_id: str, tokens: Sequence[int], computed: int, identity: Identity) -> int | None:
        self._mailbox.run()
        now = self._clock()
        request = self._requests.get(request_id)
        if request is None:
            request = self._requests[request_id] = self._new_request(tokens, identity, now)
        request.num_tokens = len(tokens)
        request.computed = computed
        keys = request.chain.extend(tokens)
        limit = min((len(tokens) - 1) // self.chunk_tokens, request.usable)
        answered = (
            request.question is not None and request.question.done
        )  # then its answers are among those learned now
        self._learn()
        found = self.directory.lookup(keys[:limit], now)
        request.cut = None
        if found.num_chunks < limit:
            if not answered and self._wait_for_presence(request, keys[:limit], found, now):
                return None
            if answered and request.question is not None and request.question.failed:
                request.cut = Miss.REMOTE_FAILED
        if request.found is None:
            request.found = found
        first = computed // self.chunk_tokens
        in_host = self._leading_in_host(found, first)
        if in_host < found.num_chunks and self._wait_for_staging(request_id, request, keys, first, found, now):
            return None
        if in_host < request.found.num_chunks and request.cut != Miss.LOAD_DEADLINE:
            request.cut = (found.miss if in_host == found.num_chunks else None) or request.short
        gain = in_host * self.chunk_tokens - computed
        if 0 < gain < self.config.min_load_tokens:
            request.cut = Miss.BELOW_MINIMUM
            gain = 0
        return max(gain, 0)

    def _prefetch(self) -> None:
        self._learn()
        tickets = self._prefetcher.advance(self._clock())
        self._plan.tier_copies += [self._tier_copy(ticket) for ticket in tickets]

    def _new_request(self, tokens: Sequence[int], identity: Identity, now: float) -> CachedRequest:
        start = root(self.namespace, lora=identity.lora, tenant=identity.tenant)
        request = CachedRequest(KeyChain(start, self.chunk_tokens, identity.extra), identity.tenant, now)
        if len(tokens) > self.chunk_tokens:
            request.salt_differs = self._salts.seen_elsewhere(tokens, start)
        return request

    def _learn(self) -> None:
        """Believe what the tiers have answered."""
        if self._presence is None:
            return
        for answer in self._presence.answers():
            self._accounting.answered(answer.tier, answer.seconds, answer.failure)
            self.directory.learn(answer.tier, answer.keys, answer.present)

    def _wait_for_presence(self, request: CachedRequest, keys: Sequence[ChunkKey], found: Found, now: float) -> bool:
        """Ask the tiers that others write to for the chunks that were not found; True until they have answered."""
        if self._presence is None:
            return False
        if request.question is None:
            if request.stage_until is not None:
                return False  # a load failed; what is found now would not be staged any more
            request.question = self._presence.ask(keys[found.num_chunks :])
            request.ask_until = now + self.config.lookup_deadline
        if now < request.ask_until:
            return True
        request.cut = Miss.REMOTE_DEADLINE
        return False

    def _leading_in_host(self, found: Found, first: int) -> int:
        """End of the run of chunks that can be loaded at once: those before `first` are the engine's own, the others must be in host."""
        end = min(first, found.num_chunks)
        while end < found.num_chunks and found.tiers[end] == HOST:
            end += 1
        return end

    def _wait_for_staging(
        self, request_id: str, request: CachedRequest, keys: Sequence[ChunkKey], first: int, found: Found, now: float
    ) -> bool:
        wanted = keys[first : found.num_chunks]
        if request.stage_until is None:
            request.stage_until = now + self.config.load_deadline
            tickets = self.directory.stage(keys[: found.num_chunks], now, first=first, tenant=request.tenant)
            self.directory.pin(wanted, request_id, request.stage_until + _PIN_GRACE_SECONDS)
            self._plan.tier_copies += [self._tier_copy(ticket, self.config.load_deadline) for ticket in tickets]
            if found.tiers[-1] != HOST and not self.directory.arriving(wanted[-1:]):
                request.short = Miss.NO_ROOM
        if not self.directory.arriving(wanted):
            return False
        if now >= request.stage_until:
            request.cut = Miss.LOAD_DEADLINE
            return False
        return True

    def _storable(self, num_valid: int, num_prompt: int) -> int:
        return (num_valid if self.config.store_decode else min(num_valid, num_prompt)) // self.chunk_tokens

    def _block_copy(self, ticket: Ticket, index: int, blocks: Sequence[int], held: int) -> BlockCopy:
        start = index * self._blocks_per_chunk
        chosen = tuple(blocks[start : start + self._blocks_per_chunk])
        if held > start:
            chosen = (SKIP,) * min(held - start, len(chosen)) + chosen[held - start :]
        return BlockCopy(ticket.operation, ticket.key, ticket.slot, chosen)

    def _tier_copy(self, ticket: Ticket, limit: float | None = None) -> TierCopy:
        assert ticket.kind in ("write", "stage", "delete")
        return TierCopy(
            ticket.operation, ticket.kind, ticket.tier, ticket.key, ticket.slot, ticket.evict, limit, ticket.parent
        )

    def _complete(self, operation: int, cause: str | None, now: float) -> None:
        ticket = self.directory.complete(operation, cause, now)
        if ticket is None:
            return
        self._accounting.ended(ticket, cause)
        if ticket.kind == "load":
            request = self._requests.get(self._loading.pop(operation, ""))
            if request is not None:
                index = request.loading.pop(operation)
                if cause is not None:
                    # The engine recomputes from here: store again from here, and do not offer the chunk to this request again.
                    request.stored = min(request.stored, index)
                    request.usable = min(request.usable, index)

    def _open_endpoint(self) -> Endpoint | None:
        config = self.config
        if not config.metrics.enabled:
            return None
        admin = Admin(
            self.directory, self._prefetcher, self.chunk_tokens, self._root_for_people, self._clock, config.tenant
        )
        try:
            return Endpoint(
                config.metrics,
                config.admin,
                self.metrics.registry,
                self.stats,
                self._accounting.spans.read,
                admin,
                self._mailbox,
            )
        except OSError as error:
            where = f"{config.metrics.host}:{config.metrics.port}"
            logger.warning("lmc: no metrics endpoint: cannot listen on %s: %s", where, error.strerror)
            return None

    def _root_for_people(self, tenant: str, lora: str) -> ChunkKey:
        return root(self.namespace, lora=lora, tenant=tenant)
