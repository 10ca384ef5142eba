"""The life of a request, as a pure state machine over the directory.

    lookup()    how much can be loaded; any number of times, None means "ask again"
    promise()   keep what the lookup found for a moment: for engines that rely on the answer before they load
    load()      the engine took the request in and reads what was found
    loaded()    one of its loads ended
    store()     the engine has computed KV: keep the full chunks
    end()       the request is gone, in whatever way
    retire()    its names are no longer in force: it loads and stores nothing any more

The live scheduler and `lmc sim` drive this same object. Time is passed in. What must be done comes out: tickets for the workers, and the
keys that tiers with other writers must be asked for. It makes no plan, counts nothing, waits for nothing and reads no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmc.cache.directory.directory import Directory, Found
from lmc.cache.directory.holds import Ticket
from lmc.cache.directory.misses import Miss
from lmc.cache.directory.places import HOST
from lmc.cache.keys import ChunkKey

_PIN_GRACE_SECONDS = 60.0  # a request whose chunks were staged may wait this long for a place in the batch
_EVERY_CHUNK = 1 << 60


class RequestSettings(Protocol):
    """The settings that decide about requests; CacheConfig has them and explains them."""

    @property
    def min_load_tokens(self) -> int: ...
    @property
    def lookup_deadline(self) -> float: ...
    @property
    def load_deadline(self) -> float: ...
    @property
    def store_decode(self) -> bool: ...


@dataclass(slots=True)
class _Question:
    """The tiers that others write to were asked which of the missing chunks they hold."""

    keys: Sequence[ChunkKey]
    until: float  # when the answer is no longer waited for
    taken: bool = False  # the keys were handed out
    answered: bool = False
    failed: bool = False  # a tier could not say


class Request:
    """One request between its first lookup and its end. `name` is unique among the requests of the directory."""

    __slots__ = (
        "_chunk_tokens",
        "_directory",
        "_found",
        "_loading",
        "_lookup_miss",
        "_outbox",
        "_question",
        "_retired",
        "_settings",
        "_stage_until",
        "_staging_miss",
        "_store_decode",
        "_stored",
        "_touched",
        "_usable",
        "admitted",
        "arrived",
        "computed",
        "keys",
        "name",
        "num_tokens",
        "salt_differs",
        "sources",
        "tenant",
    )

    def __init__(
        self, name: str, directory: Directory, settings: RequestSettings, chunk_tokens: int, tenant: str, now: float
    ) -> None:
        self.name = name
        self.tenant = tenant
        self.arrived = now
        self.num_tokens = 0  # at the last lookup
        self.computed = 0  # tokens that the engine holds itself, at the last lookup
        self.salt_differs = False  # the same first chunk came before under another tenant or adapter
        self.sources: dict[
            str, int
        ] = {}  # tokens that the first load() reads, by the tier that held them at the lookup
        self.admitted = False
        self.keys: Sequence[ChunkKey] = ()
        self._directory = directory
        self._settings = settings
        self._store_decode = settings.store_decode
        self._chunk_tokens = chunk_tokens
        self._found: Found | None = None  # at the first lookup: where the hit came from
        self._question: _Question | None = None
        self._stage_until: float | None = None  # set when staging begins
        self._staging_miss: Miss = Miss.LOAD_FAILED  # why chunks found in a lower tier were not staged
        self._lookup_miss: str | None = None  # why fewer tokens are loaded than were found
        self._usable = _EVERY_CHUNK  # chunks that may be offered; lowered when a load failed
        self._stored = 0  # leading chunks that need no store any more
        self._touched = False
        self._retired = False
        self._outbox: list[Ticket] = []
        self._loading: dict[int, int] = {}  # operation -> chunk index

    # Before the engine takes it in

    def lookup(self, keys: Sequence[ChunkKey], num_tokens: int, computed: int, now: float) -> int | None:
        """How many tokens beyond `computed` can be loaded now, or None: ask again. Promises nothing.

        keys: the names of the full chunks of the request's num_tokens tokens. The last token is never offered: the engine must compute it.
        Afterwards take_tickets() and take_question() hand out what must be done.
        """
        self.num_tokens, self.computed, self.keys = num_tokens, computed, keys
        self._lookup_miss = Miss.CLEARED if self._retired else None
        if self._retired:
            return 0
        limit = min((num_tokens - 1) // self._chunk_tokens, len(keys), self._usable)
        found = self._directory.lookup(keys[:limit], now)
        if found.num_chunks < limit and self._must_wait_for_answer(keys[found.num_chunks : limit], now):
            return None
        if self._found is None:
            self._found = found
        first = computed // self._chunk_tokens
        in_host = _leading_in_host(found, first)
        if in_host < found.num_chunks and self._must_wait_for_staging(first, found, now):
            return None
        if in_host < self._found.num_chunks and self._lookup_miss != Miss.LOAD_DEADLINE:
            self._lookup_miss = (found.miss if in_host == found.num_chunks else None) or self._staging_miss
        gain = in_host * self._chunk_tokens - computed
        if 0 < gain < self._settings.min_load_tokens:
            self._lookup_miss = Miss.BELOW_MINIMUM
            gain = 0
        return max(gain, 0)

    def take_question(self) -> Sequence[ChunkKey]:
        """Consecutive chunks that the tiers with other writers must be asked for; empty when there is nothing to ask.

        The answer goes to Directory.learn(), and then to answer() before the next lookup.
        """
        question = self._question
        if question is None or question.taken:
            return ()
        question.taken = True
        return question.keys

    def answer(self, *, failed: bool) -> None:
        """The directory has learned what the tiers hold; failed: a tier could not say."""
        assert self._question is not None
        self._question.answered = True
        self._question.failed = failed

    def take_tickets(self) -> list[Ticket]:
        """Chunks to bring into host memory, for which the request waits until the load deadline."""
        tickets, self._outbox = self._outbox, []
        return tickets

    def arriving(self) -> list[ChunkKey]:
        """Chunks of the request that are being staged into host memory, for this request or for another one."""
        return [key for key in self.keys[self.first_chunk :] if self._directory.arriving([key])]

    @property
    def deadline(self) -> float | None:
        """When the request stops waiting for chunks from the tiers below; None before it waits."""
        return self._stage_until

    def promise(self, gain: int, expires: float) -> None:
        """Keep the chunks of the last lookup's answer from eviction until load(), or until the expiry."""
        last = (self.computed + gain) // self._chunk_tokens
        self._directory.unpin(self._promise)  # pins of one owner add up
        self._directory.pin(self.keys[self.first_chunk : last], self._promise, expires)

    # In the batch

    def load(self, num_tokens: int) -> list[Ticket]:
        """The engine took the request in and reads num_tokens tokens beyond `computed` from the cache.

        Returns a load ticket for each chunk, from first_chunk on. The host slots stay as they are until these operations are complete.
        Raises KeyError when a chunk is not in host memory.
        """
        first = self.first_chunk
        last = (self.computed + num_tokens) // self._chunk_tokens if num_tokens else first
        tickets = self._directory.load(self.keys[first:last]) if num_tokens else []
        self._loading.update((ticket.operation, index) for index, ticket in enumerate(tickets, start=first))
        self._unpin()
        if not self.admitted:
            self.admitted = True
            self.sources = self._sources(first, last) if tickets else {}
        return tickets

    @property
    def first_chunk(self) -> int:
        """Index of the first chunk that the engine does not hold in full."""
        return self.computed // self._chunk_tokens

    def loaded(self, operation: int, failure: str | None) -> None:
        """A load of this request ended. After a failure the engine recomputes from that chunk on, and stores it again."""
        index = self._loading.pop(operation)
        if failure is not None and not self._retired:
            self._stored = min(self._stored, index)
            self._usable = min(self._usable, index)

    @property
    def loading(self) -> Sequence[int]:
        """Loads under way, by operation."""
        return tuple(self._loading)

    @property
    def num_stored(self) -> int:
        """Leading chunks that need no store any more."""
        return self._stored

    def sources_of(self, gain: int) -> dict[str, int]:
        """Tokens of the last lookup's answer, by the tier that held them when the request came."""
        return self._sources(self.first_chunk, (self.computed + gain) // self._chunk_tokens)

    def wants_store(self, num_valid: int, num_prompt: int) -> bool:
        """Whether store() would have something to do; cheap enough to ask in every step."""
        end = num_valid if self._store_decode or num_valid < num_prompt else num_prompt
        return end // self._chunk_tokens > self._stored

    def store(self, keys: Sequence[ChunkKey], num_valid: int, num_prompt: int, now: float) -> list[Ticket]:
        """The first num_valid tokens have valid KV; the prompt has num_prompt. Returns a store ticket for each chunk that got a slot."""
        self.keys = keys
        wanted = keys[: (num_valid if self._store_decode else min(num_valid, num_prompt)) // self._chunk_tokens]
        if len(wanted) <= self._stored:
            return []
        tickets = self._directory.store(wanted, now, tenant=self.tenant, touch=not self._touched)
        self._touched = True
        self._stored = self._directory.num_settled(wanted)
        return tickets

    # After it

    def end(self) -> Sequence[ChunkKey]:
        """The request is gone, in whatever way. Returns the chunks that may stay pinned: none after retire()."""
        self._unpin()
        return () if self._retired else self.keys

    def retire(self) -> None:
        """The cache was reset. The request's KV belongs to the time before, so from now on it loads and stores nothing."""
        self._retired = True
        self._stored = _EVERY_CHUNK
        self._unpin()

    def miss(self) -> str | None:
        """Why the hit ended before the last chunk that may be loaded."""
        if self._lookup_miss is not None or self._found is None:
            return self._lookup_miss
        if self._found.miss == Miss.NEVER_STORED and self._found.num_chunks == 0 and self.salt_differs:
            return Miss.SALT_DIFFERS
        return self._found.miss

    # Inside

    @property
    def _promise(self) -> str:
        """Owner of the pin on what the request was promised."""
        return f"promise {self.name}"

    def _unpin(self) -> None:
        self._directory.unpin(f"request {self.name}")  # a word in front keeps owners of different kinds apart
        self._directory.unpin(self._promise)

    def _must_wait_for_answer(self, missing: Sequence[ChunkKey], now: float) -> bool:
        """Ask the tiers that others write to for the missing chunks, once; True until they have answered or the deadline has passed."""
        if not self._directory.has_other_writers:
            return False
        if self._question is None:
            if self._stage_until is not None:
                return False  # a load failed; what is found now would not be staged any more
            self._question = _Question(missing, now + self._settings.lookup_deadline)
        if self._question.answered:
            if self._question.failed:
                self._lookup_miss = Miss.REMOTE_FAILED
            return False
        if now < self._question.until:
            return True
        self._lookup_miss = Miss.REMOTE_DEADLINE
        return False

    def _must_wait_for_staging(self, first: int, found: Found, now: float) -> bool:
        """Bring what lies in lower tiers into host memory, once; True until it is there or the deadline has passed."""
        wanted = self.keys[first : found.num_chunks]
        if self._stage_until is None:
            self._stage_until = now + self._settings.load_deadline
            self._outbox += self._directory.stage(self.keys[: found.num_chunks], now, first=first, tenant=self.tenant)
            self._directory.pin(wanted, f"request {self.name}", self._stage_until + _PIN_GRACE_SECONDS)
            if found.tiers[-1] != HOST and not self._directory.arriving(wanted[-1:]):
                self._staging_miss = Miss.NO_ROOM
        if not self._directory.arriving(wanted):
            return False
        if now >= self._stage_until:
            self._lookup_miss = Miss.LOAD_DEADLINE
            return False
        return True

    def _sources(self, first: int, last: int) -> dict[str, int]:
        """Tokens of chunks first..last, less what the engine holds, by the tier that held them when the request came."""
        assert self._found is not None
        sources: dict[str, int] = {}
        covered = self.computed
        for index in range(first, last):
            end = (index + 1) * self._chunk_tokens
            tier = self._found.tiers[index] if index < self._found.num_chunks else HOST
            sources[tier] = sources.get(tier, 0) + end - covered
            covered = end
        return sources


def _leading_in_host(found: Found, first: int) -> int:
    """End of the run of chunks that can be loaded at once: those before `first` are the engine's own, the others must be in host."""
    end = min(first, found.num_chunks)
    while end < found.num_chunks and found.tiers[end] == HOST:
        end += 1
    return end
