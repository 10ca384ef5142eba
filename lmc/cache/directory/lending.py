"""Host slots that come and go while the directory lives, because several namespaces share one memory."""

from __future__ import annotations

from lmc.cache.directory.below import Below
from lmc.cache.directory.nodes import RESIDENT
from lmc.cache.directory.places import Places


class Lending:
    """Until withhold_all() is called, all slots are there from the start, as those of a memory of one's own are."""

    def __init__(self, places: Places, below: Below) -> None:
        self._places = places
        self._below = below

    @property
    def num_free(self) -> int:
        return self._places.num_free_slots

    def withhold_all(self) -> None:
        """There is no slot yet; give() brings some. Call it before any slot is taken."""
        self._places.withhold_all()

    def give(self, slots: range) -> None:
        """These slots may be used from now on."""
        self._places.give_slots(slots)

    def recall(self, slots: range) -> int:
        """Use these slots no longer, and evict what lies in them, with all that continues it, as far as nothing else holds it.

        Returns how many are still in use; call it again later then. After 0, nothing of the directory's refers to them until give().
        """
        places = self._places
        places.recall_slots(slots)
        targets = [node for node in places.nodes_in(slots) if places.host.readable(node)]
        for node in reversed(self._with_children(targets) if targets else ()):
            if places.host.state[node] == RESIDENT and not places.host.holds[node]:
                self._below.evict_from_host(node, "room")
        return places.num_recalled(slots)

    def _with_children(self, nodes: list[int]) -> list[int]:
        """The nodes, and all in host memory that continue them; a child comes after its parent."""
        places = self._places
        children: dict[int, list[int]] = {}
        for node in places.nodes_in(range(places.host.capacity)):
            if places.host.present(node):
                children.setdefault(places.parents[node], []).append(node)
        found = dict.fromkeys(nodes)
        waiting = list(nodes)
        for node in waiting:
            for child in children.get(node, ()):
                found.pop(child, None)  # behind its parent, wherever it was
                found[child] = None
                waiting.append(child)
        return list(found)
