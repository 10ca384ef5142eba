"""Does `lmc sim replay --cost` predict an engine under load? Three loads on a real engine, each replayed on a virtual clock.

    python -m benchmarks.sim_under_load --out reports/sim-under-load
    python -m benchmarks.sim_under_load --out reports/sim-under-load --from reports/sim-under-load    # replay again, no engine

The loads are bursts of prompts with a shared prefix, six clients at a time, and arrivals faster than the engine computes. Each runs once
without a cache and once with lmc. The cost model is fitted on the runs without a cache only: its shape from the requests that the engine
computed alone, its scale from the median time to first token of the load. Then the run with lmc is predicted from the arrivals, the
prompts and that model. Exits with 1 when a bound is missed: hits within a point, TTFT p50 and p90 within 15 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmc.bench.machine import describe_hardware
from lmc.bench.records import RequestRecord, read_records, write_results
from lmc.bench.run import RunOptions, run_workload
from lmc.bench.workload import Workload
from lmc.cache.config import CacheConfig
from lmc.model import EMBEDDED, resolve_model
from lmc.report import Cell, Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.sim.build import TraceBuilder
from lmc.sim.cost import CostModel, Prefill, TierCost, fit_prefill
from lmc.sim.engine_model import Decode, EngineModel
from lmc.sim.full_replay import Fleet, ReplayResult, replay_fleet
from lmc.sim.trace import Trace

BLOCK = 128  # tokens of a block of vLLM on a CPU, a trace block and a chunk
SEQS, BATCHED = 4, 512
OUTPUT_TOKENS = 8
HOST_CHUNKS = 400
CHUNK_BYTES = BLOCK * 2 * 30 * 3 * 64 * 4  # SmolLM2-135M in float32: 30 layers, 3 heads of 64
HITS_WITHIN, TTFT_WITHIN = 0.01, 0.15
LOADS: dict[str, dict[str, Any]] = {  # Any: YAML
    "bursts": {"kind": "trace"},
    "six-clients": {"kind": "closed", "concurrency": 6},
    "saturated": {"kind": "poisson", "rate": 1.5},
}
ALONE: dict[str, Any] = {"kind": "closed", "concurrency": 1}


@dataclass(frozen=True)
class Row:
    """A prompt of a load: its arrival if the load has times, and its trace blocks."""

    at_ms: float
    chain: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    load: str
    requests: int
    measured_hits: float  # hit tokens / prompt tokens
    predicted_hits: float
    measured_ttft_s: tuple[float, float]  # p50, p90
    predicted_ttft_s: tuple[float, float]

    @property
    def ok(self) -> bool:
        pairs = zip(self.predicted_ttft_s, self.measured_ttft_s, strict=True)
        close = all(abs(predicted / measured - 1) <= TTFT_WITHIN for predicted, measured in pairs)
        return close and abs(self.predicted_hits - self.measured_hits) <= HITS_WITHIN


def rows_of(load: str) -> list[Row]:
    """Bursts of six prompts that share three blocks; otherwise chats whose turns grow by a block."""
    if load == "alone":
        return [Row(0.0, tuple(1000 * n + k for k in range(1 + n % 6))) for n in range(12)]
    if load == "bursts":
        return [
            Row(9000.0 * burst, (*(100 * burst + k for k in range(3)), 100 * burst + 10 + n))
            for burst in range(6)
            for n in range(6)
        ]
    chats = [[100_000 * (chat + 1)] for chat in range(8)]
    rows = []
    for number in range(36):
        chat = chats[(number * 5) % 8]
        chat.append(chat[0] + len(chat))
        rows.append(Row(0.0, (1, *chat)))
    return rows


def workload_of(name: str, file: Path, load: dict[str, Any]) -> Workload:  # Any: YAML
    cache = {"host": {"capacity": HOST_CHUNKS * CHUNK_BYTES}, "chunk_tokens": BLOCK}
    args = ["--enforce-eager", "--dtype", "float32", "--no-enable-prefix-caching"]
    args += ["--max-num-seqs", str(SEQS), "--max-num-batched-tokens", str(BATCHED)]
    none = {"reuse": "none"}
    return Workload.model_validate(
        {
            "name": f"sim-{name}",
            "seed": 1,
            "parts": {
                "load": {
                    "source": {
                        "kind": "trace",
                        "path": str(file.resolve()),
                        "block_tokens": BLOCK,
                        "tokens_per_block": BLOCK,
                    },
                    "output_tokens": OUTPUT_TOKENS,
                }
            },
            "load": load,
            "engine": {"context": 2048, "args": args, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
            "arms": {"none": none} if name == "alone" else {"none": none, "lmc": {"reuse": "cache", "cache": cache}},
        }
    )


def run_load(name: str, folder: Path) -> list[RequestRecord]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "load.jsonl"
        lines = [
            {
                "timestamp": row.at_ms,
                "input_length": len(row.chain) * BLOCK - 9,
                "output_length": OUTPUT_TOKENS,
                "hash_ids": row.chain,
            }
            for row in rows_of(name)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plan = workload_of(name, file, LOADS.get(name, ALONE))
        results, records = run_workload(plan, RunOptions(Path(scratch), EMBEDDED, resolve_model(EMBEDDED)))
    write_results(folder / name, results, records)
    return records


def trace_of(name: str, records: Sequence[RequestRecord]) -> Trace:
    """The requests as they were sent."""
    rows = rows_of(name)
    builder = TraceBuilder(name, "bench", BLOCK, sort=True)
    for number, record in enumerate(sorted(records, key=lambda record: record.sent_s)):
        chain = rows[int(record.request_id.split("/")[1])].chain
        full = chain[: record.prompt_tokens // BLOCK]
        builder.add(number + 1, full, record.sent_s, record.prompt_tokens, record.output_tokens)
    return builder.finish()


def of_arm(records: Sequence[RequestRecord], arm: str) -> list[RequestRecord]:
    return [record for record in records if record.arm == arm and record.ok]


def fit(alone: Sequence[RequestRecord]) -> CostModel:
    """The shape of the cost model, from requests that were computed alone."""
    prefill = fit_prefill(
        [0] * len(alone),
        [record.prompt_tokens for record in alone],
        [(record.service_ttft_ms or 0.0) / 1e3 for record in alone],
    )
    gaps = [gap / 1e3 for record in alone for gap in record.itl_ms]
    engine = EngineModel(SEQS, BATCHED, decode=Decode(fixed_s=float(np.median(gaps))))
    return CostModel(prefill, CHUNK_BYTES // BLOCK, {"host": TierCost("host", 4e9)}, engine=engine)


def scaled(cost: CostModel, factor: float) -> CostModel:
    prefill, decode = cost.prefill, cost.engine.decode
    assert decode is not None
    slower = Prefill(prefill.fixed_s * factor, prefill.token_s * factor, prefill.pair_s * factor)
    return replace(cost, prefill=slower, engine=replace(cost.engine, decode=Decode(decode.fixed_s * factor)))


def replayed(trace: Trace, cost: CostModel, cached: bool) -> ReplayResult:
    chunks = HOST_CHUNKS if cached else 1
    settings = {"host": {"capacity": chunks * CHUNK_BYTES}, "chunk_tokens": BLOCK}
    if not cached:
        settings["min_load_tokens"] = 1 << 40
    return replay_fleet(trace, CacheConfig.model_validate(settings), CHUNK_BYTES, Fleet(cost=cost))


def calibrate(cost: CostModel, trace: Trace, measured_s: float) -> CostModel:
    """The model at the speed that the machine had: the median TTFT without a cache is as measured."""
    low, high = 0.2, 5.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        found = float(np.median(replayed(trace, scaled(cost, middle), cached=False).ttft_s))
        low, high = (middle, high) if found < measured_s else (low, middle)
    return scaled(cost, (low * high) ** 0.5)


def ttft(records: Sequence[RequestRecord]) -> tuple[float, float]:
    values = [(record.service_ttft_ms or 0.0) / 1e3 for record in sorted(records, key=lambda record: record.sent_s)]
    return float(np.percentile(values, 50)), float(np.percentile(values, 90))


def judge(load: str, records: Sequence[RequestRecord], shape: CostModel) -> Verdict:
    none, lmc = of_arm(records, "none"), of_arm(records, "lmc")
    cost = calibrate(shape, trace_of(load, none), ttft(none)[0])
    result = replayed(trace_of(load, lmc), cost, cached=True)
    total = sum(record.prompt_tokens for record in lmc)
    p50, p90 = (float(np.percentile(result.ttft_s, p)) for p in (50, 90))
    hits = sum(result.hits("all").values()) / total
    measured = sum(record.cached_tokens or 0 for record in lmc) / total
    return Verdict(load, len(lmc), measured, hits, ttft(lmc), (p50, p90))


def table(verdicts: Sequence[Verdict]) -> Table:
    rows: list[list[Cell]] = [
        [
            verdict.load,
            verdict.requests,
            100 * verdict.measured_hits,
            100 * verdict.predicted_hits,
            *(value for pair in zip(verdict.measured_ttft_s, verdict.predicted_ttft_s, strict=True) for value in pair),
            "yes" if verdict.ok else "no",
        ]
        for verdict in verdicts
    ]
    columns = [
        Column("load"),
        Column("requests"),
        Column("hits, measured", "% of tokens"),
        Column("hits, replayed", "% of tokens"),
        Column("TTFT p50, measured", "s"),
        Column("TTFT p50, replayed", "s"),
        Column("TTFT p90, measured", "s"),
        Column("TTFT p90, replayed", "s"),
        Column("within the bounds"),
    ]
    note = f"Bounds: hits within {HITS_WITHIN:.0%} of the tokens, TTFT within {TTFT_WITHIN:.0%}."
    return Table("Measured and replayed under load", columns, rows, note)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="source", type=Path, help="replay the runs of this folder again")
    options = parser.parse_args()
    names = ["alone", *LOADS]
    if options.source is not None:
        records = {name: read_records(options.source / name) for name in names}
    else:
        records = {name: run_load(name, options.out) for name in names}
    shape = fit(of_arm(records["alone"], "none"))
    verdicts = [judge(load, records[load], shape) for load in LOADS]
    shown = table(verdicts)
    print_table(shown)
    command = "python -m benchmarks.sim_under_load --out reports/sim-under-load"
    about = (
        "The cost model was fitted without lmc: its shape on requests alone, its scale on each load without a cache."
    )
    page = Report("lmc sim against an engine under load", about, [Section("Result", "", [shown])], {"command": command})
    write_file(options.out / "report.md", report_markdown(page))
    outcome = {"verdicts": [asdict(verdict) for verdict in verdicts], "machine": describe_hardware()}
    write_file(options.out / "results.json", to_json(outcome))
    return 0 if all(verdict.ok for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
