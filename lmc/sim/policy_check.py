"""Checks an eviction policy against its contract (lmc.cache.policy.base), on random requests from small to large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lmc.cache.policy.base import PolicySpec
from lmc.report import Cell, Column, Table
from lmc.sim.belady import belady_hits
from lmc.sim.build import TraceBuilder
from lmc.sim.policy_host import BrokenContractError, Host, Key, NodePolicy, Request, class_of, run_spec
from lmc.sim.policy_replay import replay_policy
from lmc.sim.trace import Int32, Trace

ROUNDS = 100
_LOOKS = 10  # at `holds`, for each node of a long chain
_CHAIN = 300


@dataclass(frozen=True)
class Checked:
    what: str
    fault: str  # empty if it holds

    @property
    def ok(self) -> bool:
        return not self.fault


def check_policy(spec: PolicySpec, rounds: int = ROUNDS, seed: int = 0) -> list[Checked]:
    """Run every check. Each stops at its first fault."""
    cases = [_case(number, seed) for number in range(rounds)]
    checks: list[tuple[str, Callable[[PolicySpec, Sequence[Request], int, int], None]]] = [
        ("answers of the live host are allowed, with pins and drops", _answers),
        ("interpreted, compiled and live evict the same chunks in the same order", _three_agree),
        ("Belady is never beaten", _bounded),
    ]
    found = [Checked(what, _first_fault(spec, check, cases)) for what, check in checks]
    found.append(Checked("no victim where all nodes are held", _fault_of(lambda: _all_held(spec))))
    found.append(Checked("a chain behind its leaf is walked once", _fault_of(lambda: _long_chain(spec))))
    return found


def check_table(spec: PolicySpec, found: Sequence[Checked], rounds: int) -> Table:
    rows: list[list[Cell]] = [[one.what, "yes" if one.ok else "no", one.fault] for one in found]
    note = f"{rounds} random runs of requests for each of the first three lines."
    return Table(f"Contract of policy {spec.name}", [Column("what"), Column("holds"), Column("fault")], rows, note)


def trace_of(
    requests: Sequence[Request], seconds: Sequence[float] | None = None, classed: bool = False
) -> tuple[Trace, list[Key]]:
    """A trace with trace blocks of one token, and the key of each id. classed: requests have classes as the host gives them."""
    builder = TraceBuilder("random", "test", 1)
    number: dict[Key, int] = {}
    for index, labels in enumerate(requests):
        chain = [tuple(labels[: depth + 1]) for depth in range(len(labels))]
        hashes = [number.setdefault(key, len(number)) for key in chain]
        builder.add(index + 1, hashes, seconds[index] if seconds else float(index), len(labels), 1)
    trace = builder.finish()
    if classed:
        classes = np.array([class_of(labels) for labels in requests], dtype=np.int32)
        trace = replace(trace, classes=classes, class_names=("", "1", "2", "3"))
    return trace, list(number)


def _case(number: int, seed: int) -> tuple[list[Request], int, int]:
    """Requests that start anew, repeat, extend or fork an earlier one, the capacity, and a seed for what happens beside them."""
    draw = np.random.default_rng([seed, number])
    chains: list[list[int]] = []
    for _ in range(2 + number):
        source = chains[int(draw.integers(len(chains)))] if chains and draw.random() < 0.8 else []
        kept = source[: int(draw.integers(len(source) + 1))]
        new = draw.integers(0, 3, int(draw.integers(0 if kept else 1, max(7 - len(kept), 2))))
        chains.append([*kept, *new.tolist()])
    return list(chains), int(draw.integers(1, 15)), int(draw.integers(1 << 30))


def _first_fault(
    spec: PolicySpec,
    check: Callable[[PolicySpec, Sequence[Request], int, int], None],
    cases: Sequence[tuple[list[Request], int, int]],
) -> str:
    for requests, capacity, seed in cases:
        fault = _fault_of(lambda requests=requests, capacity=capacity, seed=seed: check(spec, requests, capacity, seed))  # type: ignore[misc]
        if fault:
            return f"{fault}; capacity {capacity}, requests {[list(labels) for labels in requests]}"
    return ""


def _fault_of(check: Callable[[], None]) -> str:
    try:
        check()
    except BrokenContractError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - the policy is a user's code, whose faults are what is looked for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _answers(spec: PolicySpec, requests: Sequence[Request], capacity: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    host = Host(NodePolicy(spec, capacity, max(map(len, requests))), capacity, classed=True)
    pinned: list[Key] = []
    for labels in requests:
        host.request(labels)
        if pinned and draw.random() < 0.5:
            host.pins[pinned.pop()] -= 1
        if host.there and draw.random() < 0.5:
            key = sorted(host.there)[int(draw.integers(len(host.there)))]
            host.pins[key] += 1
            pinned.append(key)
        leaves = sorted(key for key in host.there if not host.held(key))
        if leaves and draw.random() < 0.25:
            host.drop(leaves[int(draw.integers(len(leaves)))])


def _three_agree(spec: PolicySpec, requests: Sequence[Request], capacity: int, seed: int) -> None:
    trace, keys = trace_of(requests, classed=True)
    [fast] = replay_policy(trace, spec, [capacity], log_victims=True, workers=1)
    [slow] = replay_policy(trace, spec, [capacity], log_victims=True, compiled=False)
    live = run_spec(spec, requests, capacity, classed=True)
    _same("compiled and interpreted", fast.victims.tolist(), slow.victims.tolist())
    _same("compiled and live", [keys[node] for node in fast.victims.tolist()], live.victims)
    _same("hits compiled and live", fast.request_hits.tolist(), live.hits)


def _same(what: str, one: Sequence[Any], other: Sequence[Any]) -> None:  # Any: nodes or keys
    if list(one) != list(other):
        place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        raise BrokenContractError(f"{what} differ from the {place + 1}th on")


def _bounded(spec: PolicySpec, requests: Sequence[Request], capacity: int, seed: int) -> None:
    trace, _ = trace_of(requests)
    [bound] = belady_hits(trace, [capacity], workers=1)
    [found] = replay_policy(trace, spec, [capacity], workers=1)
    if found.hit_blocks(trace) > bound.hit_blocks(trace):
        raise BrokenContractError(
            f"{found.hit_blocks(trace)} hits where no policy can have more than {bound.hit_blocks(trace)}"
        )


def _all_held(spec: PolicySpec) -> None:
    state = spec.make_state(8, 4, np.full(8, -1, dtype=np.int32))
    free, held = np.zeros(8, dtype=np.int32), np.ones(8, dtype=np.int32)
    if spec.victim(state, free) != -1:
        raise BrokenContractError("an empty cache has a victim")
    for node in range(4):
        spec.on_insert(state, node, node + 1)
    if spec.victim(state, held) != -1:
        raise BrokenContractError("a held node was chosen")
    if spec.victim(state, free) not in range(4):
        raise BrokenContractError("no node was chosen after a search in vain")


class _Counting:
    """`holds`, counting how often a policy looks."""

    def __init__(self, array: Int32) -> None:
        self.array = array
        self.count = 0

    def __getitem__(self, node: int) -> int:
        self.count += 1
        return int(self.array[node])


def _long_chain(spec: PolicySpec) -> None:
    """Growing one chain block by block puts the leaf behind its parents in every queue; evicting it all must not be quadratic."""
    state = spec.make_state(_CHAIN, _CHAIN, np.arange(-1, _CHAIN - 1, dtype=np.int32))
    looks: Any = _Counting(np.zeros(_CHAIN, dtype=np.int32))  # Any: it stands for an array
    for node in range(_CHAIN):
        spec.on_insert(state, node, node + 1)
        for parent in range(node - 1, -1, -1):
            spec.on_hit(state, parent, node + 1)
            looks.array[parent] = 1
    for node in range(_CHAIN - 1, -1, -1):
        looks.array[node] = 0
        if spec.victim(state, looks) != node:
            raise BrokenContractError("the leaf of a chain was not chosen, though all others are held")
        spec.on_evict(state, node)
    if looks.count >= _LOOKS * _CHAIN:
        raise BrokenContractError(
            f"{looks.count} looks at `holds` for a chain of {_CHAIN}; at most {_LOOKS} for each are allowed"
        )
