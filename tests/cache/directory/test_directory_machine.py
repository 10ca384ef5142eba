"""The directory against a world that does what its tickets say: slots and tiers with contents, operations that are late, fail or race."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from lmc.cache.directory import HOST, Capacity, Directory, Miss, Ticket
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import Leaf
from lmc.cache.policy.registry import POLICIES

DISK, REDIS = "disk", "redis"
CHUNK = 10
Path = tuple[int, ...]  # a chunk is named by the tokens of its prefix, the first of which stands for the tenant


def name(path: Path) -> ChunkKey:
    return ChunkKey(bytes(path).rjust(32, b"\xff"))


def size_of(key: ChunkKey) -> int:
    """Bytes that a chunk takes below the host: some of them can be compressed."""
    return CHUNK - sum(key) % CHUNK if sum(key) % 3 else CHUNK


def saved(ticket: Ticket) -> int:
    return CHUNK - size_of(ticket.key) if ticket.kind == "write" else 0


def prefix(path: Path) -> list[ChunkKey]:
    return [name(path[: length + 1]) for length in range(1, len(path))]


def leaves_of(path: Path, which: int) -> list[Leaf]:
    """Parts of two more groups of the path's last chunks; which: a bit for each of the two, and one for the chunk before."""
    return [
        Leaf(
            ChunkKey(bytes(path[: index + 2]).rjust(31, b"\xfe") + bytes([group])),
            name(path[: index + 2]),
            group,
            index,
        )
        for group in (1, 2)
        for index in reversed(range(max(0, len(path) - 2 - (which >> 2)), len(path) - 1))
        if which >> (group - 1) & 1
    ]


@dataclass
class World:
    """What really is where. It believes nothing but tickets."""

    slots: dict[int, ChunkKey] = field(default_factory=dict)
    tiers: dict[str, set[ChunkKey]] = field(default_factory=lambda: {DISK: set(), REDIS: set()})

    def room(self, tier: str) -> int:
        return sum(size_of(key) for key in self.tiers[tier])

    def do(self, ticket: Ticket) -> bool:
        """Whether it could be done."""
        if ticket.kind == "store":
            self.slots[ticket.slot] = ticket.key
        elif ticket.kind == "load":
            assert self.slots[ticket.slot] == ticket.key, "the slot of a promised chunk was given away"
        elif ticket.kind == "stage":
            if ticket.key not in self.tiers[ticket.tier]:
                return False
            self.slots[ticket.slot] = ticket.key
        elif ticket.kind == "write":
            assert self.slots[ticket.slot] == ticket.key, "the slot of a chunk being written was given away"
            self.tiers[ticket.tier].difference_update(ticket.evict)
            self.tiers[ticket.tier].add(ticket.key)
        else:
            self.tiers[ticket.tier].discard(ticket.key)
        return True


# Lists of every length are equally likely this way: deep chains are where the difficulties are.
paths = st.sampled_from(
    [
        (tenant, *(number >> bit & 1 for bit in range(length)))
        for length in range(1, 6)
        for tenant in range(2)
        for number in range(1 << length)
        for _ in range(32 >> length)
    ]
)


