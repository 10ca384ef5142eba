"""Was the client itself good enough? Send lag, achieved rate, CPU and event-loop lag, in every report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from lmc.bench.client import Outcome

TICK_S = 0.02


@dataclass(frozen=True)
class SelfCheck:
    """Lags in ms; `requested_rate` and `achieved_rate` in requests/s (requested None: closed loop); cpu is a share of one core."""

    send_lag_p50_ms: float
    send_lag_p99_ms: float
    send_lag_max_ms: float
    loop_lag_p99_ms: float
    requested_rate: float | None
    achieved_rate: float
    client_cpu: float


class LoopMonitor:
    """Measures how late the event loop wakes up, and the CPU time of this process, while a load runs."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._task: asyncio.Task[None] | None = None
        self._cpu_s = 0.0

    async def __aenter__(self) -> LoopMonitor:
        self._cpu_s = time.process_time()
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
            self._lags.append(time.perf_counter() - due)

    def check(self, outcomes: Sequence[Outcome], wall_s: float, requested_rate: float | None = None) -> SelfCheck:
        send = np.array([outcome.sent_s - outcome.intended_s for outcome in outcomes] or [0.0]) * 1e3
        loop = np.array(self._lags or [0.0]) * 1e3
        sent_for = max((outcome.sent_s for outcome in outcomes), default=0.0)
        return SelfCheck(
            send_lag_p50_ms=float(np.percentile(send, 50)),
            send_lag_p99_ms=float(np.percentile(send, 99)),
            send_lag_max_ms=float(send.max()),
            loop_lag_p99_ms=float(np.percentile(loop, 99)),
            requested_rate=requested_rate,
            achieved_rate=len(outcomes) / sent_for if sent_for > 0 else 0.0,
            client_cpu=(time.process_time() - self._cpu_s) / wall_s if wall_s > 0 else 0.0,
        )
