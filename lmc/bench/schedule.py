"""Plans when requests are sent. The whole plan is computed before the load starts, from the workload and its seed.

An open loop has absolute times, so a late request does not delay the next one. A closed loop has units, which `concurrency` workers take
one after another. A later turn of a session always waits for the turn before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lmc.bench.prompts import Conversation, Request
from lmc.bench.workload import Closed, OpenLoop, TraceTimes, Users, Workload
from lmc.errors import WorkloadError


@dataclass(frozen=True)
class Planned:
    """A request and its time from the start of the load; None: as soon as possible. `after` is the index of the turn before it, if any."""

    request: Request
    at_s: float | None
    after: int | None


@dataclass(frozen=True)
class Plan:
    """`units` (closed loop) are the indices of requests that one worker sends in a row. `requested_rate` (open loop) is in sends/s."""

    items: list[Planned]
    units: list[list[int]] | None
    concurrency: int | None
    requested_rate: float | None

    @property
    def is_ordered(self) -> bool:
        """Whether requests are sent one at a time: then every run has the same order, and its hits are the same to the token."""
        return self.units is not None and self.concurrency == 1


def make_plan(sessions: Sequence[Conversation], workload: Workload) -> Plan:
    load, limit = workload.load, workload.limits.requests
    rng = np.random.default_rng([workload.seed, 0xA221])
    if isinstance(load, Closed):
        return _closed_plan(sessions, load, limit, rng)
    timed: list[tuple[Request, float | None]]
    if isinstance(load, TraceTimes):
        timed = _trace_times(sessions, load)
    elif isinstance(load, Users):
        timed = _user_times(sessions, load)
    else:
        starts = arrival_times(load, len(sessions), rng)
        timed = [
            (request, float(start) if request.turn == 0 else None)
            for session, start in zip(sessions, starts, strict=True)
            for request in session
        ]
    # A turn without a time of its own follows its session's first turn; sorting by that keeps the cut to `limit` fair.
    first = {session[0].session_id: index for index, session in enumerate(sessions)}
    known = [at_s for _, at_s in timed if at_s is not None]
    key = {id(request): at_s for request, at_s in timed}
    begun = [key[id(session[0])] or 0.0 for session in sessions]
    timed.sort(key=lambda pair: (begun[first[pair[0].session_id]] if pair[1] is None else pair[1], pair[0].turn))
    items = _chained(timed)[:limit]
    span = max(known, default=0.0)
    return Plan(items, None, workload.limits.concurrency, (len(known) - 1) / span if span > 0 else None)


def split(plan: Plan, size: int) -> list[Plan]:
    """Cut a closed loop into stretches of whole units, each of at least `size` requests. An open loop stays whole, as its times do."""
    if plan.units is None:
        return [plan]
    stretches: list[list[list[int]]] = [[]]
    for unit in plan.units:
        if sum(map(len, stretches[-1])) >= size:
            stretches.append([])
        stretches[-1].append(unit)
    return [_sub_plan(plan, units) for units in stretches]


def share_out(plan: Plan, count: int) -> list[tuple[Plan, list[int]]]:
    """Divide the plan into at most `count` plans that can be sent at the same time, each with the places of its items in the whole plan.

    Sessions stay whole, because a turn waits for the one before it. The concurrency is divided.
    """
    roots: list[int] = []  # of each item: the first item of its session
    for index, item in enumerate(plan.items):
        roots.append(index if item.after is None else roots[item.after])
    groups: dict[int, list[int]] = {}
    for index, root in enumerate(roots):
        groups.setdefault(root, []).append(index)
    count = min(count, len(groups), plan.concurrency or len(groups))
    shares: list[tuple[Plan, list[int]]] = []
    for number in range(count):
        chosen = sorted(index for group in list(groups.values())[number::count] for index in group)
        mine = set(chosen)
        units = None if plan.units is None else [unit for unit in plan.units if unit[0] in mine]
        part = _sub_plan(plan, units if units is not None else [chosen])
        if units is not None:
            chosen = [index for unit in units for index in unit]
        concurrency = plan.concurrency and plan.concurrency // count + (number < plan.concurrency % count)
        shares.append((replace(part, units=part.units if units is not None else None, concurrency=concurrency), chosen))
    return shares


def _sub_plan(plan: Plan, units: list[list[int]]) -> Plan:
    chosen = [index for unit in units for index in unit]
    place = {index: position for position, index in enumerate(chosen)}
    # A turn whose predecessor is in an earlier stretch has nothing to wait for.
    items = [
        replace(plan.items[index], after=None if (after := plan.items[index].after) is None else place.get(after))
        for index in chosen
    ]
    return Plan(items, [[place[index] for index in unit] for unit in units], plan.concurrency, None)


def arrival_times(load: OpenLoop, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count,) start times in s, from 0. Random gaps are rescaled so that all arrivals together take exactly count / rate seconds."""
    if load.kind == "constant":
        return np.arange(count, dtype=np.float64) / load.rate
    shape = 1.0 if load.kind == "poisson" else load.burstiness
    times = np.concatenate([[0.0], np.cumsum(rng.gamma(shape, 1.0, size=count))])
    starts: NDArray[np.float64] = times[:-1] * (count / load.rate / times[-1])
    return starts


def _closed_plan(sessions: Sequence[Conversation], load: Closed, limit: int | None, rng: np.random.Generator) -> Plan:
    if load.order == "turns":
        longest = max(map(len, sessions))
        ordered = [session[turn] for turn in range(longest) for session in sessions if turn < len(session)]
    else:
        order = rng.permutation(len(sessions)) if load.order == "shuffled" else range(len(sessions))
        ordered = [request for index in order for request in sessions[index]]
    items = _chained([(request, None) for request in ordered])[:limit]
    units: list[list[int]] = []
    for index, item in enumerate(items):
        if item.after is None or load.order == "turns":
            units.append([index])
        else:
            units[-1].append(index)
    return Plan(items, units, load.concurrency, None)


def _trace_times(sessions: Sequence[Conversation], load: TraceTimes) -> list[tuple[Request, float | None]]:
    """The data set's own times, counted from its first request. Raises WorkloadError for a part without times."""
    requests = [request for session in sessions for request in session]
    for request in requests:
        if request.at_s is None:
            raise WorkloadError(
                f"parts.{request.part}: its requests have no times, which load.kind trace needs; give `at`, or a source of kind trace"
            )
    first = min(request.at_s or 0.0 for request in requests)
    return [(request, ((request.at_s or 0.0) - first) / load.speed) for request in requests]


def _user_times(sessions: Sequence[Conversation], load: Users) -> list[tuple[Request, float | None]]:
    """User u starts after u / rate seconds and sends a turn every users / rate seconds; after a session the user begins the next one."""
    gap = load.users / load.rate
    free_at = [user / load.rate for user in range(load.users)]
    timed: list[tuple[Request, float | None]] = []
    for session in sessions:
        user = free_at.index(min(free_at))
        timed += [(request, free_at[user] + turn * gap) for turn, request in enumerate(session)]
        free_at[user] += len(session) * gap
    return timed


def _chained(timed: Sequence[tuple[Request, float | None]]) -> list[Planned]:
    last: dict[str, int] = {}
    planned = []
    for index, (request, at_s) in enumerate(timed):
        planned.append(Planned(request, at_s, last.get(request.session_id)))
        last[request.session_id] = index
    return planned
