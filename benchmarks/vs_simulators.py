"""Policy replay beside its peers: python -m benchmarks.vs_simulators [--out reports/vs-simulators]. Needs LMC_DATA_DIR.

lmc's replay, libcachesim 0.3.5 (native process_trace, hashpower 18), kvcache-simulator 0.1.3 (its C++ core, a process of its own) and an
OrderedDict LRU replay the same blocks at one capacity, in turn, in one run. The figure is million block accesses a second of CPU time of
one thread, and the ratio to libcachesim's.
Hits are compared where both sides mean the same. Exit code 1 when a bar is missed or hits that must be equal are not.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kvcache_sim.trace
import libcachesim
import numpy as np
from kvcache_sim.cpp_backend import run_cpp_sweep

from benchmarks.sim_speed import CONVERSATION, ordered_dict_hits, zipf_trace
from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.policy import POLICIES
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, write_file
from lmc.sim import stack
from lmc.sim.belady import belady_hits
from lmc.sim.formats import read_trace
from lmc.sim.policy_replay import replay_policy
from lmc.sim.trace import Trace

BARS = {"lru": 50.0, "sieve": 20.0, "s3fifo": 20.0, "arc": 20.0, "belady": 10.0}
PEERS = {
    "lru": "LRU",
    "fifo": "FIFO",
    "lfu": "LFU",
    "sieve": "Sieve",
    "s3fifo": "S3FIFO",
    "arc": "ARC",
    "2q": "TwoQ",
    "lirs": "LIRS",
}
EQUAL = (
    "lru",
    "fifo",
    "lfu",
    "sieve",
    "s3fifo",
    "2q",
)  # without chains, hit by hit; see tests/sim/test_policy_replay_peers.py


@dataclass
class Row:
    trace: str
    what: str
    speed: float  # million block accesses per second
    hits: int | None
    bar: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.speed >= self.bar


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def quickest(action: Callable[[], int], runs: int) -> tuple[float, int]:
    """CPU seconds of the quickest run and its hits; the first, which may compile, does not count."""
    action()
    seconds = []
    for _ in range(runs):
        start = cpu_seconds()
        hits = action()
        seconds.append(cpu_seconds() - start)
    return min(seconds), hits


def own_rows(name: str, trace: Trace, capacity: int) -> list[Row]:
    rows = []
    actions: dict[str, Callable[[], int]] = {
        "belady": lambda: belady_hits(trace, [capacity], workers=1)[0].hit_blocks(trace)
    }
    for policy, spec in POLICIES.items():
        actions[policy] = lambda spec=spec: replay_policy(trace, spec, [capacity], workers=1)[0].hit_blocks(trace)  # type: ignore[misc]
    for policy, action in actions.items():
        seconds, hits = quickest(action, 5)
        rows.append(Row(name, f"lmc {policy}", trace.num_blocks / seconds / 1e6, hits, BARS.get(policy)))
    seconds, _ = quickest(lambda: stack.profile(trace).request.size, 5)
    rows.append(Row(name, "lmc stack engine", trace.num_blocks / seconds / 1e6, None, note="LRU at all capacities"))
    return rows


def ordered_dict_row(name: str, trace: Trace, capacity: int) -> Row:
    start = time.process_time()
    hits = ordered_dict_hits(trace, capacity)
    return Row(name, "OrderedDict LRU", trace.num_blocks / (time.process_time() - start) / 1e6, hits)


def oracle_file(trace: Trace, folder: Path) -> Path:
    """Blocks one by one in libcachesim's oracleGeneral format: time, id, size, next access (-1 for never)."""
    record = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    rows = np.zeros(trace.num_blocks, dtype=record)
    rows["time"] = np.arange(trace.num_blocks)
    rows["id"] = trace.ids.astype(np.uint64) + 1
    rows["size"] = 1
    rows["next"] = -1
    order = np.argsort(trace.ids, kind="stable")
    again = trace.ids[order][1:] == trace.ids[order][:-1]
    rows["next"][order[:-1][again]] = order[1:][again]
    path = folder / "trace.oracleGeneral"
    rows.tofile(path)
    return path


