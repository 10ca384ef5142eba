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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.base import Tier
from lmc.errors import TierError

logger = logging.getLogger(__name__)

_THREADS = 2  # per tier
_WAITING = 64  # questions per tier that may wait for a thread
_FIRST_BATCH = 16  # keys; most prompts end early or are all there


class Answer(NamedTuple):
    tier: str
    keys: Sequence[ChunkKey]
    present: Sequence[bool]
    seconds: float
    failure: str = ""  # the tier could not be asked; keys is empty


@dataclass
class Question:
    keys: tuple[ChunkKey, ...]
    open: int = 0  # tiers that have not answered
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
        self._waiting = dict.fromkeys(tiers, 0)
        self._lock = threading.Lock()  # guards _waiting
        self._answers: deque[Answer] = deque()

    def ask(self, keys: Sequence[ChunkKey]) -> Question:
        """Keys are consecutive chunks of a prefix. Returns at once; a tier that has too much to do is not asked."""
        question = Question(tuple(keys))
        asked = []
        for name in self._tiers:
            with self._lock:
                if self._waiting[name] < _WAITING:
                    self._waiting[name] += 1
                    asked.append(name)
        question.open = len(asked)
        for name in asked:
            self._pools[name].submit(self._ask, name, question).add_done_callback(_complain)
        return question

    def answers(self) -> list[Answer]:
        """What came in since the last call."""
        found = []
        while self._answers:
            found.append(self._answers.popleft())
        return found

    def close(self) -> None:
        """Calls under way end with their own time-outs, on their own."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        for ranks in self._tiers.values():
            for tier in ranks:
                tier.close()

    def _ask(self, name: str, question: Question) -> None:
        started = time.perf_counter()
        keys: tuple[ChunkKey, ...] = ()
        present: list[bool] = []
        failure = "a fault in lmc"
        try:
            present = self._leading(name, question.keys)
            keys, failure = question.keys[: len(present)], ""
        except TierError as error:
            failure = str(error)
            logger.debug("lmc: %s", error)
        finally:
            with self._lock:
                self._waiting[name] -= 1
            self._answers.append(Answer(name, keys, present, time.perf_counter() - started, failure))
            question.answered()

    def _leading(self, name: str, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of the first keys are there, in growing batches up to one with an absent key."""
        present: list[bool] = []
        size = _FIRST_BATCH
        while len(present) < len(keys):
            batch = keys[len(present) : len(present) + size]
            by_rank = [tier.contains(batch) for tier in self._tiers[name]]
            present += [all(ranks) for ranks in zip(*by_rank, strict=True)]
            if not all(present):
                break
            size *= 4
        return present


def _complain(asked: Future[None]) -> None:
    """Name a fault in lmc itself; the question has been answered without it."""
    error = None if asked.cancelled() else asked.exception()
    if error is not None:
        logger.error("lmc: asking a tier for chunks crashed", exc_info=error)
