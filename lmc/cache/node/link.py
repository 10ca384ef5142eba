"""An engine's connection to its node, on the scheduler's thread: exchanges with a deadline, and a new connection when the old one has gone.

No call waits longer than the deadline. After one that was not answered in time no other call waits at all, until the node has caught up.
Connecting happens on a thread of its own, with growing pauses.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import lmc.cache.node.wire as wire
from lmc.cache.node.channel import Channel, connect
from lmc.errors import NodeAbsent, NodeError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # a node that opens the tiers of a new namespace
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
_PATIENT_TIMES = 5
_JOIN_SECONDS = 1.0


class Complaints:
    """One line for each reason why a node is not there. After it was there once, its absence was told when it went, and what else is wrong
    is told when it stays so.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = ""
        self._succeeded = False
        self._repeated = 0

    def note(self, error: NodeError, pause: float) -> None:
        if self._succeeded:
            self._repeated = 0 if isinstance(error, NodeAbsent) or pause < LONGEST_PAUSE else self._repeated + 1
            if self._repeated < _PATIENT_TIMES:  # the engine's other processes may not be attached yet
                return
        if str(error) != self._said:
            self._said = str(error)
            logger.warning("lmc: %s: %s", self._what, error)

    def succeeded(self) -> None:
        self._succeeded, self._said, self._repeated = True, "", 0


