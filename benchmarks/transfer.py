"""How close transfers come to the machine's own copies: python -m benchmarks.transfer [--device cpu] [--out reports/transfer-cpu].

Backend and limit take turns, so that a busy machine slows both; a share is the median over the turns. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.transfer.backends.host import HostBackend, useful_threads
from lmc.cache.transfer.layout import KVLayout, Layer, Piece, Region
from lmc.cache.transfer.pinned import Slab
from lmc.cache.transfer.planner import Direction, plan
from lmc.probe.show import transfer_figure, transfer_table
from lmc.probe.transfer import PIECE_SIZES, Probe, probe_device, scattered
from lmc.report import Column, Report, Section, Table, print_table, report_html, report_markdown, to_json, write_file

PLAN_BAR_S = 1e-3  # for 10,000 descriptors
SLAB_BYTES = 1 << 30


@dataclass(frozen=True)
class Bar:
    what: str
    measured: float
    wanted: float
    unit: str
    at_least: bool = True

    @property
    def reached(self) -> bool:
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


def rate_bars(probe: Probe) -> list[Bar]:
    """The best backend of each size and direction by the limit."""
    bars = []
    for direction in ("store", "load"):
        for size in sorted({row.piece_bytes for row in probe.rows}):
            rows = [row for row in probe.rows if row.direction == direction and row.piece_bytes == size]
            wanted = rate_bar(probe.device, direction, size)
            if wanted is not None:
                best = max(rows, key=lambda row: row.share)
                bars.append(Bar(f"{best.backend}, {direction}, {size >> 10} KiB", best.share, wanted, "of the limit"))
    return bars


def rate_bar(device: str, direction: str, size: int) -> float | None:
    if device == "cpu":
        return 0.9 if size >= 64 << 10 else 0.6 if size == 8 << 10 else None
    return 0.9 if size >= 32 << 10 else 0.7 if size == 8 << 10 and direction == "load" else None


def plan_bars(repetitions: int) -> list[Bar]:
    """Scattered blocks, so that nothing merges: layers x blocks descriptors."""
    bars = []
    for layers, chunks, blocks_per_chunk in ((40, 16, 16), (80, 8, 16), (2, 320, 16)):
        layout = layered_layout(layers, num_blocks=8192, page_bytes=32 << 10)
        ids = np.random.default_rng(0).permutation(8192)[: chunks * blocks_per_chunk].astype(np.int64)
        slots = (1 << 45) + np.arange(chunks, dtype=np.uint64) * np.uint64(layout.block_bytes * blocks_per_chunk)
        for direction in Direction:
            times = []
            for _ in range(repetitions):
                started = time.perf_counter()
                copies = plan(layout, ids, slots, direction)
                times.append(time.perf_counter() - started)
            what = f"plan of {len(copies):,} descriptors, {layers} layers, {direction}"
            bars.append(Bar(what, statistics.median(times) * 1e3, PLAN_BAR_S * 1e3, "ms", at_least=False))
    return bars


def layered_layout(layers: int, num_blocks: int, page_bytes: int) -> KVLayout:
    """Addresses only; nothing is read."""
    pitch = num_blocks * page_bytes
    regions = tuple(Region((1 << 40) + layer * pitch, page_bytes, page_bytes) for layer in range(layers))
    names = tuple(Layer((str(index),), (Piece(index, 0, page_bytes),)) for index in range(layers))
    return KVLayout("vllm", "cpu", 16, num_blocks, regions, names, "benchmark")


def calibration_bar() -> Bar:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        useful_threads()
        times.append((time.perf_counter() - started) * 1e3)
    return Bar("calibration of the host backend", statistics.median(times), 100.0, "ms", at_least=False)


def torch_table(sizes: Sequence[int], total_bytes: int, repetitions: int) -> Table:
    """What one would write without a transfer layer: index_select into a chunk, index_copy_ back."""
    torch.set_num_threads(1)
    blocks, slots = (torch.ones(total_bytes, dtype=torch.uint8) for _ in range(2))
    backend = HostBackend()
    rows = []
    for size in sizes:
        count = total_bytes // size
        order = torch.from_numpy(np.random.default_rng(size).permutation(count))
        cache, chunk = blocks.view(count, size), slots.view(count, size)
        for direction in Direction:
            copies = scattered(blocks.data_ptr(), slots.data_ptr(), total_bytes, size, direction)
            times: dict[str, list[float]] = {"torch": [], "host": []}
            for _ in range(repetitions + 1):
                started = time.perf_counter()
                if direction is Direction.STORE:
                    torch.index_select(cache, 0, order, out=chunk)
                else:
                    cache.index_copy_(0, order, chunk)
                between = time.perf_counter()
                backend.execute(copies)
                times["torch"].append(between - started)
                times["host"].append(time.perf_counter() - between)
            host, plain = (total_bytes / statistics.median(times[name][1:]) / 1e9 for name in ("host", "torch"))
            rows.append((str(direction), f"{size >> 10} KiB", host, plain, host / plain))
    columns = [
        Column("direction"),
        Column("piece"),
        Column("host", "GB/s", 1),
        Column("torch", "GB/s", 1),
        Column("ratio"),
    ]
    note = "torch: index_select and index_copy_. One thread each, medians, by turns."
    return Table("The same blocks with plain torch indexing", columns, rows, note)


def slab_table() -> Table:
    """How a slab starts: what the caller waits for, and when all of it is ready."""
    rows = []
    for _ in range(3):
        started = time.perf_counter()
        slab = Slab(SLAB_BYTES >> 20, 1 << 20)
        returned = time.perf_counter() - started
        slab.wait()
        rows.append((f"{SLAB_BYTES >> 20} MiB", returned * 1e3, time.perf_counter() - started))
        slab.close()
        del slab  # unmapping is not the next one's start
    columns = [Column("slab"), Column("constructor", "ms", 2), Column("all slots ready", "s", 2)]
    return Table(
        "Start of the host slab, three times", columns, rows, "Pages are touched in the background, without the GIL."
    )


def bar_table(bars: Sequence[Bar]) -> Table:
    rows = [(bar.what, bar.measured, bar.wanted, bar.unit, "reached" if bar.reached else "MISSED") for bar in bars]
    return Table("Bars", [Column("what"), Column("measured"), Column("bar"), Column("unit"), Column("verdict")], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    metadata = {
        "command": " ".join(["python -m benchmarks.transfer", *sys.argv[1:]]),
        **describe_hardware(),
        **describe_software(),
    }
    probe = probe_device(options.device, PIECE_SIZES, repetitions=options.repetitions)
    bars = rate_bars(probe) + plan_bars(repetitions=200)
    tables = [transfer_table(probe)]
    if probe.device == "cpu":
        bars.append(calibration_bar())
        tables += [torch_table((8 << 10, 64 << 10, 1 << 20), 64 << 20, options.repetitions), slab_table()]
    summary = bar_table(bars)
    for table in (*tables, summary):
        print_table(table)
    reached = all(bar.reached for bar in bars)
    if options.out is not None:
        head = f"{sum(bar.reached for bar in bars)} of {len(bars)} bars reached on {probe.device}."
        if probe.device == "cpu":
            head += " No GPU was at hand: nothing here says how the dma, kernel and staged backends perform."
        sections = [Section("Bars", items=[summary]), Section("Rates", items=[transfer_figure(probe), *tables])]
        report = Report(f"Transfers on {probe.device}", head, sections, metadata)
        write_file(options.out / "report.md", report_markdown(report))
        write_file(options.out / "report.html", report_html(report))
        write_file(
            options.out / "result.json",
            to_json(
                {**asdict(probe), "bars": [{**asdict(bar), "reached": bar.reached} for bar in bars], "made": metadata}
            ),
        )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
