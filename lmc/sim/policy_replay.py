"""Replays a trace through one eviction policy at given capacities.

The kernel does with arrays what the directory does with objects: it calls the functions of lmc.cache.policy in the same order. Numba
compiles it once for each policy, from the source that the live cache interprets, and keeps the result on disk. The kernel also runs
interpreted, so that the tests can compare the two. Capacities run in parallel on threads, because the compiled kernel releases the GIL.

A request looks its chain up in the cache (its hit is the longest resident prefix), makes room, stores the missing trace blocks from the
last to the first and then touches the others, also from the last to the first. Of a request longer than the cache only the first trace
blocks are kept.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmc.cache.policy.base import PolicySpec
from lmc.errors import ConfigError
from lmc.sim.trace import Float64, Int32, Int64, Trace, Window

Marks = npt.NDArray[np.uint8]
Kernel = Callable[..., tuple[int, int]]


@dataclass(frozen=True)
class ReplayOptions:
    """Deviations from a cache that stores everything at once and evicts one trace block for each new one."""

    admit_touches: int = 1  # a trace block is stored when it is requested for the n-th time
    low_watermark: float = 1.0  # a full cache evicts down to this share of its capacity
    write_delay_s: float = 0.0  # time from the store until a trace block is readable
    ttl_s: float = float("inf")  # a trace block is dropped when its time to live is over
    ttl_sliding: bool = True  # a touch renews the time to live; False: it counts from the store

    def __post_init__(self) -> None:
        if self.admit_touches < 1:
            raise ConfigError(f"admit_touches must be at least 1, not {self.admit_touches}")
        if not 0 < self.low_watermark <= 1:
            raise ConfigError(f"low_watermark must be above 0 and at most 1, not {self.low_watermark}")
        if self.write_delay_s < 0 or self.ttl_s < 0:
            raise ConfigError("write_delay_s and ttl_s must not be negative")


PLAIN = ReplayOptions()


@dataclass(frozen=True, eq=False)
class PolicyHits:
    """The result of one policy at one capacity."""

    policy: str
    capacity: int  # trace blocks
    request_hits: Int32  # (num_requests,) trace blocks found
    evictions: int  # trace blocks evicted to make room; expired ones do not count
    resident: int  # trace blocks resident at the end
    victims: Int32 = field(repr=False)  # (evictions,) in order, if they were logged

    def hit_blocks(self, trace: Trace, window: Window = "all") -> int:
        return int(self.request_hits[trace.first_request(window) :].sum(dtype=np.int64))

    def hit_tokens(self, trace: Trace, window: Window = "all") -> int:
        """Hit tokens of the window. A partial last trace block counts the tokens that it has."""
        first = trace.first_request(window)
        tokens = self.request_hits[first:].astype(np.int64) * trace.block_tokens
        return int(np.minimum(tokens, trace.input_tokens[first:]).sum())


def replay_policy(
    trace: Trace,
    spec: PolicySpec,
    capacities: Iterable[int],
    options: ReplayOptions = PLAIN,
    *,
    workers: int | None = None,
    log_victims: bool = False,
    compiled: bool = True,
) -> list[PolicyHits]:
    """One result for each capacity (in trace blocks), in their order. workers is the number of threads; default: one per core."""
    wanted = [int(capacity) for capacity in capacities]
    if any(capacity < 1 for capacity in wanted):
        raise ConfigError(f"a capacity must be at least one trace block, not {min(wanted)}")
    kernel = compiled_kernel(spec) if compiled else make_kernel(spec)
    if not compiled:
        return [_replay_one(trace, spec, kernel, capacity, options, log_victims) for capacity in wanted]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        runs = [pool.submit(_replay_one, trace, spec, kernel, size, options, log_victims) for size in wanted]
        return [run.result() for run in runs]


def _replay_one(
    trace: Trace, spec: PolicySpec, kernel: Kernel, capacity: int, options: ReplayOptions, log_victims: bool
) -> PolicyHits:
    num_nodes = trace.num_unique
    expires = options.ttl_s < np.inf
    state = spec.make_state(num_nodes, capacity, trace.parents)
    hits = np.zeros(trace.num_requests, dtype=np.int32)
    victims = np.zeros(trace.num_blocks if log_victims else 0, dtype=np.int32)
    evictions, resident = kernel(
        trace.ids,
        trace.starts,
        trace.parents,
        trace.timestamps_s,
        trace.class_numbers,
        capacity,
        max(1, int(capacity * options.low_watermark)),
        options.admit_touches,
        float(options.write_delay_s),
        float(options.ttl_s),
        options.ttl_sliding,
        state,
        hits,
        victims,
        np.zeros(num_nodes, dtype=np.uint8),  # there
        np.zeros(num_nodes, dtype=np.int32),  # holds
        np.zeros(num_nodes if options.admit_touches > 1 else 0, dtype=np.int32),  # requested: how often
        np.zeros(num_nodes if options.write_delay_s > 0 else 0, dtype=np.float64),  # ready_s
        # A list of trace blocks by the begin of their time to live. Late ones are past it but wait for their children, outside the list.
        np.zeros(num_nodes if expires else 0, dtype=np.float64),
        np.zeros(num_nodes if expires else 0, dtype=np.uint8),
        np.arange(num_nodes + 1 if expires else 1, dtype=np.int32),
        np.arange(num_nodes + 1 if expires else 1, dtype=np.int32),
    )
    return PolicyHits(spec.name, capacity, hits, evictions, resident, victims[:evictions] if log_victims else victims)


@cache
def compiled_kernel(spec: PolicySpec) -> Kernel:
    """The kernel of a policy. It is compiled on first use, or read from Numba's cache on disk."""
    from numba import njit
    from numba.extending import register_jitable

    register_jitable(_nrt=False)(_ignore)
    for module in _modules(spec):
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                register_jitable(_nrt=False)(function)
    source = make_kernel(spec)
    # Numba keeps one index file per function name and watches only the file of that function. With the policy and a digest of its source in
    # the name, an edited policy gets a new entry, and the index of one policy never needs the modules of another.
    source.__qualname__ = f"kernel_{spec.name.partition('@')[0]}_{source_digest(spec)}"
    # No reference counting of arrays: they all belong to the caller, and counting costs more than the policies.
    kernel: Kernel = njit(cache=True, nogil=True, _nrt=False)(source)
    return kernel