class Link:
    """late(answers) is called with what comes too late: nobody will do what it says."""

    def __init__(
        self, path: Path, attach: wire.Attach, deadline: float, late: Callable[[int, Sequence[wire.Reply]], None]
    ) -> None:
        self.session = 0  # number of the connection in use among those of this engine; 0: there is none
        self.number = 0  # of the same session, as the node counts
        self.node = ""
        self.metrics = ""
        self.figures: wire.Figures | None = None
        self.timeouts = 0
        self.changes: list[tuple[str, bytes, bool]] = []  # as Answers has them
        self.forget = False  # what was heard of chunks before these changes holds no more
        self._path = path
        self._attach = attach
        self._deadline = deadline
        self._late = late
        self._channel: Channel | None = None
        self._sessions = 0
        self._later: list[
            wire.Event
        ] = []  # what the node hears with the next message, or at the latest with send_later()
        self._number = 0  # of the last batch
        self._behind = 0  # the batch that was not answered in time; 0: the node keeps up
        self._fresh: tuple[Channel, wire.Attached] | None = None  # from the thread
        self._closing = threading.Event()
        self._tried = threading.Event()
        self._lost = threading.Event()
        self._lost.set()
        self._thread = threading.Thread(target=self._stay_attached, name="lmc-node-attach", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """At the start: until the node has answered or refused once. True if there is a session."""
        self._tried.wait(seconds)
        return self.ready

    @property
    def ready(self) -> bool:
        """Whether an exchange may be tried. Takes in what has come meanwhile."""
        if self._fresh is not None:
            self._take_over()
        if self._behind:
            self._catch_up()
        return self._channel is not None and not self._behind

    @property
    def connected(self) -> bool:
        return self._channel is not None

    def exchange(self, events: list[wire.Event]) -> Sequence[wire.Reply] | None:
        """The node's answers, or None: it has gone, or is late, and late() gets the answers."""
        channel = self._channel
        if channel is None:
            return None
        self._number += 1
        until = time.monotonic() + self._deadline
        later, self._later = self._later, []
        unasked = sum(isinstance(event, wire.Admit) for event in later)  # whose answers nobody waits for
        try:
            channel.put(wire.Batch(self._number, [*later, *events]))
            left = self._deadline
            while left > 0:
                channel.wait(left)
                channel.flush()
                answers = self._receive(self._number)
                if answers is not None:
                    return answers[unasked:]
                left = until - time.monotonic()
        except NodeError as error:
            self._lose(error)
            return None
        self._behind = self._number
        self.timeouts += 1
        return None

    def tell(self, events: list[wire.Event]) -> bool:
        """Without an answer, and without a wait. False if the node is not there to hear it."""
        if self._channel is None:
            return False
        later, self._later = self._later, []
        try:
            self._channel.put(wire.Batch(0, [*later, *events]))
        except NodeError as error:
            self._lose(error)
            return False
        return True

    def tell_later(self, events: list[wire.Event]) -> None:
        """The same, together with what is sent next: each message costs more than what is in it."""
        if self._channel is not None:
            self._later += events

    @property
    def waiting(self) -> bool:
        """Whether there is something to tell that was not sent yet."""
        return bool(self._later)

    def send_later(self) -> None:
        """Tell what waits, at the end of a step."""
        if self._later:
            self.tell([])

    def look(self) -> None:
        """Notice that the node has gone or is back; for steps in which nothing is exchanged."""
        if self._fresh is not None:
            self._take_over()
        elif self._channel is not None:
            self._catch_up()

    def close(self) -> None:
        self.send_later()
        self._closing.set()
        self._lost.set()
        self._thread.join(_JOIN_SECONDS)  # it may wait for an answer, and ends with the process
        for channel in (self._channel, self._fresh[0] if self._fresh is not None else None):
            if channel is not None:
                channel.close()
        self._channel = self._fresh = None
        self.session = 0

    def forget_changes(self) -> None:
        self.changes.clear()
        self.forget = True

    # Inside

    def _catch_up(self) -> None:
        assert self._channel is not None
        try:
            self._channel.flush()
            self._receive(0)
        except NodeError as error:
            self._lose(error)

    def _receive(self, wanted: int) -> Sequence[wire.Reply] | None:
        """Read what has come; the answers to the batch of this number, if they are there."""
        assert self._channel is not None
        found = None
        for body in self._channel.take():
            message = wire.read(wire.answers, body)
            if message.figures is not None:
                self.figures = message.figures
            if message.forget:
                self.forget_changes()
            self.changes += message.changes
            if message.number >= self._behind:
                self._behind = 0
            if message.number == wanted:
                found = message.answers
            else:
                self._late(self.session, message.answers)
        return found

    def _lose(self, error: NodeError) -> None:
        logger.warning("lmc: the node has gone, the engine goes on without a cache and looks for it: %s", error)
        assert self._channel is not None
        self._channel.close()
        self._channel, self._behind, self.session, self.node = None, 0, 0, ""
        self._later = []
        self.forget_changes()
        self._lost.set()

    def _take_over(self) -> None:
        assert self._fresh is not None
        (self._channel, attached), self._fresh = self._fresh, None
        self._sessions += 1
        self.session, self.number, self.node = self._sessions, attached.session, attached.node.hex()
        self.figures, self.metrics = attached.figures, attached.metrics
        logger.info("lmc: attached to the node at %s", self._path)

    # On the thread

    def _stay_attached(self) -> None:
        complaints = Complaints("not attached to the node, running without a cache")
        while True:
            self._lost.wait()
            pause = SHORTEST_PAUSE
            while not self._closing.is_set():
                try:
                    fresh = self._connect()
                except NodeError as error:
                    complaints.note(error, pause)
                    self._tried.set()
                    self._closing.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                complaints.succeeded()
                self._lost.clear()
                self._fresh = fresh
                self._tried.set()
                break
            if self._closing.is_set():
                return

    def _connect(self) -> tuple[Channel, wire.Attached]:
        channel = connect(str(self._path), ANSWER_SECONDS)
        with ExitStack() as opened:
            opened.callback(channel.close)
            answer = wire.read(wire.welcomes, channel.ask(self._attach, ANSWER_SECONDS))
            if isinstance(answer, wire.Refused):
                raise NodeError(f"node: {answer.reason}")
            if not isinstance(answer, wire.Attached):
                raise NodeError("node: the node answered with something else than a session")
            opened.pop_all()
        return channel, answer
