"""Threads that no hanging call keeps from ending, and that a machine may refuse."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from lmc.cache.tiers.threads import IoThreads
from tests.services import wait_until


def test_jobs_are_begun_in_their_order() -> None:
    done: list[int] = []
    threads = IoThreads(1, "test", done.append)
    assert all(threads.put(number) for number in range(50))
    assert threads.wait(60)
    assert done == list(range(50))
    assert threads.close() == []


def test_what_waits_behind_a_job_that_hangs_can_be_taken_back() -> None:
    gate = threading.Event()
    threads = IoThreads[int](2, "test", lambda _: gate.wait(20) and None)
    for number in range(6):
        assert threads.put(number)
    wait_until(lambda: len(threads.running()) == 2, "two jobs under way")
    assert {job for job, _ in threads.running()} == {0, 1}
    assert threads.take_back(lambda job: job % 2 == 0) == [2, 4]
    assert threads.take_back(lambda _: True) == [3, 5]
    assert not threads.wait(0)
    gate.set()
    assert threads.wait(60)


def test_a_machine_without_a_thread_to_give_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected: a real limit of processes would take the other tests' threads, too."""
    done: list[int] = []
    threads = IoThreads(2, "test", done.append)

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert not threads.put(1)
    assert threads.put(2), "it is tried again"
    assert threads.wait(60)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert threads.put(3), "the one thread that there is does all the work"
    assert threads.wait(60)
    assert done == [2, 3]


def test_a_job_that_hangs_does_not_keep_the_process_from_its_end() -> None:
    script = (
        "import threading, time; from lmc.cache.tiers.threads import IoThreads; started = threading.Event();"
        "threads = IoThreads(1, 'test', lambda _: (started.set(), time.sleep(600))); threads.put(1);"
        "started.wait(); print('over')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


def test_no_job_is_begun_after_the_end() -> None:
    gate, done = threading.Event(), []

    def work(job: int) -> None:
        gate.wait(20)
        done.append(job)

    threads = IoThreads(1, "test", work)
    for number in range(3):
        threads.put(number)
    wait_until(lambda: len(threads.running()) == 1, "the first job")
    assert threads.close() == [1, 2]
    assert not threads.put(3)
    gate.set()
    assert threads.wait(60)
    assert done == [0]


def test_a_job_that_crashes_leaves_its_thread_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def work(job: int) -> None:
        if job == 0:
            raise MemoryError("injected")
        done.append(job)

    def begin() -> None:
        raise ValueError("injected")

    threads = IoThreads(1, "test", work, begin)
    assert all(threads.put(job) for job in range(3))
    assert threads.wait(10)
    threads.close()
    assert done == [1, 2]
    assert "test cannot be set up" in caplog.text and "test: a job crashed" in caplog.text
