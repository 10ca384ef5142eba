"""Asks the tiers that others write to (Redis, S3, a shared folder) which chunks they hold, on threads of the scheduler's process.

A request asks once, for the chunks that the directory doesn't know, and comes back until the answer is there or its deadline has passed.
What answers late still serves the next request. A chunk is there when every rank's part of it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from lmc.cache.directory.remote import leading
from lmc.cache.keys import ChunkKey
from lmc.cache.observe.logs import Sparingly
from lmc.cache.plan import CRASH, ERROR, UNAVAILABLE
from lmc.cache.tiers.base import Tier
from lmc.cache.tiers.breaker import TierOpen
from lmc.errors import TierError

logger = logging.getLogger(__name__)

_THREADS = 2  # per tier
_WAITING = 64  # questions per tier that may wait for a thread


class Answer(NamedTuple):
    tier: str
    keys: Sequence[ChunkKey]
    present: Sequence[bool]
    seconds: float
    failure: str = ""  # why the tier could not be asked, one of plan.CAUSES; keys is empty


@dataclass
class Question:
    keys: tuple[ChunkKey, ...]
    open: int = 0  # tiers that have not answered
    failed: bool = False  # some tier could not be asked, so what is not known may be there
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def done(self) -> bool:
        return self.open == 0

    def answered(self) -> None:
        with self._lock:
            self.open -= 1


class Presence:
    """tiers: for each name the tiers of all ranks."""

    def __init__(self, tiers: Mapping[str, Sequence[Tier]]) -> None:
        self._tiers = dict(tiers)
        self._pools = {name: ThreadPoolExecutor(_THREADS, thread_name_prefix=f"lmc-ask-{name}") for name in tiers}
        self._asking: dict[str, set[Future[None]]] = {name: set() for name in tiers}
        self._answers: deque[Answer] = deque()
        self._sparingly = Sparingly()

    def ask(self, keys: Sequence[ChunkKey]) -> Question:
        """Keys are consecutive chunks of a prefix. Returns at once; a tier that has too much to do is not asked."""
        question = Question(tuple(keys))
        asked = [name for name, asking in self._asking.items() if len(asking) < _WAITING]
        question.open = len(asked)
        question.failed = len(asked) < len(self._tiers)
        for name in asked:
            asking = self._pools[name].submit(self._ask, name, question)
            self._asking[name].add(asking)
            asking.add_done_callback(partial(self._on_end, name))
        return question

    def answers(self) -> list[Answer]:
        """What came in since the last call."""
        found = []
        while self._answers:
            found.append(self._answers.popleft())
        return found

    def close(self, timeout: float) -> None:
        """Let calls under way end within timeout seconds, then release connections."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        _, late = wait([asking for of_tier in self._asking.values() for asking in list(of_tier)], timeout)
        if late:
            return  # a thread still uses its connection; the tier's own time-out ends it
        for ranks in self._tiers.values():
            for tier in ranks:
                tier.close()

    def _ask(self, name: str, question: Question) -> None:
        started = time.perf_counter()
        keys: Sequence[ChunkKey] = ()
        present: list[bool] = []
        failure = CRASH
        try:
            keys, present = leading(question.keys, partial(self._contains, name))
            failure = ""
        except TierOpen:
            failure = UNAVAILABLE  # the breaker has said so when it opened
        except TierError as error:
            failure = ERROR
            self._sparingly.warn(logger, name, str(error), operation="ask", tier=name, cause=ERROR)
        finally:
            question.failed = question.failed or bool(failure)
            self._answers.append(Answer(name, keys, present, time.perf_counter() - started, failure))
            question.answered()

    def _contains(self, name: str, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which chunks are there: every rank's part of them."""
        by_rank = [tier.contains(keys) for tier in self._tiers[name]]
        return [all(ranks) for ranks in zip(*by_rank, strict=True)]

    def _on_end(self, name: str, asked: Future[None]) -> None:
        """Name a fault in lmc itself; the question has been answered without it."""
        self._asking[name].discard(asked)
        error = None if asked.cancelled() else asked.exception()
        if error is not None:
            logger.error("lmc: asking the %s tier for chunks crashed", name, exc_info=error)
