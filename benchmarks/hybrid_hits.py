"""What checkpoints are worth: hits of a model with windows at equal bytes, beside those of a cache that stores every group's every chunk.

python -m benchmarks.hybrid_hits [--out reports/hybrid-hits]. Needs LMC_DATA_DIR. Mooncake's conversation trace, in chunks of 512 tokens,
goes through the live cache's directory (`lmc sim replay`), LRU, no disk. The model is like Gemma 3: one group of layers keeps all tokens,
five keep a window of two chunks, and a part of each takes one unit of memory. Hits are those of the second half of the requests. Exit code
1 when some capacity gives less than BAR times the hits of storing everything.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.config import CacheConfig
from lmc.cache.parts import Group
from lmc.cache.shape import ModelShape
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.sim.formats import read_trace
from lmc.sim.full_replay import Fleet, replay_fleet
from lmc.sim.replay_show import replay_settings
from lmc.sim.trace import Trace, coarsen

CHUNK = 512
WINDOWS = 5
UNIT = 1 << 20  # bytes of a part
UNITS = (10_000, 40_000)
BAR = 2.5


def settings(units: int, **values: object) -> CacheConfig:
    return CacheConfig.model_validate(
        {"host": {"capacity": units * UNIT}, "chunk_tokens": CHUNK, "metrics": {"enabled": False}, **values}
    )


def everything(trace: Trace, units: int) -> float:
    """Each chunk in all groups: as a plain model whose chunks take so many units."""
    result = replay_fleet(trace, settings(units), (1 + WINDOWS) * UNIT, Fleet())
    return result.hits("last-half")["host"] / result.total_tokens("last-half")


def checkpoints(trace: Trace, units: int, tokens: int | None) -> float:
    shape = ModelShape((Group("full", CHUNK), *[Group("window", CHUNK, 2 * CHUNK)] * WINDOWS), (UNIT,) * (1 + WINDOWS))
    result = replay_settings(trace, settings(units, checkpoint_tokens=tokens), shape=shape)
    return result.hits("last-half")["host"] / result.total_tokens("last-half")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    trace = coarsen(read_trace(Path(os.environ["LMC_DATA_DIR"]) / "mooncake_conversation_trace.jsonl.gz"), CHUNK)
    rows = []
    for units in UNITS:
        plain, kept = everything(trace, units), checkpoints(trace, units, None)
        dense = checkpoints(trace, units, CHUNK)
        rows.append([units, 100 * plain, 100 * dense, 100 * kept, kept / plain, BAR, kept >= BAR * plain])
    columns = [
        Column("units", decimals=0),
        Column("every group's every chunk", "%"),
        Column("a checkpoint at every chunk", "%"),
    ]
    columns += [Column("lmc's default", "%"), Column("times"), Column("bar"), Column("reached")]
    table = Table("Hits of the second half, in input tokens", columns, rows, f"{trace.num_requests:,} requests.")
    print_table(table)
    if options.out is not None:
        missed = [f"{row[0]:,}" for row in rows if not row[-1]]
        summary = f"The bar is missed at {', '.join(missed)} units." if missed else "All bars are met."
        command = "python -m benchmarks.hybrid_hits " + " ".join(sys.argv[1:])
        page = Report(
            "Hits of a model with windows",
            summary,
            [Section("Results", "", [table])],
            {"command": command.strip()} | describe_hardware() | describe_software(),
        )
        write_file(options.out / "report.md", report_markdown(page))
        write_file(options.out / "results.json", to_json({"rows": rows, "metadata": page.metadata}))
    return int(not all(row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
