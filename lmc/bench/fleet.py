"""Sends a load from several client processes, for loads that one event loop on one core cannot send.

Each process gets whole sessions (of a closed loop: whole units) with their absolute times, which count from one start on the machine's
monotonic clock. The measurements are merged into the result that one process would have returned. Outcomes arrive while the load runs.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import numpy as np
import uvloop

from lmc.bench.client import Outcome, Target
from lmc.bench.load import Measured, OnDone, run_load
from lmc.bench.prompts import Request
from lmc.bench.schedule import Plan, share_out
from lmc.errors import RunError

REQUESTS_PER_S = 750.0  # of one process: half of the rate that benchmarks/bench_client.py demands of a core
TOKENS_PER_S = 20_000.0
CONNECTIONS = 512
START_AFTER_S = 0.2  # so that every process is waiting when the load begins
FLUSH_S = 0.05
STOP = b"stop"
_UNSENT = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Job:
    """The work of one process. `indexes` are the places of its requests in the whole plan."""

    plan: Plan
    indexes: list[int]
    targets: list[Target]
    label: str
    seconds: float | None


def processes_for(plan: Plan) -> int:
    """The number of processes that a load needs, by its rate if it has one, else by its concurrency; at most the number of cores."""
    if plan.requested_rate is None:
        need = (plan.concurrency or 1) / CONNECTIONS
    else:
        tokens = sum(item.request.output_tokens for item in plan.items) / len(plan.items)
        need = plan.requested_rate * max(1 / REQUESTS_PER_S, tokens / TOKENS_PER_S)
    return min(max(1, math.ceil(need)), len(os.sched_getaffinity(0)), len(plan.items))


async def run_in_processes(
    plan: Plan,
    targets: Sequence[Target],
    label: str,
    on_done: OnDone,
    seconds: float | None = None,
    offset_s: float = 0.0,
    processes: int = 2,
) -> Measured:
    """Like run_load(). Raises RunError if a process ends before its load does."""
    shares = share_out(plan, processes)
    arrived: asyncio.Queue[tuple[int, object]] = asyncio.Queue()
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    workers: list[SpawnProcess] = []
    listeners: list[threading.Thread] = []
    loop = asyncio.get_running_loop()

    def put(number: int, message: object) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, (number, message))

    try:
        for number, (share, indexes) in enumerate(shares):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()
            pipes.append(ours)
            workers.append(worker)
            listeners.append(threading.Thread(target=_listen, args=(number, ours, put), daemon=True))
            listeners[-1].start()
            ours.send(Job(share, indexes, list(targets), label, seconds))
        return await _collect(plan, pipes, arrived, on_done, offset_s)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        for listener in listeners:
            listener.join()
        for pipe in pipes:
            pipe.close()


async def _collect(
    plan: Plan,
    pipes: Sequence[Connection],
    arrived: asyncio.Queue[tuple[int, object]],
    on_done: OnDone,
    offset_s: float,
) -> Measured:
    outcomes: list[Outcome | None] = [None] * len(plan.items)
    ready = 0
    ended: list[Measured] = []
    start = 0.0
    while len(ended) < len(pipes):
        number, message = await arrived.get()
        if message is None:
            raise RunError(f"client process {number} ended before its load did; see its error above")
        if isinstance(message, Measured):
            ended.append(message)
        elif isinstance(message, list):
            for index, outcome in message:
                outcome.request = plan.items[index].request
                outcomes[index] = outcome
                if not await on_done(outcome):
                    _tell(pipes, STOP)
        else:
            ready += 1
            if ready == len(pipes):
                start = time.perf_counter() + START_AFTER_S
                _tell(pipes, start)
    sent = [outcome for outcome in outcomes if outcome is not None]
    for outcome in sent:
        outcome.shift(offset_s - start)
    return Measured(
        sent,
        max(part.wall_s for part in ended),
        max(part.sending_s for part in ended),
        sum(part.cpu_s for part in ended),
        [lag for part in ended for lag in part.loop_lags_s],
        plan.requested_rate,
        start - offset_s,
        len(ended),
    )


def _tell(pipes: Sequence[Connection], message: object) -> None:
    for pipe in pipes:
        try:
            pipe.send(message)
        except OSError:
            continue  # it has ended; its listener says so


def _listen(number: int, pipe: Connection, put: Callable[[int, object], None]) -> None:
    """Runs on a thread of its own: passes on the messages of a process, and None if it ends before it has sent its Measured."""
    try:
        while True:
            message = pipe.recv()
            put(number, message)
            if isinstance(message, Measured):
                return
    except (EOFError, OSError):
        put(number, None)


def _work(pipe: Connection) -> None:
    """The whole life of a client process."""
    job: Job = pipe.recv()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_send(pipe, job))


async def _send(pipe: Connection, job: Job) -> None:
    places = {item.request.id: index for item, index in zip(job.plan.items, job.indexes, strict=True)}
    waiting: list[tuple[int, Outcome]] = []
    stopped = False

    async def on_done(outcome: Outcome) -> bool:
        index = places[outcome.request.id]
        waiting.append((index, replace(outcome, request=_without_prompt(outcome.request))))
        return not stopped

    def flush() -> None:
        if waiting:
            pipe.send(waiting)
            waiting.clear()

    async def flush_often() -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            flush()

    def on_message() -> None:
        nonlocal stopped
        stopped |= pipe.recv() == STOP

    pipe.send("ready")
    start = await asyncio.to_thread(pipe.recv)
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), on_message)
    flusher = asyncio.create_task(flush_often())
    measured = await run_load(job.plan, job.targets, job.label, on_done, job.seconds, start_s=start)
    loop.remove_reader(pipe.fileno())
    flusher.cancel()
    flush()
    pipe.send(replace(measured, outcomes=[]))


def _without_prompt(request: Request) -> Request:
    """The request without its prompt, which the other side knows."""
    return replace(request, prompt=_UNSENT, messages=None, tools=None, text=None)
