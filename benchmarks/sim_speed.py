"""How fast lmc sim is: python -m benchmarks.sim_speed [--out reports/sim-speed]. Needs LMC_DATA_DIR with the Mooncake conversation trace.

CPU time of one thread for the stack engine, so that other work on the machine disturbs little; for whole studies wall time, which decides,
and CPU time beside it: on a loaded machine the first says little. Each figure is the best of several runs, with compilation left out but
where it is the figure. Memory is measured in a process of its own. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmc.bench.machine import describe_hardware, describe_software
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, write_file
from lmc.sim import stack
from lmc.sim.cache_file import load_trace
from lmc.sim.formats import read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.study import make_study
from lmc.sim.trace import Trace

CONVERSATION = "mooncake_conversation_trace.jsonl.gz"
EIGHT = ("arc", "fifo", "gdsf", "lfu", "lirs", "s3fifo", "sieve", "2q")


@dataclass(frozen=True)
class Figure:
    what: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def trace_of(ids: np.ndarray, sizes: np.ndarray, block_tokens: int = 16) -> Trace:
    """ids must be numbered by first appearance and chained; parents are not needed by the stack engine."""
    starts = np.zeros(sizes.size + 1, dtype=np.int64)
    np.cumsum(sizes, out=starts[1:])
    return Trace(
        "made",
        "made",
        block_tokens,
        ids.astype(np.int32, copy=False),
        starts,
        np.arange(sizes.size, dtype=np.float64),
        sizes * block_tokens,
        np.zeros(sizes.size, dtype=np.int64),
        np.full(int(ids.max()) + 1, -1, dtype=np.int32),
        np.zeros(sizes.size, dtype=np.int32),
        ("",),
        np.full(sizes.size, -1, dtype=np.int32),
        np.zeros(sizes.size, dtype=np.int32),
        ("",),
    )


def chat_trace(num_blocks: int, seed: int = 3) -> Trace:
    """Chats that grow by some 20 blocks a turn, up to 15 turns, a thousand at a time."""
    generator = np.random.default_rng(seed)
    ids = np.empty(num_blocks + 4096, dtype=np.int32)
    sizes = []
    chats: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * 1000
    turns = np.zeros(1000, dtype=np.int64)
    used = fresh = 0
    while used < num_blocks:
        chat = int(generator.integers(0, 1000))
        if turns[chat] >= generator.integers(3, 16):
            chats[chat], turns[chat] = np.empty(0, dtype=np.int32), 0
        added = int(generator.integers(5, 36))
        chats[chat] = np.concatenate([chats[chat], np.arange(fresh, fresh + added, dtype=np.int32)])
        fresh += added
        turns[chat] += 1
        ids[used : used + chats[chat].size] = chats[chat]
        used += chats[chat].size
        sizes.append(chats[chat].size)
    return trace_of(ids[:used], np.array(sizes, dtype=np.int64))


def zipf_trace(num_blocks: int = 2_000_000, candidates: int = 200_000) -> Trace:
    """The worst case: independent requests of one block each, zipf with exponent 1."""
    weights = 1 / np.arange(1, candidates + 1)
    drawn = np.random.default_rng(1).choice(candidates, size=num_blocks, p=weights / weights.sum())
    _, first, inverse = np.unique(drawn, return_index=True, return_inverse=True)
    number = np.empty(first.size, dtype=np.int32)
    number[np.argsort(first)] = np.arange(first.size, dtype=np.int32)
    return trace_of(number[inverse], np.ones(num_blocks, dtype=np.int64))


def best(action: Callable[[], object], clock: Callable[[], float], runs: int = 7) -> float:
    """Seconds of the quickest run; the first one, which may compile, does not count."""
    action()
    times = []
    for _ in range(runs):
        start = clock()
        action()
        times.append(clock() - start)
    return min(times)


def ordered_dict_hits(trace: Trace, capacity: int) -> int:
    """The usual way: one dictionary, one capacity."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    ids, starts = trace.ids.tolist(), trace.starts.tolist()
    for request in range(trace.num_requests):
        chain = ids[starts[request] : starts[request + 1]]
        for block in chain:
            if block not in cache:
                break
            hits += 1
        for block in reversed(chain):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


