"""Threads that make the calls to one tier, in the order of their jobs.

Unlike a ThreadPoolExecutor's they never keep a process from its end, although a call may hang for ever; what waits behind a call that hangs
can be taken back; and a machine that has no thread to give is an answer, not an exception.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Job = TypeVar("Job")


class IoThreads(Generic[Job]):
    """Runs work(job) on up to num_threads threads, which begin() first. work must not raise."""

    def __init__(
        self, num_threads: int, name: str, work: Callable[[Job], None], begin: Callable[[], None] = lambda: None
    ) -> None:
        self._num_threads = num_threads
        self._name = name
        self._work = work
        self._begin = begin
        self._lock = threading.Lock()
        self._job = threading.Condition(self._lock)  # there is one, or there will be no more
        self._done = threading.Condition(self._lock)
        self._waiting: deque[Job] = deque()
        self._running: dict[threading.Thread, tuple[Job, float]] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def put(self, job: Job) -> bool:
        """Queue a job; False when no thread could be started that would ever run it."""
        with self._lock:
            if self._closed:
                return False
            self._waiting.append(job)
            if len(self._running) + len(self._waiting) > len(self._threads) < self._num_threads:
                self._start()
            if not self._threads:
                self._waiting.pop()
                return False
            self._job.notify()
            return True

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    @property
    def num_jobs(self) -> int:
        """Under way or waiting."""
        with self._lock:
            return len(self._running) + len(self._waiting)

    def running(self) -> list[tuple[Job, float]]:
        """The jobs under way, and for how many seconds each has been."""
        now = time.monotonic()
        with self._lock:
            return [(job, now - started) for job, started in self._running.values()]

    def saturated_by(self, jobs: int) -> bool:
        """Whether so many jobs that never end leave no thread for others."""
        return jobs >= self._num_threads

    def take_back(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Remove the jobs that were not begun and are wanted back."""
        with self._lock:
            taken = [job for job in self._waiting if wanted(job)]
            if taken:
                left = [job for job in self._waiting if not wanted(job)]
                self._waiting.clear()
                self._waiting.extend(left)
            return taken

    def wait(self, timeout: float) -> bool:
        """Until all jobs are done; False when they were not in time."""
        with self._lock:
            return self._done.wait_for(lambda: self.idle, timeout)

    def close(self) -> list[Job]:
        """Begin no further job; returns those that were not begun. Threads end with the job that they run."""
        with self._lock:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._job.notify_all()
            return left

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # the limit of processes is reached; the next job tries again
            self._threads.discard(thread)

    def _run(self) -> None:
        try:
            self._begin()
        except Exception:  # whatever it was to do for the thread, jobs can do without
            logger.exception("lmc: %s cannot be set up", self._name)
        this = threading.current_thread()
        while True:
            with self._lock:
                self._job.wait_for(lambda: bool(self._waiting) or self._closed)
                if not self._waiting:
                    self._threads.discard(this)
                    return
                job = self._waiting.popleft()
                self._running[this] = (job, time.monotonic())
            try:
                self._work(job)
            except Exception:  # a fault in lmc; the thread is there for other jobs
                logger.exception("lmc: %s: a job crashed", self._name)
            finally:
                with self._lock:
                    del self._running[this]
                    self._done.notify_all()
