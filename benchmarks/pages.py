"""A node's memory in extents or in pages: python -m benchmarks.pages [--repetitions 15] [--quick] [--out reports/pages].

A chunk's slot is either one piece of an extent, or a list of pages of a fixed size that lie anywhere, as they do after a while. The blocks
are the same for both, and so are the bytes. Each copy is planned and executed by the host backend; both forms take turns, and each
figure is that of the quickest turn, since other work on the machine only ever adds time. With pages, descriptors end where a page ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.transfer.backends.host import HostBackend
from lmc.cache.transfer.layout import KVLayout, Layer, Piece, Region
from lmc.cache.transfer.planner import Descriptors, Direction, plan
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file

BLOCK_BYTES = 2 << 20  # 16 tokens of 128 KiB
BLOCKS_PER_CHUNK = 8
LAYERS = 32
PAGES = (64 << 10, 256 << 10, 2 << 20)
_TOUCHED = np.uint8(1)


@dataclass(frozen=True)
class Outcome:
    blocks: str
    direction: str
    slot: str
    descriptors: int
    plan_us: float
    gb_per_s: float


def whole_blocks(base: int, count: int) -> KVLayout:
    """A block is one piece."""
    return KVLayout(
        "vllm", "cpu", 16, count, (Region(base, BLOCK_BYTES, BLOCK_BYTES),), (Layer(("0",), (Piece(0, 0, BLOCK_BYTES),)),), "pages"
    )  # fmt: skip


def by_layer(base: int, count: int) -> KVLayout:
    """Each layer has a tensor of its own."""
    size = BLOCK_BYTES // LAYERS
    regions = tuple(Region(base + layer * count * size, size, size) for layer in range(LAYERS))
    layers = tuple(Layer((str(index),), (Piece(index, 0, size),)) for index in range(LAYERS))
    return KVLayout("vllm", "cpu", 16, count, regions, layers, "pages")


def on_pages(copies: Descriptors, base: int, pages: npt.NDArray[np.uint64], page: int) -> Descriptors:
    """The same copies where the memory from `base` on lies in pages at these addresses."""
    offsets = (copies.slots - np.uint64(base)).astype(np.int64)
    ends = offsets + copies.size.astype(np.int64)
    first = offsets // page
    parts = (ends - 1) // page - first + 1
    of = np.repeat(np.arange(len(parts)), parts)
    number = first[of] + np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    begin, end = np.maximum(offsets[of], number * page), np.minimum(ends[of], (number + 1) * page)
    blocks = copies.blocks[of] + (begin - offsets[of]).astype(np.uint64)
    slots = pages[number] + (begin - number * page).astype(np.uint64)
    src, dst = (blocks, slots) if copies.direction is Direction.STORE else (slots, blocks)
    return Descriptors(src, dst, (end - begin).astype(np.uint64), copies.direction)


def measure(num_chunks: int, repetitions: int) -> list[Outcome]:
    count = 2 * num_chunks * BLOCKS_PER_CHUNK
    total = num_chunks * BLOCKS_PER_CHUNK * BLOCK_BYTES
    kv, memory = np.full(2 * total, _TOUCHED), np.full(total, _TOUCHED)
    base, backend, random = memory.ctypes.data, HostBackend(), np.random.default_rng(1)
    slots = np.uint64(base) + np.arange(num_chunks, dtype=np.uint64) * np.uint64(BLOCKS_PER_CHUNK * BLOCK_BYTES)
    ordered = np.arange(num_chunks * BLOCKS_PER_CHUNK, dtype=np.int64)
    anywhere = random.permutation(count)[: len(ordered)].astype(np.int64)
    placed = {
        page: np.uint64(base) + random.permutation(total // page).astype(np.uint64) * np.uint64(page) for page in PAGES
    }
    outcomes = []
    for name, layout, ids in (
        ("in one piece, side by side", whole_blocks(kv.ctypes.data, count), ordered),
        ("in one piece, anywhere", whole_blocks(kv.ctypes.data, count), anywhere),
        ("layer by layer, anywhere", by_layer(kv.ctypes.data, count), anywhere),
    ):
        for direction in Direction:
            times: dict[int, list[tuple[float, float, int]]] = {size: [] for size in (0, *PAGES)}
            for _ in range(repetitions + 1):
                for size in times:
                    started = time.perf_counter()
                    copies = plan(layout, ids, slots, direction)
                    if size:
                        copies = on_pages(copies, base, placed[size], size)
                    between = time.perf_counter()
                    backend.execute(copies)
                    times[size].append((between - started, time.perf_counter() - between, len(copies)))
            for size, rows in times.items():
                planned, copied, number = (min(column) for column in zip(*rows[1:], strict=True))
                slot = f"pages of {size >> 10} KiB" if size else "extent"
                outcomes.append(Outcome(name, str(direction), slot, int(number), planned * 1e6, total / copied / 1e9))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="little memory, two repetitions: to see that it runs")
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = measure(2, 2) if options.quick else measure(16, options.repetitions)
    columns = [Column("blocks"), Column("direction"), Column("slot"), Column("descriptors"), Column("plan", "us", 0)]
    columns += [Column("copy", "GB/s", 2)]
    chunks = f"Chunks of {BLOCKS_PER_CHUNK} blocks of {BLOCK_BYTES >> 10} KiB"
    table = Table("Slots in extents and in pages", columns, [list(asdict(one).values()) for one in outcomes], chunks)
    print_table(table)
    if options.out is not None:
        command = " ".join(["python -m benchmarks.pages", *sys.argv[1:]])
        metadata = {"command": command, **describe_hardware(), **describe_software()}
        page = Report(
            "Extents and pages", "What a chunk in fixed pages costs.", [Section("Results", items=[table])], metadata
        )
        write_file(options.out / "report.md", report_markdown(page))
        write_file(options.out / "results.json", to_json({"outcomes": outcomes, "metadata": metadata}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