def stack_figures(conversation: Trace) -> list[Figure]:
    figures = []
    for name, trace, bar in (
        ("conversation", conversation, 100.0),
        ("chats, 1 M blocks", chat_trace(1_000_000), 100.0),
        ("chats, 50 M blocks", chat_trace(50_000_000), 100.0),
        ("worst case: zipf, one block a request", zipf_trace(), 5.0),
    ):
        runs = 3 if trace.num_blocks > 10**7 else 7
        seconds = best(lambda trace=trace: stack.profile(trace), time.process_time, runs)  # type: ignore[misc]
        figures.append(
            Figure(f"stack engine, all capacities, {name}", trace.num_blocks / seconds / 1e6, "M blocks/s", bar)
        )
    start = time.process_time()
    ordered_dict_hits(conversation, 20_000)
    one = time.process_time() - start
    figures.append(
        Figure("OrderedDict LRU, one capacity, conversation", conversation.num_blocks / one / 1e6, "M blocks/s")
    )
    return figures


def study_figures(path: Path) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        figures = []
        load_trace(copy, ReadOptions())
        for what, read, bar in (
            ("full study of the conversation trace, from JSON", lambda: read_trace(copy), 5.0),
            ("the same from the cache file", lambda: load_trace(copy, ReadOptions()), 2.0),
        ):
            for clock, name in ((time.perf_counter, "wall"), (time.process_time, "CPU")):
                seconds = best(lambda read=read: make_study(read(), EIGHT), clock, 3)  # type: ignore[misc]
                figures.append(Figure(f"{what}, {name}", seconds, "s", bar if name == "wall" else None, at_least=False))
        load = best(lambda: load_trace(copy, ReadOptions()).ids.sum(), time.perf_counter)
        blocks = load_trace(copy, ReadOptions()).num_blocks
        figures.append(Figure("second load of the trace", blocks / load / 1e6, "M ids/s", 20.0))
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(Path(folder) / "numba")}
        code = (
            "from pathlib import Path; from lmc.sim.formats import read_trace; from lmc.sim.study import make_study; "
            f"make_study(read_trace(Path({str(copy)!r})), {EIGHT!r})"
        )
        for what, bar in (("everything to compile", 60.0), ("compiled before", None)):
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            wall = time.perf_counter() - start
            figures.append(Figure(f"the study in a new process, {what}, wall", wall, "s", bar, at_least=False))
            figures.append(Figure(f"the study in a new process, {what}, CPU", used, "s"))
    return figures


def memory_figure() -> Figure:
    """Peak of a process that makes 50 M blocks and computes the hits at all capacities."""
    code = (
        "import json, resource\nfrom benchmarks.sim_speed import chat_trace\nfrom lmc.sim import stack\n"
        "trace = chat_trace(50_000_000)\ncurve = stack.hit_curve(stack.profile(trace))\n"
        "print(json.dumps([trace.num_blocks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    blocks, peak = json.loads(out)
    return Figure(f"peak memory for {blocks / 1e6:.0f} M blocks", peak / 1e9, "GB", 1.0, at_least=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    path = Path(os.environ.get("LMC_DATA_DIR", "../shared/data")) / CONVERSATION
    figures = [*stack_figures(read_trace(path)), *study_figures(path), memory_figure()]
    rows = [[f.what, f.value, f.unit, f.bar, "" if f.met is None else ("met" if f.met else "MISSED")] for f in figures]
    columns = [Column("what"), Column("value"), Column("unit"), Column("bar", decimals=0), Column("verdict")]
    note = "Stack engine: CPU time of one thread. Studies: wall time; load average at the end: " + " ".join(
        f"{load:.1f}" for load in os.getloadavg()
    )
    table = Table("lmc sim speed", columns, rows, note)
    print_table(table)
    if out is not None:
        metadata = {**describe_hardware(), **describe_software(), "command": "python -m benchmarks.sim_speed"}
        page = Report("Speed of lmc sim", "", [Section("Figures", "", [table])], metadata)
        write_file(out / "README.md", report_markdown(page))
    return 1 if any(figure.met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