def libcachesim_rows(name: str, trace: Trace, capacity: int, folder: Path) -> list[Row]:
    """Blocks without chains: hits are comparable only where a request is one block."""
    path = oracle_file(trace, folder)
    flat = trace.longest == 1
    rows = []
    for policy, peer in {**PEERS, "belady": "Belady"}.items():

        def action(peer: str = peer) -> int:
            reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
            missed, _ = getattr(libcachesim, peer)(capacity, hashpower=18).process_trace(reader)
            return round((1 - missed) * trace.num_blocks)

        seconds, hits = quickest(action, 2)
        note = "" if flat else "blocks without chains"
        rows.append(
            Row(name, f"libcachesim {policy}", trace.num_blocks / seconds / 1e6, hits if flat else None, note=note)
        )
    return rows


def kvcache_simulator_rows(name: str, path: Path, trace: Trace, capacity: int) -> list[Row]:
    parsed = kvcache_sim.trace.parse_trace_file(path, block_size=trace.block_tokens)
    rows = []
    for policy, peer in {"lru": "lru", "fifo": "fifo", "belady": "optimal"}.items():

        def action(peer: str = peer) -> int:
            swept = run_cpp_sweep(
                parsed, capacities=[capacity], policies=[peer], warmup_requests=trace.num_requests // 2
            )
            return int(swept.results[peer, capacity].hitTokens)

        seconds, hits = quickest(action, 2)
        rows.append(
            Row(
                name,
                f"kvcache-simulator {policy}",
                trace.num_blocks / seconds / 1e6,
                None,
                note=f"{hits} hit tokens, last half",
            )
        )
        own = (
            belady_hits(trace, [capacity]) if policy == "belady" else replay_policy(trace, POLICIES[policy], [capacity])
        )
        if (
            policy != "fifo" and own[0].hit_tokens(trace, "last-half") != hits
        ):  # its FIFO evicts parents before children
            rows[-1].note += ": DIFFERS from lmc"
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    path = Path(os.environ.get("LMC_DATA_DIR", "../shared/data")) / CONVERSATION
    conversation, zipf = read_trace(path), zipf_trace()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *own_rows("conversation", conversation, 5637),
            ordered_dict_row("conversation", conversation, 5637),
            *kvcache_simulator_rows("conversation", path, conversation, 5637),
            *libcachesim_rows("conversation", conversation, 5637, Path(folder)),
            *own_rows("zipf", zipf, 20_000),
            ordered_dict_row("zipf", zipf, 20_000),
            *libcachesim_rows("zipf", zipf, 20_000, Path(folder)),
        ]
    hits = {(row.trace, row.what): row.hits for row in rows}
    wrong = [policy for policy in EQUAL if hits["zipf", f"lmc {policy}"] != hits["zipf", f"libcachesim {policy}"]]
    if hits["conversation", "lmc lru"] != hits["conversation", "OrderedDict LRU"]:
        wrong.append("lru against OrderedDict")
    peers = {(row.trace, row.what.split()[-1]): row.speed for row in rows if row.what.startswith("libcachesim")}
    table = Table(
        "Policy replay",
        [
            Column("trace"),
            Column("what"),
            Column("M accesses/s"),
            Column("times libcachesim"),
            Column("bar", decimals=0),
            Column("verdict"),
            Column("hit blocks", decimals=0),
            Column("note"),
        ],
        [
            [
                row.trace,
                row.what,
                row.speed,
                row.speed / peers[row.trace, row.what.split()[-1]]
                if row.what.startswith("lmc") and (row.trace, row.what.split()[-1]) in peers
                else None,
                row.bar,
                "" if row.met is None else ("met" if row.met else "MISSED"),
                row.hits,
                row.note,
            ]
            for row in rows
        ],
        "CPU time of one thread; conversation at 5,637 blocks, zipf at 20,000. Load average at the end: "
        + " ".join(f"{load:.1f}" for load in os.getloadavg())
        + (f". Hits that must be equal differ: {', '.join(wrong)}" if wrong else ". Hits that must be equal are."),
    )
    print_table(table)
    if out is not None:
        metadata = {**describe_hardware(), **describe_software(), "command": "python -m benchmarks.vs_simulators"}
        write_file(
            out / "README.md",
            report_markdown(Report("lmc sim beside other simulators", "", [Section("Figures", "", [table])], metadata)),
        )
    differs = any("DIFFERS" in row.note for row in rows)
    return 1 if wrong or differs or any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