def source_digest(spec: PolicySpec) -> str:
    """Differs if a module of the policy does."""
    digest = hashlib.blake2b(digest_size=8)
    for module in [*_modules(spec), sys.modules[spec.make_state.__module__]]:
        digest.update(Path(inspect.getfile(module)).read_bytes())
        if not module.__name__.startswith("lmc."):
            digest.update(module.__name__.encode())  # Numba's file names the module of a policy from outside
    return digest.hexdigest()


def _modules(spec: PolicySpec) -> list[Any]:  # Any: module objects
    """The modules under lmc.cache.policy whose functions a policy uses."""
    found: list[Any] = []
    functions = [spec.on_hit] if spec.on_request is None else [spec.on_hit, spec.on_request]
    waiting = [sys.modules[function.__module__] for function in functions]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.append(module)
        used = (getattr(value, "__module__", "") for value in vars(module).values() if inspect.isfunction(value))
        waiting.extend(sys.modules[name] for name in sorted(set(used)) if name)
    return found


def _ignore(state: Any, request_class: int) -> None:
    """A policy without on_request does this."""


def make_kernel(spec: PolicySpec) -> Kernel:
    on_hit, on_insert, victim = spec.on_hit, spec.on_insert, spec.victim
    on_evict, release, on_request = spec.on_evict, spec.release, spec.on_request or _ignore

    def kernel(
        ids: Int32,
        starts: Int64,
        parents: Int32,
        times_s: Float64,
        classes: Int32,
        capacity: int,
        low: int,
        admit_touches: int,
        write_delay_s: float,
        ttl_s: float,
        ttl_sliding: bool,
        state: Any,
        hits: Int32,
        victims: Int32,
        there: Marks,
        holds: Int32,
        requested: Int32,
        ready_s: Float64,
        begun_s: Float64,
        late: Marks,
        aging_older: Int32,
        aging_younger: Int32,
    ) -> tuple[int, int]:
        count = 0
        evictions = 0
        expires = ttl_s < np.inf
        aging = aging_older.size - 1

        for request in range(starts.size - 1):
            start = starts[request]
            length = min(starts[request + 1] - start, capacity)
            now = request + 1
            now_s = times_s[request]
            on_request(state, classes[request])

            if expires:
                node = aging_younger[aging]
                while node != aging and now_s - begun_s[node] > ttl_s:
                    following = aging_younger[node]
                    aging_younger[aging_older[node]] = following
                    aging_older[following] = aging_older[node]
                    late[node] = 1
                    gone = node
                    while gone >= 0 and late[gone] and holds[gone] == 0:
                        late[gone] = 0
                        there[gone] = 0
                        count -= 1
                        on_evict(state, gone)
                        gone = parents[gone]
                        if gone >= 0:
                            holds[gone] -= 1
                    node = following

            found = 0
            while found < length and there[ids[start + found]]:
                node = ids[start + found]
                if (write_delay_s > 0 and ready_s[node] > now_s) or (expires and late[node]):
                    break
                found += 1
            hits[request] = found

            present = found
            while present < length and there[ids[start + present]]:
                present += 1
            if admit_touches > 1:
                admitted = 0
                for index in range(length):
                    requested[ids[start + index]] += 1
                    if admitted == index and requested[ids[start + index]] >= admit_touches:
                        admitted += 1
                length = max(present, admitted)

            if count + length - present > capacity:
                if present > 0:
                    holds[ids[start + present - 1]] += 1
                while count > 0 and count + length - present > low:
                    node = victim(state, holds)
                    if node < 0:
                        break
                    if victims.size > 0:
                        victims[evictions] = node
                    evictions += 1
                    while True:
                        there[node] = 0
                        count -= 1
                        on_evict(state, node)
                        if expires:
                            if late[node]:
                                late[node] = 0
                            else:
                                aging_younger[aging_older[node]] = aging_younger[node]
                                aging_older[aging_younger[node]] = aging_older[node]
                        parent = parents[node]
                        if parent < 0:
                            break
                        holds[parent] -= 1
                        if not (expires and late[parent] and holds[parent] == 0):
                            break
                        node = parent
                if present > 0:
                    holds[ids[start + present - 1]] -= 1

            for index in range(length - 1, -1, -1):
                node = ids[start + index]
                if index >= present:
                    there[node] = 1
                    count += 1
                    if parents[node] >= 0:
                        holds[parents[node]] += 1
                    if write_delay_s > 0:
                        ready_s[node] = now_s + write_delay_s
                    on_insert(state, node, now)
                else:
                    on_hit(state, node, now)
                if expires and (index >= found or ttl_sliding):
                    # A trace block that was computed again, because it was late or not readable yet, is stored again.
                    if late[node]:
                        late[node] = 0
                    elif index < present:
                        aging_younger[aging_older[node]] = aging_younger[node]
                        aging_older[aging_younger[node]] = aging_older[node]
                    begun_s[node] = now_s
                    youngest = aging_older[aging]
                    aging_older[node] = youngest
                    aging_younger[node] = aging
                    aging_younger[youngest] = node
                    aging_older[aging] = node
            if length > present:
                while release(state) >= 0:
                    pass
        return evictions, count

    return kernel
