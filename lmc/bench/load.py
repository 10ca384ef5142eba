"""Sends a plan. Latency counts from the planned time, even if the request was sent later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from lmc.bench.client import Outcome, Target, complete, new_session
from lmc.bench.schedule import Plan

OnDone = Callable[[Outcome], Awaitable[bool]]  # False: send nothing more
TICK_S = 0.02
STEP_S = 0.004  # between the first requests of a closed loop's connections; opening one takes a fraction of it


@dataclass(frozen=True)
class Measured:
    """One stretch of load: the outcomes of the requests that were sent, in planned order. sending_s is the time until the last was sent.

    origin_s is the zero of the outcomes' times, in perf_counter seconds.
    """

    outcomes: list[Outcome]
    wall_s: float
    sending_s: float
    cpu_s: float
    loop_lags_s: list[float]
    requested_rate: float | None
    origin_s: float = 0.0
    processes: int = 1


class LoopMonitor:
    """Measures how late the event loop wakes up, and the CPU time of this process, while a load runs."""

    def __init__(self) -> None:
        self.lags_s: list[float] = []
        self._task: asyncio.Task[None] | None = None
        self._began_cpu_s = 0.0

    @property
    def cpu_s(self) -> float:
        return time.process_time() - self._began_cpu_s

    async def __aenter__(self) -> LoopMonitor:
        self._began_cpu_s = time.process_time()
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.lags_s.append(time.perf_counter() - due)


async def run_load(
    plan: Plan,
    targets: Sequence[Target],
    label: str,
    on_done: OnDone,
    seconds: float | None = None,
    offset_s: float = 0.0,
    start_s: float | None = None,
) -> Measured:
    """Send the plan to the targets in turn. After `seconds`, or once on_done returns False, no further request is sent.

    Every request id begins with `label`. Times of the outcomes count from the start of the load, plus `offset_s`. With `start_s`, a time of
    perf_counter, the load begins at that time, and times of the outcomes remain times of perf_counter.
    """
    outcomes: list[Outcome | None] = [None] * len(plan.items)
    done = [asyncio.Event() for _ in plan.items]
    start = time.perf_counter() if start_s is None else start_s
    stopped = False

    async with new_session(targets[0]) as http, LoopMonitor() as monitor:

        async def due(index: int) -> float:
            """Wait until a request may be sent; returns its intended time."""
            item = plan.items[index]
            ready = start
            if item.after is not None:
                await done[item.after].wait()
                ready = time.perf_counter() + item.request.think_s
            elif item.at_s is None:
                ready = max(start, time.perf_counter())
            intended = ready if item.at_s is None else start + item.at_s
            await asyncio.sleep(
                max(0.0, intended - time.perf_counter())
            )  # other connections' turn: a slow client shows here
            return intended

        async def send(index: int, intended_s: float, opening: bool = False) -> None:
            nonlocal stopped
            request = plan.items[index].request
            try:
                if not stopped and (seconds is None or time.perf_counter() - start <= seconds):
                    target = targets[(request.session + request.turn) % len(targets)]
                    outcome = await complete(http, target, request, f"{label}/{request.id}", intended_s)
                    outcome.opening = opening
                    outcomes[index] = outcome
                    stopped |= not await on_done(outcome)
            finally:
                done[index].set()

        async def work(units: list[list[int]], number: int) -> None:
            """One connection of a closed loop. They begin one after the other, because the client can't open them all at once."""
            await asyncio.sleep(max(0.0, start + number * STEP_S - time.perf_counter()))
            opening = True
            while units:
                for index in units.pop():
                    await send(index, await due(index), opening)
                    opening = False

        async def arrive(index: int, slots: asyncio.Semaphore) -> None:
            intended = await due(index)
            async with slots:
                await send(index, intended)

        async with asyncio.TaskGroup() as group:
            if plan.units is not None:
                waiting = plan.units[::-1]
                for number in range(plan.concurrency or 1):
                    group.create_task(work(waiting, number))
            else:
                slots = asyncio.Semaphore(plan.concurrency or len(plan.items) or 1)
                for index in range(len(plan.items)):
                    group.create_task(arrive(index, slots))
        wall = time.perf_counter() - start
        sent = [outcome for outcome in outcomes if outcome is not None]
        sending = max((outcome.sent_s - start for outcome in sent), default=0.0)
        if start_s is None:
            for outcome in sent:
                outcome.shift(offset_s - start)
        return Measured(sent, wall, sending, monitor.cpu_s, monitor.lags_s, plan.requested_rate, start - offset_s)
