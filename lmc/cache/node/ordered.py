"""The copies that an engine's plans have ordered in a node's slots, and which sessions these slots belong to.

Operations in plans have numbers of their own, since those of a node that was started again would repeat. When the connection changes,
copies of the earlier session still run; its node must not give their slots away before it hears that they have ended.
"""

from __future__ import annotations

from typing import NamedTuple

import lmc.cache.node.wire as wire
from lmc.cache.keys import ChunkKey
from lmc.cache.node.link import Link
from lmc.cache.node.tracked import Tracked


class Copying(NamedTuple):
    """A copy that a plan has ordered, under its number in plans."""

    session: int
    operation: int  # the session's own
    key: ChunkKey
    chunk: int
    load: Tracked | None  # the request that it fills blocks for


class _Earlier(NamedTuple):
    """A session that is over. While workers may be making copies of it, its node must not give their slots away."""

    node: str
    number: int
    num_open: int


class OrderedCopies:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._last = 0
        self._copying: dict[int, Copying] = {}
        self._sessions: dict[int, _Earlier] = {}
        self._session = _Earlier("", 0, 0)  # the one in use, as it will be remembered
        self._current = 0

    def __len__(self) -> int:
        """Number of copies under way."""
        return len(self._copying)

    def add(self, operation: int, key: ChunkKey, chunk: int, load: Tracked | None) -> int:
        """Returns the number of the session's operation in plans."""
        self._last += 1
        self._copying[self._last] = Copying(self._current, operation, key, chunk, load)
        return self._last

    def pop(self, number: int) -> Copying | None:
        """The copy, which has ended on all ranks; None if it was not ordered here. ended() follows."""
        return self._copying.pop(number, None)

    def ended(self, copying: Copying, cause: str | None) -> list[wire.Event]:
        """What the node must hear of the end of a copy."""
        if copying.session == self._link.session:
            return [wire.Done(copying.operation, cause or "")]
        earlier = self._sessions[copying.session]
        self._sessions[copying.session] = earlier._replace(num_open=earlier.num_open - 1)
        return []

    def note_session(self) -> None:
        """Remember what runs in an earlier session's slots after a change of the connection, and tell the node what is over."""
        link = self._link
        if link.session != self._current:
            if self._current:
                num_open = sum(copying.session == self._current for copying in self._copying.values())
                self._sessions[self._current] = self._session._replace(num_open=num_open)
            self._current, self._session = link.session, _Earlier(link.node, link.number, 0)
        for session, earlier in list(self._sessions.items()):
            if not earlier.num_open and link.session and self._is_over(earlier):
                del self._sessions[session]

    def _is_over(self, earlier: _Earlier) -> bool:
        """No worker touches a slot of the session any more. Tells its node so, if that is still there; False if it did not hear it."""
        return earlier.node != self._link.node or self._link.tell([wire.Quiet(earlier.number)])