class DirectoryMachine(RuleBasedStateMachine):
    tickets: Bundle[Ticket] = Bundle("tickets")

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        host_slots=st.integers(1, 6),
        disk_slots=st.integers(0, 8),
        remote=st.sampled_from([(), (REDIS,), (DISK, REDIS)]),
        write=st.sampled_from(["through", "back", "around"]),
        ttl=st.sampled_from([None, None, 20.0]),
        ttl_mode=st.sampled_from(["sliding", "fixed"]),
        tenant_quota=st.sampled_from([None, None, 1, 3]),
        queue_depth=st.integers(1, 8),
        calm=st.booleans(),
    )
    def start(self, policy, host_slots, disk_slots, remote, write, ttl, ttl_mode, tenant_quota, queue_depth, calm):
        self.calm = calm  # nothing fails and nothing is removed, so every chunk has its parent
        self.below = {DISK: Capacity(disk_slots * CHUNK, CHUNK, disk_slots * 2)} if disk_slots else {}
        self.remote = tuple(tier for tier in remote if tier != DISK or disk_slots)
        self.directory = Directory(
            host_slots,
            self.below,
            POLICIES[policy],
            remote=self.remote,
            write=write,
            ttl=ttl,
            ttl_mode=ttl_mode,
            tenant_quota=tenant_quota,
            queue_depth=queue_depth,
        )
        self.host_slots, self.ttl, self.quota = host_slots, ttl, tenant_quota
        self.world = World()
        self.foreign: set[ChunkKey] = set()  # put on the disk by another instance
        self.now = self.latest = 0.0
        self.open: dict[int, Ticket] = {}
        self.done: set[int] = set()
        self.touched: dict[ChunkKey, float] = {}
        self.stored: set[ChunkKey] = set()
        self.known: dict[ChunkKey, Path] = {}
        self.known_leaves: dict[ChunkKey, Leaf] = {}
        self.pinned: dict[str, list[ChunkKey]] = {}
        self.disturbed = False  # a failure or a removal may leave a child without its parent

    def take(self, tickets):
        fresh = [*tickets, *self.directory.take_tickets()]
        self.open.update({ticket.operation: ticket for ticket in fresh})
        return multiple(*fresh)

    def note(self, path):
        for length in range(1, len(path)):
            self.known[name(path[: length + 1])] = path[: length + 1]

    def note_leaves(self, path, which):
        leaves = leaves_of(path, which)
        self.known_leaves.update({leaf.key: leaf for leaf in leaves})
        self.touched.update(dict.fromkeys(self.known_leaves, self.latest))
        return leaves

    @rule(target=tickets, path=paths, touch=st.booleans(), which=st.integers(0, 7))
    def store(self, path, touch, which):
        self.note(path)
        self.touched.update(dict.fromkeys(prefix(path), self.latest))
        leaves = self.note_leaves(path, which)
        tickets = self.directory.store(prefix(path), self.now, leaves=leaves, tenant=str(path[0]), touch=touch)
        assert all(ticket.kind == "store" for ticket in tickets)
        groups = {leaf.key: leaf.group for leaf in leaves}
        assert all(ticket.group == groups.get(ticket.key, 0) for ticket in tickets)
        return self.take(tickets)

    @rule(target=tickets, path=paths, first=st.integers(0, 2), which=st.integers(0, 7))
    def stage(self, path, first, which):
        self.note(path)
        self.touched.update(dict.fromkeys(prefix(path), self.latest))
        leaves = self.note_leaves(path, which)
        return self.take(self.directory.stage(prefix(path), self.now, first=first, leaves=leaves, tenant=str(path[0])))

    @invariant()
    def lookups_tell_the_truth(self):
        for path in self.known.values():
            self.lookup(path)

    def lookup(self, path):
        keys = prefix(path)
        found = self.directory.lookup(keys, self.now)
        assert (found.miss is None) == (found.num_chunks == len(keys))
        if found.miss == Miss.NEVER_STORED:
            assert keys[found.num_chunks] not in self.stored
        for key, tier in zip(keys, found.tiers, strict=False):
            assert tier in self.directory.tiers_of(key)
            if tier == DISK and DISK not in self.remote:
                assert key in self.world.tiers[DISK]
            if self.ttl is not None and tier not in self.remote:
                assert self.latest - self.touched[key] <= self.ttl

    @invariant()
    def readable_leaves_can_be_read(self):
        for leaf in self.known_leaves.values():
            tiers = self.directory.tiers_of(leaf.key)
            if DISK in tiers and DISK not in self.remote:
                assert leaf.key in self.world.tiers[DISK]
            if self.directory.readable([leaf], self.now):
                assert tiers
            if self.directory.readable([leaf], self.now, in_host=True):
                assert HOST in tiers

    @rule(target=tickets, path=paths, which=st.integers(0, 7))
    def load(self, path, which):
        found = self.directory.lookup(prefix(path), self.now)
        in_host = next((i for i, tier in enumerate(found.tiers) if tier != HOST), found.num_chunks)
        leaves = leaves_of(path, which)
        together = [leaf.key for leaf in leaves] if self.directory.readable(leaves, self.now, in_host=True) else []
        return self.take(self.directory.load([*prefix(path)[:in_host], *together]))

    @rule(ticket=tickets)
    def act(self, ticket):
        """The worker does it; the report comes later."""
        if ticket.operation in self.open and ticket.operation not in self.done and self.world.do(ticket):
            self.done.add(ticket.operation)

    @precondition(lambda self: not self.calm)
    @rule(target=tickets, ticket=tickets)
    def hang(self, ticket):
        """The worker says that a copy may never end; it may end all the same, later."""
        before = self.directory.num_stuck
        self.directory.mark_stuck([ticket.operation])
        assert self.directory.num_stuck - before in ((0, 1) if ticket.operation in self.open else (0,))
        if ticket.operation in self.open and ticket.kind == "stage":
            self.disturbed = True
            assert not self.directory.arriving([ticket.key]) or any(
                other.key == ticket.key and other.operation != ticket.operation and other.kind in ("store", "stage")
                for other in self.open.values()
            )
        return self.take([])

    @rule(
        target=tickets,
        ticket=tickets,
        fails=st.sampled_from([None, None, None, "error", "corrupt", "full", "unavailable"]),
    )
    def report(self, ticket, fails):
        fails = None if self.calm else fails
        opened = self.open.pop(ticket.operation, None)
        if opened is not None and fails is None and ticket.operation not in self.done and not self.world.do(ticket):
            fails = "absent"
        if opened is not None and fails is not None and ticket.kind == "write":
            self.world.tiers[ticket.tier].difference_update(ticket.evict)
            self.world.tiers[ticket.tier].discard(ticket.key)
        self.disturbed = self.disturbed or fails is not None
        if opened is not None and fails is None and ticket.kind == "store":
            self.stored.add(ticket.key)
        assert self.directory.complete(ticket.operation, fails, self.now, saved(ticket)) == opened
        return self.take([])

    @rule(target=tickets, served=st.lists(paths, min_size=2, max_size=5), seconds=st.floats(0, 12))
    def serve(self, served, seconds):
        """Requests as an engine makes them, all of whose copies succeed if they can."""
        fresh = []
        for path in served:
            self.wait(seconds / len(served))
            found = self.directory.lookup(prefix(path), self.now).num_chunks
            for step in (self.stage, self.load, self.store):
                if found or step == self.store:
                    more = {self.stage: {"first": 0}, self.store: {"touch": True}}.get(step, {})
                    fresh += step(path, which=sum(path) % 8, **more).values
                    fresh += self.settle().values
                    self.all_is_in_order()
                    self.lookups_tell_the_truth()
        return multiple(*fresh)

    @precondition(lambda self: self.open)
    @rule(target=tickets)
    def settle(self):
        """All that is under way ends well, if it can."""
        fresh = []
        for operation, ticket in list(self.open.items()):
            fresh += self.report(ticket, None).values if operation in self.open else ()
        return multiple(*fresh)

    @precondition(lambda self: self.open)
    @rule(target=tickets, fails=st.booleans())
    def settle_copies_of_blocks(self, fails):
        """Stores and loads end, some badly; what goes on below does not."""
        fresh = []
        for ticket in list(self.open.values()):
            if ticket.kind in ("store", "load"):
                fails_now = "copy" if fails and ticket.kind == "load" else None
                fresh += self.report(ticket, fails_now).values
        return multiple(*fresh)

    @rule(path=paths, tier=st.sampled_from([DISK, REDIS]))
    def others_store(self, path, tier):
        """Another instance shares the tier."""
        if tier in self.remote:
            self.note(path)
            fresh = set(prefix(path)) - self.world.tiers[tier]
            self.world.tiers[tier].update(fresh)
            if tier == DISK:
                self.foreign.update(fresh)

    @precondition(lambda self: not self.calm)
    @rule(path=paths, tier=st.sampled_from([DISK, REDIS]))
    def others_evict(self, path, tier):
        if tier in self.remote:
            self.world.tiers[tier].discard(name(path))

    @rule(path=paths, tier=st.sampled_from([DISK, REDIS]))
    def ask(self, path, tier):
        if tier in self.remote:
            self.note(path)
            keys = prefix(path)
            self.directory.learn(tier, keys, [key in self.world.tiers[tier] for key in keys])

    @rule(path=paths, owner=st.sampled_from(["a", "b"]), seconds=st.floats(1, 30))
    def pin(self, path, owner, seconds):
        keys = prefix(path)
        held = [key for key in keys if {HOST, DISK} & set(self.directory.tiers_of(key))]
        covered = self.directory.pin(keys, owner, self.now + seconds)
        assert covered >= len(set(held) - self.foreign)
        own = [key for key in held if HOST in self.directory.tiers_of(key)]
        self.pinned.setdefault(owner, []).extend(own)

    @rule(owner=st.sampled_from(["a", "b"]))
    def unpin(self, owner):
        assert self.directory.unpin(owner) == (owner in self.pinned)
        self.pinned.pop(owner, None)

    @rule(seconds=st.floats(-5, 12))
    def wait(self, seconds):
        self.now += seconds  # the caller's clock may jump back
        self.latest = max(self.latest, self.now)

    @rule(target=tickets)
    def expire(self):
        self.directory.expire(self.now)
        self.pinned = {owner: keys for owner, keys in self.pinned.items() if owner in self.directory.pins()}
        return self.take([])

    @precondition(lambda self: not self.calm)
    @rule(target=tickets, tenant=st.sampled_from([None, "0", "1"]))
    def clear(self, tenant):
        self.disturbed = True
        left = self.directory.clear(tenant)
        if not self.open and not self.pinned:
            assert left == 0
        return self.take([])

    @precondition(lambda self: not self.calm)
    @rule(target=tickets, path=paths)
    def clear_from(self, path):
        self.disturbed = True
        self.directory.clear_from(prefix(path))
        if not self.open and not self.pinned and not self.remote:
            assert not self.directory.tiers_of(name(path)) or DISK in self.directory.tiers_of(name(path))
        return self.take([])

    @precondition(lambda self: not self.disturbed)
    @invariant()
    def chunks_have_parents(self):
        under_way = {ticket.key for ticket in self.open.values()}
        for key, path in self.known.items():
            if len(path) > 2:
                tiers = self.directory.tiers_of(key)
                parent = name(path[:-1])
                above = self.directory.tiers_of(parent)
                assert HOST not in tiers or above or parent in under_way
                if DISK in tiers and DISK not in self.remote:
                    assert DISK in above or (parent, DISK) in {(t.key, t.tier) for t in self.open.values()}
        for leaf in self.known_leaves.values():
            tiers, above = self.directory.tiers_of(leaf.key), self.directory.tiers_of(leaf.parent)
            assert HOST not in tiers or above or leaf.parent in under_way
            if DISK in tiers and DISK not in self.remote:
                assert DISK in above or (leaf.parent, DISK) in {(t.key, t.tier) for t in self.open.values()}

    @invariant()
    def all_is_in_order(self):
        self.directory.check()
        usage = self.directory.usage()
        assert set(usage) == {HOST, *self.below}
        assert all(taken <= capacity for taken, capacity in usage.values())
        if DISK in self.below and DISK not in self.remote:
            assert self.world.room(DISK) <= self.below[DISK].num_bytes
        own_slots = [ticket.slot for ticket in self.open.values() if ticket.kind in ("store", "stage")]
        assert len(own_slots) == len(set(own_slots))
        in_tiers = [(t.tier, t.key) for t in self.open.values() if t.kind in ("write", "delete")]
        assert len(in_tiers) == len(set(in_tiers))
        if self.quota is not None:
            for tenant in (0, 1):
                mine = [key for key, path in self.known.items() if path[0] == tenant]
                assert sum(HOST in self.directory.tiers_of(key) for key in mine) <= self.quota
        for keys in self.pinned.values():
            assert self.disturbed or all(HOST in self.directory.tiers_of(key) for key in keys)
        assert self.directory.num_open == len(self.open)

    def teardown(self):
        if not hasattr(self, "directory"):
            return
        for owner in ("a", "b"):
            self.directory.unpin(owner)
        while self.open:
            _, ticket = self.open.popitem()
            self.directory.complete(
                ticket.operation, None if self.world.do(ticket) else "absent", self.now, saved(ticket)
            )
            self.take([])
        self.directory.check()
        self.directory.clear()
        self.take([])
        while self.open:
            _, ticket = self.open.popitem()
            self.world.do(ticket)
            self.directory.complete(ticket.operation, None, self.now, saved(ticket))
            self.take([])
        self.directory.check()
        assert self.directory.num_open == 0
        assert all(taken == 0 for taken, _ in self.directory.usage().values())


DirectoryMachine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_directory_machine = DirectoryMachine.TestCase
