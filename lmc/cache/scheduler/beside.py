"""What an engine says and asks of chunks beside the life of its requests: what it offers, what it used, and what to announce."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmc.cache.directory import Change, Directory, store_offer, use_prefix
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import Parts
from lmc.cache.plan import Plan, RequestCopies, block_copies
from lmc.cache.scheduler.client_pins import ClientPins


class BesideRequests:
    """The part of a CacheScheduler that knows no request."""

    directory: Directory
    client_pins: ClientPins
    _parts: Parts
    _clock: Callable[[], float]

    def offer(
        self, keys: Sequence[ChunkKey], known: int, blocks: Sequence[int], tenant: str
    ) -> tuple[Plan, bool] | None:
        """The engine offers chunks of a prefix, from index `known` on, which lie in these blocks; no request speaks for them.

        Returns a plan that stores those which are missing, and whether all on offer are kept or will be; None: offer them again.
        """
        now = self._clock()
        tickets, kept = store_offer(self.directory, keys, known, tenant, now)
        self.client_pins.renew(now)
        offered = [(index - known, ticket) for index, ticket in tickets.items()]
        copies, _ = block_copies(self._parts, offered, (blocks,), 0)
        return Plan(stores=[RequestCopies("offer", copies)] if copies else []), kept

    def use(self, keys: Sequence[ChunkKey], tenant: str, name: str = "", pin_seconds: float = 0.0) -> None:
        """A request used this prefix, wherever the engine held it: what is stored of it counts as used now.

        pin_seconds: all of it shall stay for so long, within limits, also what is stored later. name: the request's, for the pin.
        """
        now = self._clock()
        use_prefix(self.directory, keys, tenant, now)
        if pin_seconds > 0:
            self.client_pins.ask(name, keys, pin_seconds, now, later=True)

    def where(self, keys: Sequence[ChunkKey]) -> list[tuple[Sequence[str], bool]]:
        """For each chunk the tiers that it can be read from, and whether it is on its way into host memory."""
        directory = self.directory
        return [(directory.tiers_of(key), directory.arriving([key])) for key in keys]

    def announce(self) -> None:
        """From now on take_changes() is called regularly."""
        self.directory.changes.watch()

    def take_changes(self) -> tuple[bool, Sequence[Change]]:
        """What became readable, or was removed, since the last call. First: whether all that was heard before holds no more."""
        return False, self.directory.changes.take()
