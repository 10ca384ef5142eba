"""Copies between SGLang's pages and host slots, each direction on a thread of its own.

Loads go layer by layer, so that the forward pass of the first layer needn't wait for the last. Stores report in the order in which they
were accepted, as SGLang wants it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from lmc.cache.plan import Plan, Report, RequestCopies, operations_of
from lmc.cache.worker.block_copies import start_thread
from lmc.cache.worker.worker import CacheWorker
from lmc.errors import TransferError

logger = logging.getLogger(__name__)


@dataclass
class _Store:
    open: set[int]  # operations under way
    complete: bool  # False: something was left out, or failed


class Copies:
    """ready arguments are device events that must have happened before a page is touched."""

    def __init__(self, worker: CacheWorker, counter: Any) -> None:  # sglang's LayerWiseLoadCounter
        self._worker = worker
        self._counter = counter
        own = worker.copier.own_thread
        self._loader = start_thread("lmc-load", own)
        self._storer = start_thread("lmc-store", own)
        self._loads: dict[int, Future[None]] = {}
        self._stores: deque[_Store] = deque()

    def start_load(self, index: int, plans: Sequence[Plan], ready: Sequence[Any]) -> None:
        """The counter's batch `index` says layer by layer what has arrived. plans: kept ones; they are released."""
        requests = [request for plan in plans for request in plan.loads]
        done = self._loader.submit(self._load, index, requests, ready)
        operations = operations_of(requests)
        done.add_done_callback(partial(self._on_crash, operations))
        done.add_done_callback(lambda _: self._release(len(plans)))
        self._loads[index] = done

    def finish_load(self, index: int) -> bool:
        """Wait until nothing writes to the pages of this batch any more. True if all of it arrived."""
        landed = bool(self._counter.finish(index))
        future = self._loads.pop(index, None)
        if future is not None:
            future.exception()  # waits
        return landed

    def start_store(self, plan: Plan, complete: bool, ready: Sequence[Any]) -> None:
        """Accept a plan of stores; without any it has ended already."""
        operations = set(operations_of(plan.stores))
        self._stores.append(_Store(operations, complete))
        if operations:
            done = self._storer.submit(self._store, plan, ready)
            done.add_done_callback(partial(self._on_crash, sorted(operations)))

    def learn(self, report: Report) -> None:
        """What the worker reported: mark the stores that it ends."""
        if not report.finished:
            return
        for store in self._stores:
            ended = store.open & report.finished.keys()
            store.open -= ended
            store.complete = store.complete and not ended & report.failed.keys()

    @property
    def num_stores_ended(self) -> int:
        """Ended stores before the first that is still under way."""
        for index, store in enumerate(self._stores):
            if store.open:
                return index
        return len(self._stores)

    def pop_store(self) -> bool:
        """The oldest store, which has ended: True if every page of it is kept."""
        return self._stores.popleft().complete

    def give_up(self) -> None:
        """The cache is gone: no page is read or written any more when this returns, and stores count as failed."""
        try:
            self._wait()
        finally:
            for store in self._stores:
                store.open.clear()
                store.complete = False

    def quiesce(self) -> None:
        """Wait until no page is read or written, and forget the stores' results."""
        self._wait()
        self._stores.clear()
        self._loads.clear()

    def _wait(self) -> None:
        for pool in (self._loader, self._storer):
            pool.submit(int).result()
        self._worker.copier.drain()  # the threads have only queued what a device copies

    def close(self) -> None:
        self._loader.shutdown()
        self._storer.shutdown()

    def _load(self, index: int, requests: Sequence[RequestCopies], ready: Sequence[Any]) -> None:
        landed = False
        try:
            for event in ready:
                event.synchronize()
            landed = self._worker.copier.load_each_layer(requests, partial(self._counter.complete, index))
        finally:
            if not landed:
                self._counter.fail(index, TransferError("a load failed"))  # else the forward pass would wait for ever

    def _store(self, plan: Plan, ready: Sequence[Any]) -> None:
        for event in ready:
            event.synchronize()
        self._worker.end(plan)

    def _release(self, number: int) -> None:
        for _ in range(number):
            self._worker.release()

    def _on_crash(self, operations: Sequence[int], future: Future[None]) -> None:
        """A fault in lmc itself: no chunk may stay busy for ever, and no page locked."""
        error = None if future.cancelled() else future.exception()
        if error is not None:
            logger.error("lmc: a copy of %d chunks crashed", len(operations), exc_info=error)
            self._worker.give_up(operations)
