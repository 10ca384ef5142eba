"""Asks the tiers that others write to (Redis, S3, a shared folder) which chunks they hold, on threads of the scheduler's process.

A request asks once, for the chunks that the directory does not know, and comes back until the answer is there or its deadline has passed.
A late answer still serves the next request. A chunk counts as stored when every rank's part of it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from lmc.cache.directory.remote import leading
from lmc.cache.keys import ChunkKey
from lmc.cache.observe.logs import Sparingly
from lmc.cache.plan import CRASH, ERROR, UNAVAILABLE
from lmc.cache.tiers.breaker import Breaker, TierOpen
from lmc.cache.tiers.threads import IoThreads
from lmc.errors import TierError

logger = logging.getLogger(__name__)

_THREADS = 2  # per tier
_WAITING = 64  # questions per tier that may wait for a thread


class Answer(NamedTuple):
    tier: str
    keys: Sequence[ChunkKey]
    present: Sequence[bool]
    seconds: float
    failure: str = ""  # failure cause (one of plan.CAUSES) if the tier did not answer; keys is then empty


@dataclass
class Question:
    keys: tuple[ChunkKey, ...]
    every: bool = False  # else those behind the first absent one don't matter
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

    def __init__(self, tiers: Mapping[str, Sequence[Breaker]]) -> None:
        self._tiers = dict(tiers)
        self._threads = {name: IoThreads(_THREADS, f"lmc-ask-{name}", partial(self._ask, name)) for name in tiers}
        self._answers: deque[Answer] = deque()
        self._sparingly = Sparingly()

    def ask(self, keys: Sequence[ChunkKey], *, every: bool = False) -> Question:
        """Keys are consecutive chunks of a prefix, unless every one counts. Returns at once. A tier that has too much to do, or is left
        alone, is not asked."""
        question = Question(tuple(keys), every, open=len(self._tiers))
        for name, threads in self._threads.items():
            if any(tier.refuses("read") for tier in self._tiers[name]):
                for waiting in (question, *threads.take_back(lambda _: True)):  # behind a call that hangs
                    self._answer(name, waiting, UNAVAILABLE)
            elif threads.num_jobs >= _WAITING or not threads.put(question):
                question.failed = True
                question.answered()
        return question

    def answers(self) -> list[Answer]:
        """The answers that arrived since the last call."""
        found = []
        while self._answers:
            found.append(self._answers.popleft())
        return found

    def close(self, timeout: float) -> None:
        """Let calls under way end within timeout seconds, then release connections."""
        until = time.monotonic() + timeout
        for name, threads in self._threads.items():
            threads.close()
            if threads.wait(max(until - time.monotonic(), 0.0)):
                for tier in self._tiers[name]:
                    tier.close()  # else a thread still uses its connection; it ends with the tier's own time-out, or with the process

    def _ask(self, name: str, question: Question) -> None:
        started = time.perf_counter()
        keys: Sequence[ChunkKey] = ()
        present: list[bool] = []
        failure = CRASH
        try:
            if question.every:
                keys, present = question.keys, self._contains(name, question.keys)
            else:
                keys, present = leading(question.keys, partial(self._contains, name))
            failure = ""
        except TierOpen:
            failure = UNAVAILABLE  # the breaker has said so when it opened
        except TierError as error:
            failure = ERROR
            self._sparingly.warn(logger, name, str(error), operation="ask", tier=name, cause=ERROR)
        except (Exception, SystemExit) as error:  # a fault in lmc, or a library that ends its thread
            logger.error("lmc: asking the %s tier for chunks crashed", name, exc_info=error)
        self._answer(name, question, failure, keys, present, time.perf_counter() - started)

    def _answer(
        self,
        name: str,
        question: Question,
        failure: str,
        keys: Sequence[ChunkKey] = (),
        present: Sequence[bool] = (),
        seconds: float = 0.0,
    ) -> None:
        question.failed = question.failed or bool(failure)
        self._answers.append(Answer(name, keys, present, seconds, failure))
        question.answered()

    def _contains(self, name: str, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which chunks are there: every rank's part of them."""
        by_rank = [tier.contains(keys) for tier in self._tiers[name]]
        return [all(ranks) for ranks in zip(*by_rank, strict=True)]
