"""Checks that the client was fast enough: send lag, achieved rate, CPU use and event-loop lag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmc.bench.load import Measured

LAG_MS = 5.0  # a send lag of as much spoils no figure
BUSY = 0.8  # of a core; a client process that uses as much is at its limit
LAG_SHARE = 0.02  # of the median TTFT; such a lag spoils none either


@dataclass(frozen=True)
class SelfCheck:
    """Lags are in ms. Rates are in requests/s and count sends; in a closed loop, where requested_rate is None, they count ends.

    client_cpu is the CPU time of all client processes together, as a share of one core.
    """

    requests: int
    send_lag_p50_ms: float
    send_lag_p90_ms: float
    send_lag_p99_ms: float
    send_lag_max_ms: float
    loop_lag_p99_ms: float
    requested_rate: float | None
    achieved_rate: float
    client_cpu: float
    processes: int = 1

    def lag_problem(self, ttft_p50_ms: float) -> str | None:
        """A line that says that the client was too slow, or None. Below 100 requests one outlier is the p99, so the p90 is judged."""
        name, lag_ms = ("p99", self.send_lag_p99_ms) if self.requests >= 100 else ("p90", self.send_lag_p90_ms)
        if lag_ms <= max(LAG_MS, LAG_SHARE * ttft_p50_ms):
            return None
        problem = f"the client lagged: send lag {name} is {lag_ms:.1f} ms"
        if self.client_cpu > BUSY * self.processes:
            problem += f"; {self.processes} client process(es) used {self.client_cpu:.0%} of a core, set limits.processes higher"
        return problem


def check_client(stretches: Sequence[Measured], without_start: bool = False) -> SelfCheck:
    """The self-check over all stretches of load of one arm. `without_start` leaves the first request of each connection out of the lag."""
    outcomes = [outcome for stretch in stretches for outcome in stretch.outcomes]
    judged = [outcome for outcome in outcomes if not (without_start and outcome.opening)]
    send = np.array([outcome.sent_s - outcome.intended_s for outcome in judged] or [0.0]) * 1e3
    loop = np.array([lag for stretch in stretches for lag in stretch.loop_lags_s] or [0.0]) * 1e3
    rates = [stretch.requested_rate for stretch in stretches if stretch.requested_rate is not None]
    sending, wall = sum(stretch.sending_s for stretch in stretches), sum(stretch.wall_s for stretch in stretches)
    return SelfCheck(
        requests=len(outcomes),
        send_lag_p90_ms=float(np.percentile(send, 90)),
        send_lag_p50_ms=float(np.percentile(send, 50)),
        send_lag_p99_ms=float(np.percentile(send, 99)),
        send_lag_max_ms=float(send.max()),
        loop_lag_p99_ms=float(np.percentile(loop, 99)),
        requested_rate=sum(rates) / len(rates) if rates else None,
        achieved_rate=(len(outcomes) - len(rates)) / sending
        if rates and sending > 0
        else len(outcomes) / (wall or 1.0),
        client_cpu=sum(stretch.cpu_s for stretch in stretches) / wall if wall > 0 else 0.0,
        processes=max((stretch.processes for stretch in stretches), default=1),
    )
