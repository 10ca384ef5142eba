"""What an engine last heard of the directory in its node, in the words of a Directory, for the engine's own metrics and statistics."""

from __future__ import annotations

from lmc.cache.directory import HOST, Counts
from lmc.cache.keys import ChunkKey
from lmc.cache.node.link import Link
from lmc.cache.node.ordered import OrderedCopies


class Mirror:
    def __init__(self, link: Link, ordered: OrderedCopies) -> None:
        self._link = link
        self._ordered = ordered
        self.counts = Counts()  # the node counts
        self.num_pins = 0

    @property
    def num_open(self) -> int:
        """The engine's own copies under way."""
        return len(self._ordered)

    @property
    def num_writing(self) -> dict[str, int]:
        return self._link.figures.writing if self._link.figures is not None else {}

    def usage(self) -> dict[str, tuple[int, int]]:
        return self._link.figures.usage if self._link.figures is not None else {HOST: (0, 0)}

    def known_remote(self) -> dict[str, int]:
        return self._link.figures.known if self._link.figures is not None else {}

    def room(self) -> dict[str, tuple[int, int]]:
        """The node's page tells the bytes of its tiers."""
        return {}

    def idle(self, key: ChunkKey, now: float) -> float | None:
        return None
