"""The directory: which chunk is in which tier and slot, what holds it there, and what is evicted next.

It does no I/O, holds no bytes, takes no lock and reads no clock; it lives on the engine's scheduler thread. It hands out *tickets*
(copies to make), and only complete() changes what it believes about them. The simulator runs the same object.

    directory.py    the operations of requests, reports and administrators
    places.py       nodes, slots, states, parents, holds
    host_slots.py   copies into host slots and out of them
    below.py        what is written to the tiers below the host
    removal.py      what is taken out of all tiers
    restore.py      what a tier held before the start
    choice.py       how much of a hit is loaded, from speeds.py
    lending.py      host slots that come and go
    the others      one table each
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lmc.cache.directory.below import Below, Counts, WriteMode
from lmc.cache.directory.holds import Operations, Pins, Ticket
from lmc.cache.directory.host_slots import HostSlots
from lmc.cache.directory.lending import Lending
from lmc.cache.directory.marks import TtlMode
from lmc.cache.directory.misses import Miss
from lmc.cache.directory.nodes import ABSENT, INCOMING, RESIDENT, Capacity
from lmc.cache.directory.places import HOST, Places
from lmc.cache.directory.remote import RemoteKeys
from lmc.cache.directory.removal import Removal
from lmc.cache.directory.restore import restore
from lmc.cache.directory.speeds import Speeds
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import SPINE, Leaf
from lmc.cache.policy.base import PolicySpec

_REMOTE_KEYS = 65_536
_RESIDENT = bytes([RESIDENT])


@dataclass(frozen=True, slots=True)
class Found:
    """Answer of a lookup: the fastest tier of each chunk of the longest stored prefix, and why the prefix ends there."""

    tiers: tuple[str, ...]
    miss: str | None  # a Miss, or evicted_from(tier)

    @property
    def num_chunks(self) -> int:
        return len(self.tiers)

    def leading_in_host(self, first: int) -> int:
        """End of the run of chunks that can be loaded at once: those before `first` are the engine's own, the others must be in host."""
        tiers = self.tiers
        if tiers.count(HOST) == len(tiers):  # as nearly always
            return len(tiers)
        end = min(first, len(tiers))
        while end < len(tiers) and tiers[end] == HOST:
            end += 1
        return end

    def sources(self, covered: int, last: int, chunk_tokens: int) -> dict[str, int]:
        """Tokens up to chunk `last`, without the first `covered` tokens, by the tier that held them at the lookup."""
        tiers, sources = self.tiers, dict[str, int]()
        first = covered // chunk_tokens
        if last > first and tiers[first:last].count(HOST) == last - first:
            return {HOST: last * chunk_tokens - covered}
        for index in range(first, last):
            end = (index + 1) * chunk_tokens
            tier = tiers[index] if index < len(tiers) else HOST
            sources[tier] = sources.get(tier, 0) + end - covered
            covered = end
        return sources


