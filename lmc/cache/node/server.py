"""The node's thread: takes in workers and schedulers, hands their events to sessions, and notices who has gone.

One thread owns every directory, so nothing is locked. It never waits for a peer: what a peer does not read waits in memory, up to a limit.
Opening a namespace's tiers takes seconds, so that happens on a thread beside it, and whoever attaches waits for it.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import lmc.cache.node.wire as wire
from lmc.cache.config import CacheConfig
from lmc.cache.node.channel import Channel, Peer
from lmc.cache.node.domain import Domain, DomainName, open_rank
from lmc.cache.node.memory import UNIT, Extents, Memory, Places
from lmc.cache.node.session import Mapping, Session
from lmc.cache.node.sharing import share_out
from lmc.cache.observe.logs import Sparingly
from lmc.errors import ConfigError, LmcError, NodeError

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.05
_FIGURES_SECONDS = 1.0
_GREETING_SECONDS = 10.0
_MOST_CONNECTIONS = 4096
_ROOT = 0


@dataclass(eq=False)
class _Connection:
    number: int  # its descriptor's
    channel: Channel
    peer: Peer
    until: float | None  # when its greeting must have come
    mapping: Mapping | None = None
    session: Session | None = None
    waits: wire.Attach | None = None  # for its namespace to be opened
    told: float = float("-inf")  # when it was last told figures
    writing: bool = False  # the poll looks for room to write, too
    watch: int = -1  # descriptor that tells of the scheduler's end


@dataclass
class _Opening:
    domain: Future[Domain]
    waiting: list[_Connection] = field(default_factory=list)


class Node:
    """Serves until stop()."""

    def __init__(
        self,
        config: CacheConfig,
        listener: socket.socket,
        memory: Memory,
        *,
        group: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """group: the id of a group whose members may attach."""
        self.number = secrets.token_bytes(wire.ID_BYTES)
        self.metrics_url = ""
        self.domains: dict[DomainName, Domain] = {}
        self.sessions: dict[int, Session] = {}  # those with open copies, too
        self.mail: deque[Callable[[], None]] = deque()  # work from other threads
        self._config = config
        self._listener = listener
        self._memory = memory
        self._extents = Extents(memory.size)
        self._group = group
        self._clock = clock
        self._connections: dict[int, _Connection] = {}
        self._watched: dict[int, Mapping | _Connection] = {}  # by the descriptor that tells of the process's end
        self._mappings: dict[bytes, Mapping] = {}
        self._left: set[bytes] = set()  # workers that have let go; plans of before must find them without the memory
        self._opening: dict[DomainName, _Opening] = {}
        self._openers = ThreadPoolExecutor(4, thread_name_prefix="lmc-node-open")
        self._last_session = 0
        self._num_openings = 0
        self._accepting = True
        self._sparingly = Sparingly()
        self._stopping = False
        self._wake_up, self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), False
        self._poll = select.epoll()
        listener.setblocking(False)
        self._poll.register(listener, select.EPOLLIN)
        self._poll.register(self._wake_up, select.EPOLLIN)

    @property
    def memory_bytes(self) -> int:
        return self._memory.size

    @property
    def free_bytes(self) -> int:
        """Memory that no namespace has taken."""
        return self._extents.num_free * self._extents.extent_bytes

    def wake(self) -> None:
        """From any thread: look at what was left behind."""
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._wake_up, 1)

    def stop(self) -> None:
        """From any thread, and from a signal handler."""
        self._stopping = True
        self.wake()

    def run(self) -> None:
        next_tick = self._clock()
        while not self._stopping:
            now = self._clock()
            for number, events in self._poll.poll(max(next_tick - now, 0.0)):
                if number in self._connections:
                    self._serve(self._connections[number], events)
                elif number in self._watched:
                    self._process_ended(number)
                elif number == self._wake_up:
                    self._woken = False
                    with suppress(BlockingIOError):
                        os.eventfd_read(self._wake_up)
                    self._settle()
                else:
                    self._accept()
            now = self._clock()
            if now >= next_tick:
                next_tick = now + TICK_SECONDS
                self._tick(now)

    def close(self, timeout: float) -> None:
        """Send every engine on its way, and let the writes under way end within timeout seconds."""
        until = time.monotonic() + timeout
        for number, events in self._poll.poll(0):
            if number in self._connections:  # what was stored is told of there, and is still written
                self._serve(self._connections[number], events)
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._openers.shutdown(wait=False, cancel_futures=True)
        for domain in self.domains.values():
            domain.close(max(until - time.monotonic(), 0.0))
        self._poll.close()
        os.close(self._wake_up)
        for number in self._watched:
            os.close(number)
        self._memory.close()

    # Connections

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._sparingly.warn(logger, "accept", f"node: cannot take in an engine: {error.strerror}")
                self._poll.modify(self._listener, 0)  # until the next tick, since it would be ready again at once
                self._accepting = False
                return
            channel, peer = Channel(connection), Peer(connection)
            try:
                self._check(peer)
                channel.flush()
            except NodeError as error:
                logger.warning("lmc: node: process %d was refused: %s", peer.pid, _text(error))
                _tell_refusal(channel, _text(error))
                channel.close()
                continue
            number = channel.fileno()
            self._connections[number] = _Connection(number, channel, peer, self._clock() + _GREETING_SECONDS)
            self._poll.register(channel, select.EPOLLIN)

    def _check(self, peer: Peer) -> None:
        """Raises NodeError for one that may not attach."""
        if peer.uid not in (os.getuid(), _ROOT) and self._group not in peer.groups():
            raise NodeError(f"user {peer.uid} is neither the node's user nor in node_group")
        if len(self._connections) >= _MOST_CONNECTIONS:
            raise NodeError(f"there are {_MOST_CONNECTIONS} connections")

    def _serve(self, connection: _Connection, events: int) -> None:
        channel = connection.channel
        try:
            if events & select.EPOLLOUT:
                channel.flush()
            if events & ~select.EPOLLOUT:
                for body in channel.take():
                    self._receive(connection, body)
            if channel.waiting != connection.writing:
                connection.writing = channel.waiting
                self._poll.modify(channel, select.EPOLLIN | (select.EPOLLOUT if channel.waiting else 0))
        except LmcError as error:
            if connection.session is None and connection.mapping is None:
                logger.warning("lmc: node: process %d was refused: %s", connection.peer.pid, _text(error))
                _tell_refusal(channel, _text(error))
            elif "connection has ended" not in str(error):
                logger.warning("lmc: node: process %d is let go: %s", connection.peer.pid, _text(error))
            self._drop(connection)

    def _receive(self, connection: _Connection, body: bytes) -> None:
        if connection.session is not None:
            self._batch(connection, connection.session, wire.read(wire.batches, body))
        elif connection.mapping is not None:
            self._worker_says(connection.mapping, wire.read(wire.worker_messages, body))
        elif connection.waits is not None:
            raise NodeError("a message came before the answer to the last one")
        else:
            connection.until = None
            greeting = wire.read(wire.greetings, body)
            if isinstance(greeting, wire.TakeMemory):
                self._take_memory(connection, greeting)
            else:
                self._attach(connection, greeting)

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.number, None) is None:
            return
        self._poll.unregister(connection.number)
        connection.channel.close()
        if connection.watch >= 0:
            self._unwatch(connection.watch)
        connection.waits = None
        if connection.session is not None:
            self._leave(connection.session)

    # Workers

    def _take_memory(self, connection: _Connection, message: wire.TakeMemory) -> None:
        mapping = self._mappings.get(message.worker)
        if message.worker in self._left or (mapping is not None and mapping.taken):
            raise NodeError("a worker of this number has, or had, the memory of this node")
        if mapping is None:  # else it could not map what it was sent, and tries again
            watch = connection.peer.watch()
            mapping = Mapping(message.worker, message.rank, watch)
            self._watched[watch] = self._mappings[message.worker] = mapping
            self._poll.register(watch, select.EPOLLIN)  # before it has the memory, so that its end is not missed
        connection.mapping = mapping
        connection.channel.put_descriptor(wire.Memory(self.number, self._memory.size, UNIT), self._memory.descriptor)

    def _worker_says(self, mapping: Mapping, message: wire.FromWorker) -> None:
        if isinstance(message, wire.Taken):
            mapping.taken = True
        else:
            self._let_go(mapping)

    def _process_ended(self, watch: int) -> None:
        gone = self._watched[watch]
        if isinstance(gone, Mapping):
            self._let_go(gone)
        else:
            self._drop(gone)  # a child of it may keep the connection open

    def _let_go(self, mapping: Mapping) -> None:
        """The worker cannot touch the memory any more."""
        if mapping.gone:
            return
        mapping.gone = True
        self._unwatch(mapping.watch)
        del self._mappings[mapping.worker]
        self._left.add(mapping.worker)
        for session in list(self.sessions.values()):
            self._settle_session(session)

    def _unwatch(self, watch: int) -> None:
        self._poll.unregister(watch)
        del self._watched[watch]
        os.close(watch)

    # Schedulers

    def _attach(self, connection: _Connection, message: wire.Attach) -> None:
        self._check_attach(message)
        name = DomainName(message.namespace, message.rank_bytes, tuple(message.ranks), message.element)
        if name in self.domains:
            self._welcome(connection, message, self.domains[name])
            return
        connection.waits = message
        opening = self._opening.get(name)
        if opening is None:
            places = Places(self._extents, [message.rank_bytes] * len(message.ranks))
            opening = self._opening[name] = _Opening(
                self._openers.submit(self._open, self._next_config(), name, places)
            )
            opening.domain.add_done_callback(lambda _: self.wake())
        opening.waiting.append(connection)

    def _check_attach(self, message: wire.Attach) -> None:
        """Raises NodeError or ConfigError."""
        asked = self._config.chunk_tokens
        if asked is not None and message.namespace.chunk_tokens != asked:
            raise ConfigError(
                f"the engine has chunks of {message.namespace.chunk_tokens} tokens, the node of {asked}: give both the same "
                "chunk_tokens"
            )
        if message.namespace.chunk_tokens < 1:
            raise NodeError("chunks of no tokens")
        if len(message.workers) != len(message.ranks) or len(set(message.ranks)) != len(message.ranks):
            raise NodeError("not one worker for each rank")
        for worker, rank in zip(message.workers, message.ranks, strict=True):
            mapping = self._mappings.get(worker)
            if mapping is None or not mapping.taken or mapping.rank != rank:
                raise NodeError(f"the worker of rank {rank} has not mapped the memory of this node")

    def _next_config(self) -> CacheConfig:
        """The settings of one more namespace; each has a lookup trace of its own: trace.jsonl, trace.ns1.jsonl and so on."""
        record, number = self._config.record, self._num_openings
        self._num_openings += 1
        if record is not None and number:
            record = record.with_name(f"{record.stem}.ns{number}{record.suffix}")
        return self._config.model_copy(update={"record": record})

    def _open(self, config: CacheConfig, name: DomainName, places: Places) -> Domain:
        """On a thread of its own."""
        opened = [open_rank(config, name, rank, places.most_slots) for rank in name.ranks]
        return Domain(config, name, self._memory, places, opened, self._clock, self.wake)

    def _opened(self, name: DomainName, opening: _Opening) -> None:
        error = ""
        domain = None
        try:
            self.domains[name] = domain = opening.domain.result()
        except (LmcError, OSError) as failure:
            error = _text(failure)
        for connection in opening.waiting:
            if connection.waits is None:
                continue  # it has gone
            message, connection.waits = connection.waits, None
            try:
                if domain is None:
                    raise NodeError(error)
                self._check_attach(message)
                self._welcome(connection, message, domain)
            except LmcError as failure:
                logger.warning("lmc: node: engine %s was refused: %s", message.engine, _text(failure))
                _tell_refusal(connection.channel, _text(failure))
                self._drop(connection)

    def _welcome(self, connection: _Connection, message: wire.Attach, domain: Domain) -> None:
        mappings = [self._mappings[worker] for worker in message.workers]
        connection.watch = connection.peer.watch()
        self._watched[connection.watch] = connection
        self._poll.register(connection.watch, select.EPOLLIN)
        self._last_session += 1
        session = Session(self._last_session, domain, message, mappings)
        self.sessions[session.number] = connection.session = session
        domain.num_engines += 1
        if message.announces:
            domain.directory.changes.watch()
        figures = domain.figures()
        connection.channel.put(wire.Attached(self.number, session.number, self.metrics_url, figures))
        logger.info("lmc: node: engine %s is attached to namespace %s", session.engine, domain.name.label())

    def _batch(self, connection: _Connection, session: Session, batch: wire.Batch) -> None:
        now = self._clock()
        answers = session.handle(batch.events, now)
        for event in batch.events:
            if isinstance(event, wire.Quiet):
                self._is_quiet(session, event.session)
        if session.domain.directory.changes.watched:
            self._note_changes(session.domain)
        if batch.number:
            figures = None
            if now - connection.told >= _FIGURES_SECONDS:
                connection.told, figures = now, session.domain.figures()
            connection.channel.put(wire.Answers(batch.number, answers, figures, *session.take_changes()))
        session.domain.dispatch()

    def _note_changes(self, domain: Domain) -> None:
        """Leave what changed for the engines that announce it; they hear of it with their next answer, or in the next tick."""
        changes = domain.directory.changes.take()
        if changes:
            for session in self.sessions.values():
                if session.domain is domain and session.terms.announces and not session.ended:
                    session.note(changes)

    def _tell_changes(self) -> None:
        for connection in list(self._connections.values()):
            session = connection.session
            if session is not None and (session.changes or session.forget) and not connection.channel.waiting:
                try:
                    connection.channel.put(wire.Answers(0, [], None, *session.take_changes()))
                except NodeError:
                    self._drop(connection)

    def _is_quiet(self, session: Session, earlier: int) -> None:
        old = self.sessions.get(earlier)
        if old is None:
            return
        if not old.ended or set(old.mappings) != set(session.mappings):
            raise NodeError(f"session {earlier} is not this engine's to end")
        old.settle(self._clock())
        del self.sessions[earlier]

    def _leave(self, session: Session) -> None:
        session.leave(self._clock())
        session.domain.num_engines -= 1
        logger.info("lmc: node: engine %s has gone", session.engine)
        self._settle_session(session)

    def _settle_session(self, session: Session) -> None:
        """Forget a session that has ended, once nothing can touch a slot for it."""
        if session.ended and (session.fenced or not session.num_open):
            session.settle(self._clock())
            session.domain.dispatch()
            self.sessions.pop(session.number, None)

    # Now and then

    def _settle(self) -> None:
        while self.mail:
            self.mail.popleft()()
        for name, opening in list(self._opening.items()):
            if opening.domain.done():
                del self._opening[name]
                self._opened(name, opening)
        for domain in self.domains.values():
            domain.settle()

    def _tick(self, now: float) -> None:
        if not self._accepting:
            self._accepting = True
            self._poll.modify(self._listener, select.EPOLLIN)
        self._settle()
        for domain in self.domains.values():
            domain.tick(now)
            if domain.directory.changes.watched:
                self._note_changes(domain)
        self._tell_changes()
        if len(self.domains) > 1:
            share_out(self._extents, self.domains.values(), now)
        for connection in list(self._connections.values()):
            if connection.until is not None and now > connection.until:
                self._drop(connection)


def _tell_refusal(channel: Channel, reason: str) -> None:
    with suppress(NodeError):
        channel.put(wire.Refused(reason[:4000]))


def _text(error: BaseException) -> str:
    return str(error).removeprefix("node: ")
