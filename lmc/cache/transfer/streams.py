"""Orders copies: one store and one load stream run beside the engine's compute stream, so that no byte is read too early or too late.

Every transfer waits for all that the compute stream had been given when it was submitted, in both directions: a store must not read a block
before the step has written it, and a load must not write a block that the step may still read. A transfer also waits for a pending
transfer of the other stream that touches the same bytes, so a slot may be reused and a block reallocated in any order. The caller cannot
leave these waits out. What it must do is release blocks and slots only when finished() returns the transfer.

The engine's thread calls; a runtime says what a stream is (CUDA's, or a thread).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.planner import Addresses, Descriptors, Direction
from lmc.errors import TransferError


class Event(Protocol):
    def query(self) -> bool:
        """Whether everything before the event is done."""

    def synchronize(self) -> None:
        """Wait until everything before the event is done."""

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between two events of one stream that are both done."""


class Stream(Protocol):
    def run(self, queue_copies: Callable[[int], None]) -> None:
        """Call with the stream's handle: now on CUDA, where it queues work; in the order of the stream on a thread. It must not raise."""

    def record(self) -> Event:
        """Marks the end of what the stream was given so far."""

    def wait_for(self, event: Event) -> None:
        """What comes later on this stream starts after the event."""


class Runtime(Protocol):
    def new_stream(self) -> Stream: ...

    def compute_stream(self) -> Stream:
        """The stream that the calling thread gives the model's kernels to."""

    def own_thread(self) -> None:
        """The calling thread is lmc's: from now on what it does is no part of a CUDA graph that the engine captures at the same time."""


@dataclass(eq=False)
class Transfer:
    """One submitted batch of copies."""

    descriptors: Descriptors
    tag: object  # the caller's: what to release when it is finished
    started: Event
    layers: list[Event] = field(default_factory=list)  # the end of each part
    error: TransferError | None = None  # final when it is finished

    @property
    def ended(self) -> Event:
        return self.layers[-1]

    @property
    def seconds(self) -> float:
        """Seconds on the stream, for the rate. The transfer must be finished."""
        return self.ended.seconds_since(self.started)


class TransferStreams:
    def __init__(self, runtime: Runtime, backend: Backend) -> None:
        self._runtime = runtime
        self._backend = backend
        self._streams = {direction: runtime.new_stream() for direction in Direction}
        self._pending: dict[Direction, deque[Transfer]] = {direction: deque() for direction in Direction}

    def own_thread(self) -> None:
        """Of a thread of lmc's that submits, before anything else."""
        self._runtime.own_thread()

    def submit(self, descriptors: Descriptors, tag: object = None) -> Transfer:
        """Queue a store or a load behind the steps that the engine has launched so far."""
        return self._submit([descriptors], descriptors, tag)

    def submit_layers(self, layers: Sequence[Descriptors], tag: object = None) -> Transfer:
        """Queue a load whose parts (of plan(..., layers=)) the engine waits for one by one with wait_layer."""
        if not layers or any(part.direction is not Direction.LOAD for part in layers):
            raise TransferError("only loads can be waited for layer by layer")
        return self._submit(layers, _joined(layers), tag)

    def wait_layer(self, transfer: Transfer, layer: int) -> None:
        """Kernels launched from now on run after this part of the load. The host does not wait."""
        self._runtime.compute_stream().wait_for(transfer.layers[layer])

    def wait(self, transfer: Transfer) -> None:
        """Kernels launched from now on run after the transfer. The host does not wait."""
        self._runtime.compute_stream().wait_for(transfer.ended)

    def pending(self, direction: Direction) -> list[Transfer]:
        """Those that finished() has not returned yet, oldest first; each ends before the next."""
        return list(self._pending[direction])

    def finished(self) -> list[Transfer]:
        """Transfers that ended since the last call. Their blocks and slots may be released, and their `error` is final."""
        done: list[Transfer] = []
        for pending in self._pending.values():
            while pending and pending[0].ended.query():
                done.append(pending.popleft())
        return done

    def drain(self) -> list[Transfer]:
        """Wait until no copy is under way: before memory goes away, or is given to somebody who asks for no fence."""
        for stream in self._streams.values():
            stream.record().synchronize()
        return self.finished()

    def _submit(self, parts: Sequence[Descriptors], whole: Descriptors, tag: object) -> Transfer:
        stream = self._streams[whole.direction]
        stream.wait_for(self._runtime.compute_stream().record())
        other = Direction.LOAD if whole.direction is Direction.STORE else Direction.STORE
        for pending in self._pending[other]:
            if pending.ended.query() or not _conflict(whole, pending.descriptors):
                continue
            if whole.direction is Direction.LOAD and _reads(whole, pending.descriptors):
                pending.ended.synchronize()  # the copy engine may read slots before the stream's waits are over
            else:
                stream.wait_for(pending.ended)
        transfer = Transfer(whole, tag, started=stream.record())
        for part in parts:
            stream.run(partial(self._copy, transfer, part))
            transfer.layers.append(stream.record())
        self._pending[whole.direction].append(transfer)
        return transfer

    def _copy(self, transfer: Transfer, part: Descriptors, handle: int) -> None:
        if transfer.error is not None:
            return
        try:
            self._backend.execute(part, handle)
        except TransferError as error:
            transfer.error = error


def _joined(parts: Sequence[Descriptors]) -> Descriptors:
    return Descriptors(
        np.concatenate([part.src for part in parts]),
        np.concatenate([part.dst for part in parts]),
        np.concatenate([part.size for part in parts]),
        parts[0].direction,
    )


def _conflict(one: Descriptors, other: Descriptors) -> bool:
    """Whether one of them writes what the other reads or writes."""
    return _reads(one, other) or _reads(other, one) or _overlap(one.dst, one.size, other.dst, other.size)


def _reads(one: Descriptors, other: Descriptors) -> bool:
    """Whether the first reads what the second writes."""
    return _overlap(one.src, one.size, other.dst, other.size)


def _overlap(starts: Addresses, sizes: Addresses, other_starts: Addresses, other_sizes: Addresses) -> bool:
    """Whether a range of the first set shares a byte with one of the second: O((n + m) log m)."""
    if len(starts) == 0 or len(other_starts) == 0:
        return False
    order = np.argsort(other_starts)
    begins = other_starts[order]
    furthest = np.maximum.accumulate(begins + other_sizes[order])  # sources may overlap each other
    before = np.searchsorted(begins, starts + sizes, side="left")  # how many begin before a range ends
    reach = furthest[np.maximum(before, 1) - 1]
    return bool(((before > 0) & (reach > starts)).any())