class Directory:
    """host_slots fixed slots in host memory and, below it, bounded tiers in order of speed.

    remote: tiers that other instances write to. learn() records what they hold. A name that is also in `below` is a shared tier: it holds
    this instance's chunks, which count against the capacity, and those of others. tenant_quota: host slots that one tenant may take.
    """

    def __init__(
        self,
        host_slots: int,
        below: Mapping[str, Capacity],
        spec: PolicySpec,
        *,
        remote: Sequence[str] = (),
        write: WriteMode = "through",
        write_touches: int = 2,
        ttl: float | None = None,
        ttl_mode: TtlMode = "sliding",
        tenant_quota: int | None = None,
        queue_depth: int = 1024,
    ) -> None:
        self.counts = Counts()
        self._places = Places(host_slots, below, spec, ttl=ttl, ttl_mode=ttl_mode, tenant_quota=tenant_quota)
        self._operations = Operations()
        self._remotes = [RemoteKeys(name, _REMOTE_KEYS) for name in remote]
        self._below = Below(
            self._places,
            self._operations,
            self._remotes,
            self.counts,
            write=write,
            write_touches=write_touches,
            queue_depth=queue_depth,
        )
        self._removal = Removal(self._places, self._below, self.counts)
        self._pins = Pins(self._places)
        self._host_slots = HostSlots(self._places, self._below, self._operations, self._remotes, self.counts)
        self.changes = self._places.changes
        self.lending = Lending(self._places, self._below)
        self.speeds = Speeds()
        self._doomed: set[ChunkKey] = set()  # what a reset could not forget, because operations held it
        self._now = float("-inf")

    # Looking up

    def lookup(self, keys: Sequence[ChunkKey], now: float) -> Found:
        """The longest prefix of keys whose chunks are readable. Changes nothing."""
        now = self._advance(now)
        in_host = self._places.host.state
        may_expire = self._places.ages.ttl is not None
        nodes = self._places.nodes.leading(keys)
        resident = 0
        if not may_expire:
            states = bytes(map(in_host.__getitem__, nodes))
            resident = len(states) - len(states.lstrip(_RESIDENT))
        tiers = [HOST] * resident
        for index in range(resident, len(keys)):
            key = keys[index]
            node = nodes[index] if index < len(nodes) else self._places.nodes.find(key)
            if node >= 0 and in_host[node] == RESIDENT and not (may_expire and self._places.ages.expired(node, now)):
                tiers.append(HOST)
                continue
            tier = self._source(key, node, now)
            if tier is None:
                return Found(tuple(tiers), self._why(key, node, now))
            tiers.append(tier)
        return Found(tuple(tiers), None)

    def tiers_of(self, key: ChunkKey) -> list[str]:
        """All tiers from which the chunk can be read, as far as is known."""
        node = self._places.nodes.find(key)
        tiers = [residents.name for residents in self._places.sets if node >= 0 and residents.readable(node)]
        return tiers + [remote.name for remote in self._remotes if key in remote and remote.name not in tiers]

    def readable(self, leaves: Iterable[Leaf], now: float, *, in_host: bool = False) -> bool:
        """Whether all of them can be read: from any tier, or from host memory."""
        now = self._advance(now)
        for leaf in leaves:
            tier = self._source(leaf.key, self._places.nodes.find(leaf.key), now)
            if tier is None or (in_host and tier != HOST):
                return False
        return True

    def idle(self, key: ChunkKey, now: float) -> float | None:
        """Seconds since the chunk was touched (with a fixed time to live: stored), or None if it isn't in any bounded tier."""
        node = self._places.nodes.find(key)
        held = node >= 0 and self._places.present(node)
        return self._places.ages.idle(node, self._advance(now)) if held else None

    # Moving chunks

    def store(
        self,
        keys: Sequence[ChunkKey],
        now: float,
        *,
        leaves: Sequence[Leaf] = (),
        tenant: str = "",
        touch: bool = True,
        request_class: int = 0,
    ) -> list[Ticket]:
        """A request has computed the chunks of keys, a whole prefix, and these leaves of them: touch those that are stored, and reserve
        slots for the others. A chunk counts as missing, too, when the copy that was to bring it up is stuck, late or unavailable.

        Inserts and touches go from the last chunk to the first, and leaves come before all chunks, so a parent is younger than its child.
        Returns a store ticket for each chunk that got a slot, in order of the prefix, and then those of leaves. If no slot is free, the
        rest is dropped.
        """
        now = self._advance(now)
        places = self._places
        places.begin_access(request_class)
        chain = places.nodes.chain(keys)
        in_host = places.host.state
        missing = self._missing(chain)
        new: list[int] = []
        tickets: list[Ticket] = []
        end = len(keys)
        if missing or leaves:
            places.hold(chain, 1)
            # A prompt longer than the host: its own chunks never make room for it, so the policy is not asked for a victim.
            room = places.num_slots - sum(node >= 0 and in_host[node] != ABSENT for node in chain)
            reserve = self._host_slots.store
            for index in missing:
                parent = chain[index - 1] if index else -1
                ticket = reserve(keys[index], chain, index, parent, tenant, now) if len(new) < room else None
                if ticket is None:
                    self.counts.stores_dropped += len(missing) - len(new)
                    places.misses.note(keys[index], Miss.NO_ROOM)
                    end = index
                    break
                tickets.append(ticket)
                new.append(chain[index])
            if leaves:
                tickets += self._store_leaves(
                    [leaf for leaf in leaves if leaf.chunk < end], chain, tenant, now, touch=touch
                )
            places.insert(places.host, new)
            places.hold(chain, -1)
        added = set(new)
        stored = [node for node in chain[:end] if node not in added]
        parents = places.parents
        for index, node in enumerate(chain[:end]):
            if parents[node] < 0:
                places.adopt(node, chain[index - 1] if index else -1, tenant)
        if touch:
            places.touch(stored, now)
            if self._below.exists:
                self._below.after_touch(stored)
        if missing or leaves:
            for node in chain[end:]:
                if node >= 0:
                    places.forget_unused(node)
            places.forget_ghosts()
        if self._below.exists:
            self._below.demote_ahead()
        return tickets

    def stage(
        self,
        keys: Sequence[ChunkKey],
        now: float,
        *,
        first: int = 0,
        leaves: Sequence[Leaf] = (),
        tenant: str = "",
        request_class: int = 0,
    ) -> list[Ticket]:
        """Copy chunks of a prefix, from index `first` on, and other parts of them into host slots. What is in host is skipped.

        Stops at the first one that cannot be read or finds no room.
        """
        now = self._advance(now)
        places = self._places
        places.begin_access(request_class)
        chain = places.nodes.chain(keys)
        hung = [places.nodes.find(leaf.key) for leaf in leaves]
        places.hold([*chain, *hung], 1)
        tickets: list[Ticket] = []
        new: list[int] = []

        def bring(key: ChunkKey, nodes: list[int], index: int, parent: int, group: int) -> bool:
            node = nodes[index]
            if node >= 0 and places.host.state[node] in (INCOMING, RESIDENT):
                return True
            tier = self._source(key, node, now)
            ticket = self._host_slots.stage(key, nodes, index, parent, tenant, now, tier, group) if tier else None
            if ticket is None:
                return False
            tickets.append(ticket)
            new.append(nodes[index])
            return True

        for index in range(first, len(keys)):
            if not bring(keys[index], chain, index, chain[index - 1] if index else -1, SPINE):
                break
        else:
            for index, leaf in enumerate(leaves):
                if not bring(leaf.key, hung, index, chain[leaf.chunk], leaf.group):
                    break
        places.insert(places.host, new)
        places.hold([*chain, *hung], -1)
        for node in (*chain, *hung):
            if node >= 0:
                places.forget_unused(node)
        places.forget_ghosts()
        self._below.demote_ahead()
        self.speeds.staging(tickets, now)
        return tickets

    def pass_over(self, keys: Sequence[ChunkKey]) -> None:
        """A request will compute these chunks of a prefix although they are stored below. Then store() keeps them in host memory, too."""
        in_host = self._places.host.state
        chain = self._places.nodes.chain(keys)
        self._places.unreached.update(node for node in chain if node >= 0 and in_host[node] == ABSENT)

    def arriving(self, keys: Sequence[ChunkKey]) -> bool:
        """True while some of keys are on their way into host slots."""
        in_host = self._places.host.state
        return any(node >= 0 and in_host[node] == INCOMING for node in self._places.nodes.chain(keys))

    def num_settled(self, keys: Sequence[ChunkKey]) -> int:
        """Number of leading chunks that are stored or being stored. Staging chunks do not count: their bytes are not verified yet."""
        staging = self._host_slots.staging
        if not staging:
            return len(keys)
        chain = self._places.nodes.chain(keys)
        return next((index for index, node in enumerate(chain) if node in staging), len(keys))

    def load(self, keys: Sequence[ChunkKey]) -> list[Ticket]:
        """Load tickets for keys, all of which must be in host. Their host slots stay unchanged until these operations complete."""
        nodes = self._places.nodes.chain(keys)
        if any(node < 0 or not self._places.host.readable(node) for node in nodes):
            raise KeyError("a chunk to load is not in host memory")
        return [self._host_slots.load(node) for node in nodes]

    def complete(
        self, operation: int, failure: str | None, now: float, saved: int = 0, seconds: float | None = None
    ) -> Ticket | None:
        """An operation ended on all ranks; failure is its cause. saved: bytes by which compression made a written chunk shorter.
        seconds: that a copy took where `now` is later than its end.

        Returns its ticket, or None if the operation is not open.
        """
        now = self._advance(now)
        done = self._operations.close(operation)
        if done is None:
            return None
        if done.ticket.kind == "stage":
            self.speeds.staged(operation, now, seconds, failed=failure is not None)
        doomed = self._doomed_with(done.node) if self._doomed else set()
        self._places.hold_one(done.node, -1)
        if done.ticket.kind == "write":
            self._below.complete_write(done, failure, saved)
        elif done.ticket.kind == "delete":
            self._below.complete_delete(done)
        else:
            self._host_slots.complete(done, failure)
        if self._host_slots.spoiled:
            self._host_slots.free_spoiled()
        if doomed:
            self._doomed -= doomed - self._removal.forget_unused(doomed)
        return done.ticket

    def mark_stuck(self, operations: Iterable[int]) -> None:
        """These copies hang in a tier and may never end. A chunk on its way into host memory counts as absent from now on.

        They stay open, and their slots taken, until complete() says that they ended after all; nobody needs to wait for that.
        """
        for operation in operations:
            stuck = self._operations.mark_stuck(operation)
            if stuck is not None and stuck.ticket.kind == "stage":
                self._host_slots.strand(stuck)
                self.speeds.staged(operation, self._now, None, failed=True)

    def take_tickets(self) -> list[Ticket]:
        """Tickets of the writes and deletes that became due since the last call."""
        tickets, self._below.outbox = self._below.outbox, []
        return tickets

    # What the tiers say themselves

    def restore(
        self,
        tier: str,
        keys: Iterable[ChunkKey],
        now: float,
        parents: Mapping[ChunkKey, ChunkKey] | None = None,
        sizes: Mapping[ChunkKey, int] | None = None,
    ) -> list[ChunkKey]:
        """Add keys (oldest first) that a scan found in a bounded tier. parents: the chunk before each, as far as known. sizes: the bytes of
        those that take less than a chunk that is not compressed.

        A chunk counts as young as the youngest one that continues it. Returns the oldest chunks beyond the tier's capacity, which are not
        added. No chunk that was added continues one of them.
        """
        residents = self._places.set_of(tier)
        assert residents is not None
        return restore(self._places, residents, keys, parents or {}, sizes or {}, self._advance(now))

    def learn(self, tier: str, keys: Sequence[ChunkKey], present: Sequence[bool]) -> None:
        """Record the answer of a remote or shared tier that was asked for keys."""
        remote = next(remote for remote in self._remotes if remote.name == tier)
        own = self._places.set_of(tier)
        for key, there in zip(keys, present, strict=True):
            node = self._places.nodes.find(key)
            if there and (own is None or node < 0 or own.state[node] == ABSENT):
                remote.learn(key)
            else:
                remote.forget(key)

    # Removing

    def clear(self, tenant: str | None = None) -> int:
        """Remove all chunks, or all known chunks of a tenant, that no operation and no pin holds. Lower tiers get deletions.

        Returns how many chunks remain.
        """
        return self._removal.all_of(tenant)

    def reset(self) -> int:
        """Forget every chunk and every pin. Returns how many chunks operations still hold; these are forgotten when the operations end."""
        self._pins.drop_all()
        in_use = self._removal.all_of(None)
        places = self._places
        self._doomed = {places.nodes.key(node) for node in places.nodes if places.present(node)} if in_use else set()
        return in_use

    def clear_from(self, keys: Sequence[ChunkKey]) -> int:
        """Remove the last chunk of a prefix and all chunks that continue it, as clear() does. It walks all chunks."""
        return self._removal.from_chunk(keys[-1])

    def expire(self, now: float) -> None:
        """Drop expired pins, and remove chunks whose time to live is over. Remote tiers keep their own time."""
        now = self._advance(now)
        self._pins.drop_expired(now)
        if self._places.ages.ttl is not None:
            self._removal.expired(now)

    # Pins

    def pin(self, keys: Sequence[ChunkKey], owner: str, expires: float) -> int:
        """Hold chunks against eviction until unpin(owner) or the expiry. An owner has one pin; a second call adds to it.

        Returns how many of keys are held: those in a bounded tier.
        """
        return self._pins.add(keys, owner, expires)

    def unpin(self, owner: str) -> bool:
        """Drop an owner's pin. False if it has none."""
        return self._pins.drop(owner)

    def unpin_all(self) -> None:
        """Drop every pin."""
        self._pins.drop_all()

    def pins(self) -> dict[str, tuple[int, float]]:
        """Owner to (chunks, time of expiry)."""
        return self._pins.listed()

    # For metrics, tests and the live view

    @property
    def has_other_writers(self) -> bool:
        """Whether other instances write to a tier, so that it must be asked for chunks that are not known."""
        return bool(self._remotes)

    @property
    def num_open(self) -> int:
        """Number of operations handed out and not completed."""
        return len(self._operations)

    @property
    def num_stuck(self) -> int:
        """Of these, those that may never end."""
        return self._operations.num_stuck

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    @property
    def num_writing(self) -> dict[str, int]:
        """Number of writes handed out and not completed, by tier."""
        return self._below.num_writing

    def usage(self) -> dict[str, tuple[int, int]]:
        """Bounded tier to (chunks, capacity in chunks)."""
        places = self._places
        return {HOST: (places.host.count, places.num_slots)} | {
            residents.name: (residents.count, residents.capacity) for residents in places.below
        }

    def room(self) -> dict[str, tuple[int, int]]:
        """Bounded tier below the host to (bytes taken, capacity in bytes)."""
        return {residents.name: (residents.bytes_taken, residents.num_bytes) for residents in self._places.below}

    def known_remote(self) -> dict[str, int]:
        """Remote or shared tier to the number of chunks of others that are known to be there."""
        return {remote.name: len(remote) for remote in self._remotes}

    def check(self) -> None:
        """Assert the invariants. Tests and replays call it."""
        self._places.check(idle=not self._operations and not self._pins)

    # Inside

    def _advance(self, now: float) -> float:
        """Time never goes back, whatever the caller's clock does."""
        self._now = max(self._now, now)
        for remote in self._remotes:
            remote.now = self._now
        return self._now

    def _missing(self, nodes: Sequence[int]) -> list[int]:
        """The indices of those of nodes (-1: of a chunk that is not known) that must be stored."""
        places, in_host = self._places, self._places.host.state
        return [
            index
            for index, node in enumerate(nodes)
            if node < 0
            or (in_host[node] == ABSENT and node in places.unreached)
            or (in_host[node] != RESIDENT and not places.present(node))
        ]

    def _doomed_with(self, node: int) -> set[ChunkKey]:
        """A chunk and those before it that wait for it alone, as far as a reset is to forget them."""
        keys: set[ChunkKey] = set()
        while node >= 0 and (key := self._places.nodes.key(node)) in self._doomed:
            keys.add(key)
            node = self._places.parents[node]
        return keys

    def _store_leaves(
        self, leaves: Sequence[Leaf], chain: Sequence[int], tenant: str, now: float, *, touch: bool
    ) -> list[Ticket]:
        """What store() does for leaves whose chunks, the nodes of chain, are held."""
        places = self._places
        nodes = [places.nodes.find(leaf.key) for leaf in leaves]
        missing = self._missing(nodes)
        absent = set(missing)
        stored = [(nodes[index], chain[leaf.chunk]) for index, leaf in enumerate(leaves) if index not in absent]
        places.hold(nodes, 1)
        new: list[int] = []
        tickets: list[Ticket] = []
        for number, index in enumerate(missing):
            leaf = leaves[index]
            ticket = self._host_slots.store(leaf.key, nodes, index, chain[leaf.chunk], tenant, now, leaf.group)
            if ticket is None:
                self.counts.stores_dropped += len(missing) - number
                places.misses.note(leaf.key, Miss.NO_ROOM)
                break
            tickets.append(ticket)
            new.append(nodes[index])
        places.insert(places.host, new)
        places.hold(nodes, -1)
        for node, parent in stored:
            places.adopt(node, parent, tenant)
        if touch:
            places.touch([node for node, _ in stored], now)
            if self._below.exists:
                self._below.after_touch([node for node, _ in stored])
        for node in nodes:
            if node >= 0:
                places.forget_unused(node)
        return tickets

    def _source(self, key: ChunkKey, node: int, now: float) -> str | None:
        """The tier from which a chunk that may not be in host can be read."""
        places = self._places
        if node >= 0 and not places.ages.expired(node, now):
            if places.host.state[node] == RESIDENT:
                return HOST
            tier = places.tier_below(node)
            if tier is not None:
                return tier
        return next((remote.name for remote in self._remotes if key in remote), None)

    def _why(self, key: ChunkKey, node: int, now: float) -> str:
        if node >= 0 and self._places.present(node):
            return Miss.EXPIRED if self._places.ages.expired(node, now) else Miss.IN_FLIGHT
        return self._places.misses.reason(key)
