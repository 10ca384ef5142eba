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
from typing import Literal, Protocol

from lmc.cache.directory.checkpoints import Checkpoints
from lmc.cache.directory.choice import leave_slow_chunks
from lmc.cache.directory.directory import Directory, Found
from lmc.cache.directory.holds import Ticket
from lmc.cache.directory.misses import Miss
from lmc.cache.directory.places import HOST
from lmc.cache.directory.questions import Question, Questions
from lmc.cache.directory.told import NOTHING_TOLD, Told
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import ANY_STEP, SPINE, Leaf, Parts, Step

_PIN_GRACE_SECONDS = 60.0  # a request whose chunks were staged may wait this long for a place in the batch
_EVERY_CHUNK = 1 << 60


class RequestSettings(Protocol):
    """The settings that decide about requests; CacheConfig has them and explains them."""

    @property
    def load(self) -> Literal["always", "auto"]: ...
    @property
    def min_load_tokens(self) -> int: ...
    @property
    def lookup_deadline(self) -> float: ...
    @property
    def load_deadline(self) -> float: ...
    @property
    def store_decode(self) -> bool: ...


class Request:
    """One request between its first lookup and its end. `name` is unique among the requests of the directory."""

    def __init__(
        self,
        name: str,
        directory: Directory,
        settings: RequestSettings,
        chunk_tokens: int,
        tenant: str,
        now: float,
        parts: Parts | None = None,
        told: Told = NOTHING_TOLD,
    ) -> None:
        """parts: of a model with several kinds of KV."""
        self.name = name
        self.tenant = tenant
        self.told = told
        self.arrived = now
        self.num_tokens = 0  # at the last lookup
        self.computed = 0  # tokens that the engine holds itself, at the last lookup
        self.salt_differs = False  # the same first chunk came before under another tenant or adapter
        self.sources: dict[str, int] = {}  # tokens that the first load() reads, by the tier that held them before
        self.admitted = False
        self.keys: Sequence[ChunkKey] = ()
        self._directory = directory
        self._settings = settings
        self._store_decode = settings.store_decode
        self._chunk_tokens = chunk_tokens
        self._checkpoints = Checkpoints(parts, directory) if parts is not None and parts.has_leaves else None
        self._found: Found | None = None  # at the first lookup: where the hit came from
        self._questions = Questions(settings.lookup_deadline) if directory.has_other_writers else None
        self.deadline: float | None = (
            None  # when it stops waiting for chunks from the tiers below; None before it waits
        )
        self._staging_miss: Miss = Miss.LOAD_FAILED  # why chunks found in a lower tier were not staged
        self._lookup_miss: str | None = None  # why fewer tokens are loaded than were found
        self._usable = _EVERY_CHUNK  # chunks that may be offered; lowered when a load failed, or would be slow
        self._left: Miss | None = None  # why chunks that were found are not loaded
        self.num_stored = 0  # leading chunks that need no store any more
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
        questions = self._questions
        if questions is not None and found.num_chunks < limit:
            if questions.chunks is None and self.deadline is None:
                questions.ask_for_chunks(keys[found.num_chunks : limit], now)
            if self._must_wait_for(questions.chunks, now):
                return None
        if self._checkpoints is not None:
            usable = self._checkpoints.usable(found, keys, computed, now)
            if usable is not found and questions is not None:
                if questions.leaves is None and self.deadline is None:
                    questions.ask_for_leaves(self._checkpoints.unknown(keys, found.num_chunks, computed, now), now)
                if self._must_wait_for(questions.leaves, now):
                    return None
            found = usable
        if self._found is None:
            self._found = found
            auto = self._settings.load == "auto" and self._checkpoints is None  # leaves are not weighed
            if auto and (end := self._end_of_quick_chunks(found, now)) < found.num_chunks:
                self._usable, self._left = end, Miss.SLOWER
                return self.lookup(keys, num_tokens, computed, now)
        first = computed // self._chunk_tokens
        in_host = found.leading_in_host(first)
        leaves = self._leaves(found.num_chunks) if self._checkpoints is not None else []
        if in_host < found.num_chunks or (leaves and not self._directory.readable(leaves, now, in_host=True)):
            if self._must_wait_for_staging(first, found, leaves, now):
                return None
            if self._checkpoints is not None:
                in_host = self._checkpoints.longest(keys, in_host, computed, now, in_host=True)
        if in_host < self._found.num_chunks and self._lookup_miss != Miss.LOAD_DEADLINE:
            why = found.miss or self._left if in_host == found.num_chunks else None
            self._lookup_miss = why or self._staging_miss
        gain = in_host * self._chunk_tokens - computed
        if 0 < gain < self._settings.min_load_tokens:
            self._lookup_miss = Miss.BELOW_MINIMUM
            gain = 0
        return max(gain, 0)

    def take_question(self) -> Sequence[ChunkKey]:
        """Consecutive chunks that the tiers with other writers must be asked for, or leaves; empty when there is nothing to ask.

        The answer goes to Directory.learn(), and then to answer() before the next lookup.
        """
        return self._questions.take() if self._questions is not None else ()

    @property
    def asks_for_leaves(self) -> bool:
        """Of the last question: each of its keys counts, not only those before the first absent one."""
        return self._questions is not None and self._questions.leaves is not None

    def answer(self, *, failed: bool) -> None:
        """The directory has learned what the tiers hold, of the last question; failed: a tier could not say."""
        assert self._questions is not None
        self._questions.answer(failed=failed)

    def take_tickets(self) -> list[Ticket]:
        """Chunks to bring into host memory, for which the request waits until the load deadline."""
        tickets, self._outbox = self._outbox, []
        return tickets

    def arriving(self) -> list[ChunkKey]:
        """Chunks of the request that are being staged into host memory, for this request or for another one."""
        leaves = self._leaves(self._checkpoints.hit) if self._checkpoints is not None else []
        wanted = [*self.keys[self.first_chunk :], *(leaf.key for leaf in leaves)]
        return [key for key in wanted if self._directory.arriving([key])]

    def promise(self, gain: int, expires: float) -> None:
        """Keep the chunks of the last lookup's answer from eviction until load(), or until the expiry."""
        last = (self.computed + gain) // self._chunk_tokens
        self._directory.unpin(self._promise)  # pins of one owner add up
        leaves = [leaf.key for leaf in self._leaves(last)]
        self._directory.pin([*self.keys[self.first_chunk : last], *leaves], self._promise, expires)

    # In the batch

    def load(self, num_tokens: int) -> list[tuple[int, Ticket]]:
        """The engine took the request in and reads num_tokens tokens beyond `computed` from the cache.

        Returns a load ticket and its chunk's index for each chunk, from first_chunk on, and for the leaves of the last of them. The host
        slots stay as they are until these operations are complete. Raises KeyError when one of them is not in host memory.
        """
        first = self.first_chunk
        last = (self.computed + num_tokens) // self._chunk_tokens if num_tokens else first
        leaves = self._leaves(last) if num_tokens else []
        keys = [*self.keys[first:last], *[leaf.key for leaf in leaves]]
        chunks = [*range(first, last), *[leaf.chunk for leaf in leaves]]
        tickets = list(zip(chunks, self._directory.load(keys), strict=True))
        for index, ticket in tickets:  # without one of its leaves a hit of this length is none
            self._loading[ticket.operation] = index if ticket.group == SPINE else last - 1
        self._unpin()
        if not self.admitted:
            self.admitted = True
            self.sources = self.sources_of(num_tokens) if tickets else {}
        return tickets

    @property
    def first_chunk(self) -> int:
        """Index of the first chunk that the engine does not hold in full."""
        return self.computed // self._chunk_tokens

    def loaded(self, operation: int, failure: str | None) -> None:
        """A load of this request ended. After a failure the engine recomputes from that chunk on, and stores it again."""
        index = self._loading.pop(operation)
        if failure is not None and not self._retired:
            self.num_stored = min(self.num_stored, index)
            self._usable, self._left = min(self._usable, index), None

    @property
    def loading(self) -> Sequence[int]:
        """Loads under way, by operation."""
        return tuple(self._loading)

    def sources_of(self, gain: int) -> dict[str, int]:
        """`gain` tokens of the last lookup's answer, by the tier that held them when the request came."""
        assert self._found is not None
        return self._found.sources(self.computed, (self.computed + gain) // self._chunk_tokens, self._chunk_tokens)

    def wants_store(self, num_valid: int, num_prompt: int) -> bool:
        """Whether store() would have something to do; cheap enough to ask in every step."""
        end = num_valid if self._store_decode or num_valid < num_prompt else num_prompt
        return end // self._chunk_tokens > self.num_stored

    def store(
        self, keys: Sequence[ChunkKey], num_valid: int, num_prompt: int, now: float, step: Step = ANY_STEP
    ) -> list[tuple[int, Ticket]]:
        """The first num_valid tokens have valid KV, those that the engine computes in this step included; the prompt has num_prompt.

        Returns a store ticket and its chunk's index for each chunk that got a slot, and for the leaves of checkpoints among them.
        """
        self.keys = keys
        wanted = keys[: (num_valid if self._store_decode else min(num_valid, num_prompt)) // self._chunk_tokens]
        if len(wanted) <= self.num_stored:
            return []
        checkpoints = self._checkpoints
        leaves = checkpoints.kept(keys, len(wanted), num_prompt, step) if checkpoints is not None else []
        tickets = self._directory.store(
            wanted,
            now,
            leaves=leaves,
            tenant=self.tenant,
            touch=not self._touched,
            request_class=self.told.class_number,
        )
        self._touched = True
        self.num_stored = self._directory.num_settled(wanted)
        if not tickets:
            return []
        first = len(wanted) - len(tickets)
        if not leaves and tickets[0].key == wanted[first]:
            return list(enumerate(tickets, start=first))  # most often all those behind what was stored before
        position = {key: index for index, key in enumerate(wanted)} | {leaf.key: leaf.chunk for leaf in leaves}
        return [(position[ticket.key], ticket) for ticket in tickets]

    # After it

    def end(self) -> Sequence[ChunkKey]:
        """The request is gone, in whatever way. Returns the chunks that may stay pinned: none after retire()."""
        self._unpin()
        if self._retired or self._checkpoints is None:
            return () if self._retired else self.keys
        return [*self.keys, *self._checkpoints.pinned(self.keys, self.num_tokens)]

    def retire(self) -> None:
        """The cache was reset. The request's KV belongs to the time before, so from now on it loads and stores nothing."""
        self._retired = True
        self.num_stored = _EVERY_CHUNK
        self._unpin()

    def miss(self) -> str | None:
        """Why the hit ended before the last chunk that may be loaded."""
        if self._lookup_miss is not None or self._found is None:
            return self._lookup_miss
        if self._found.miss == Miss.NEVER_STORED and self._found.num_chunks == 0 and self.salt_differs:
            return Miss.SALT_DIFFERS
        return self._found.miss

    # Inside

    def _leaves(self, num_chunks: int) -> list[Leaf]:
        """What a hit of num_chunks chunks needs beside them."""
        checkpoints = self._checkpoints
        return checkpoints.needed(self.keys, num_chunks, self.computed) if checkpoints is not None else []

    @property
    def _promise(self) -> str:
        """Owner of the pin on what the request was promised."""
        return f"promise {self.name}"

    def _unpin(self) -> None:
        self._directory.unpin(f"request {self.name}")  # a word in front keeps owners of different kinds apart
        self._directory.unpin(self._promise)

    def _must_wait_for(self, question: Question | None, now: float) -> bool:
        """True until the tiers that others write to have answered, or the deadline has passed. None: they were not asked.

        They are not asked after a load has failed: what is found then would not be staged any more.
        """
        if question is None or question.waits(now):
            return question is not None
        self._lookup_miss = question.miss or self._lookup_miss
        return False

    def _must_wait_for_staging(self, first: int, found: Found, leaves: Sequence[Leaf], now: float) -> bool:
        """Bring what lies in lower tiers into host memory, once; True until it is there or the deadline has passed."""
        wanted = [*self.keys[first : found.num_chunks], *(leaf.key for leaf in leaves)]
        if self.deadline is None:
            self.deadline = now + self._settings.load_deadline
            self._outbox += self._directory.stage(
                self.keys[: found.num_chunks],
                now,
                first=first,
                leaves=leaves,
                tenant=self.tenant,
                request_class=self.told.class_number,
            )
            self._directory.pin(wanted, f"request {self.name}", self.deadline + _PIN_GRACE_SECONDS)
            if HOST not in self._directory.tiers_of(wanted[-1]) and not self._directory.arriving(wanted[-1:]):
                self._staging_miss = Miss.NO_ROOM
        if not self._directory.arriving(wanted):
            return False
        if now >= self.deadline:
            self._lookup_miss = Miss.LOAD_DEADLINE
            return False
        return True

    def _end_of_quick_chunks(self, found: Found, now: float) -> int:
        sizes = (self.computed, self.num_tokens, self._chunk_tokens)
        end, tried = leave_slow_chunks(self._directory, self.keys, found.tiers, sizes, self.tenant, now)
        self._outbox += tried
        return end
