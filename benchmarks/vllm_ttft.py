"""Time to first token on vLLM by where the prompt's KV lies: python -m benchmarks.vllm_ttft [--model MODEL] [--out reports/vllm-ttft].

Cold, vLLM's own prefix cache, and lmc's host, disk (files in the page cache) and Redis on this machine. One engine has a disk, a second one
Redis; each measures its own tiers and the device hit in turn, so that a busy machine slows all alike. The host tier holds one prompt,
so that the other one comes from the tier below. In a third engine the disk stops to answer; once it is left alone, prompts that lie there
are measured in turn with prompts that nobody sent before. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmc.bench.machine import describe_hardware, describe_software
from lmc.model import EMBEDDED, resolve_model
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from tests import services
from tests.engines.scenario import TOKEN, kv_bytes_per_token, wish
from tests.engines.vllm_driver import VllmDriver

BARS = {"host": 1.1, "disk": 1.5, "redis": 2.0}  # of the device hit in the same engine
LEFT_ALONE, LEFT_ALONE_BAR = "disk that hangs", 1.05  # of a cold prompt in the same engine
COLD = 3  # prompts per engine
BLOCK = 128
EXPLAIN = wish(explain=True)


@dataclass
class Measured:
    """Seconds to the first token in one engine, by where the prompt's KV came from."""

    tier: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, source: str, seconds: float) -> None:
        self.seconds.setdefault(source, []).append(seconds)

    def median(self, source: str) -> float:
        return statistics.median(self.seconds[source])


def measure(model: Path, tier: str, settings: dict[str, Any], tokens: int, rounds: int) -> Measured:
    generator = random.Random(tier)
    prompts = [[generator.randrange(5, 5_000) for _ in range(tokens)] for _ in range(COLD)]
    measured = Measured(tier)
    options = {"block_size": BLOCK, "max_model_len": tokens + BLOCK, "max_num_batched_tokens": tokens + BLOCK}
    with VllmDriver(model, settings=settings, enable_prefix_caching=True, **options) as engine:

        def first_token(prompt: list[int], source: str) -> None:
            seconds, hits = engine.call("first_token", prompt=prompt, extra_args=EXPLAIN)
            held = {name: number for name, number in hits.items() if number}
            assert held == ({} if source == "cold" else {source: (tokens - 1) // BLOCK * BLOCK}), (source, held)
            measured.add(source, seconds)

        engine.generate([list(range(5, 5 + 2 * BLOCK))], max_tokens=2)  # warms up
        engine.call("settle")  # a slot whose chunk is being written holds nothing new
        engine.call("reset_device")
        for prompt in prompts:
            first_token(prompt, "cold")
            engine.call("settle")
        for number in range(rounds):
            prompt = prompts[number % 2]  # never the one that came last
            for source in (tier, "device", "host"):
                if source != "device":
                    engine.call("reset_device")
                first_token(prompt, source)
            engine.call("settle")
    return measured


def measure_hung(model: Path, settings: dict[str, Any], marker: Path, tokens: int, rounds: int) -> Measured:
    generator = random.Random(LEFT_ALONE)

    def fresh() -> list[int]:
        return [generator.randrange(5, 5_000) for _ in range(tokens)]

    stored = [fresh() for _ in range(COLD)]
    measured = Measured(LEFT_ALONE)
    options = {"block_size": BLOCK, "max_model_len": tokens + BLOCK, "max_num_batched_tokens": tokens + BLOCK}
    with VllmDriver(model, settings=settings, enable_prefix_caching=True, **options) as engine:
        for prompt in stored:
            engine.generate([prompt], max_tokens=1)
            engine.call("settle")
        engine.call("hang_disk_while", marker=str(marker))
        marker.touch()
        try:
            for number in range(-COLD, rounds):  # the first of them until it is left alone
                for source, prompt in (("cold", fresh()), (LEFT_ALONE, stored[number % COLD])):
                    engine.call("reset_device")
                    seconds, hits = engine.call("first_token", prompt=prompt, extra_args=EXPLAIN)
                    assert not any(hits.values()), hits
                    if number >= 0:
                        measured.add(source, seconds)
        finally:
            marker.unlink()
    return measured


def measure_all(model: Path, tokens: int, rounds: int) -> list[Measured]:
    chunk_bytes = kv_bytes_per_token(model) * BLOCK
    common = {
        "chunk_tokens": BLOCK,
        "host.capacity": tokens // BLOCK * chunk_bytes,
        "metrics.enabled": False,
        "strict": True,
        "admin.token": TOKEN,
    }
    with tempfile.TemporaryDirectory() as name, services.redis_server(Path(name)) as server:
        below = {"disk": {"disk.path": str(Path(name) / "disk")}, "redis": {"redis.url": server.url}}
        hung = common | {"disk.path": str(Path(name) / "hung")}
        return [
            *(measure(model, tier, common | settings, tokens, rounds) for tier, settings in below.items()),
            measure_hung(model, hung, Path(name) / "marker", tokens, rounds),
        ]


def ratios(measured: list[Measured]) -> list[tuple[str, str, float, float, bool]]:
    """Tier, compared with, ratio in its engine (the host's: of both engines, the worse), bar, met."""
    *working, hung = measured
    found = {one.tier: one.median(one.tier) / one.median("device") for one in working}
    found["host"] = max(one.median("host") / one.median("device") for one in working)
    left_alone = hung.median(LEFT_ALONE) / hung.median("cold")
    return [
        *((tier, "device hit", found[tier], bar, found[tier] <= bar) for tier, bar in BARS.items()),
        (LEFT_ALONE, "cold prompt", left_alone, LEFT_ALONE_BAR, left_alone <= LEFT_ALONE_BAR),
    ]


def as_report(measured: list[Measured], tokens: int, model: str) -> Report:
    judged = Table(
        "Ratios",
        [Column("tier"), Column("compared with"), Column("TTFT / that"), Column("at most"), Column("reached")],
        ratios(measured),
    )
    rows = [
        (
            one.tier,
            source,
            len(values),
            one.median(source) * 1e3,
            min(values) * 1e3,
            one.median("cold") / one.median(source),
        )
        for one in measured
        for source, values in one.seconds.items()
    ]
    times = Table(
        "Times",
        [
            *(Column(name) for name in ("engine with", "KV from", "times")),
            *(Column("median", "ms"), Column("fastest", "ms"), Column("cold / this")),
        ],
        rows,
        note=f"One prompt of {tokens:,} tokens at a time; seconds from the call to the first token, without HTTP.",
    )
    command = "python -m benchmarks.vllm_ttft " + " ".join(sys.argv[1:])
    metadata = {"command": command.strip(), "model": model} | describe_hardware() | describe_software()
    missed = [tier for tier, *_, met in ratios(measured) if not met]
    summary = f"Bars missed: {', '.join(missed)}." if missed else "All bars are met."
    return Report("TTFT on vLLM by tier", summary, [Section("Results", "", [judged, times])], metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="folder or name")
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    measured = measure_all(resolve_model(options.model), options.tokens, options.rounds)
    report = as_report(measured, options.tokens, options.model)
    for table in report.sections[0].items:
        assert isinstance(table, Table)
        print_table(table)
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(options.out / "results.json", to_json({"measured": measured, "metadata": report.metadata}))
    return int(not all(met for *_, met in ratios(measured)))


if __name__ == "__main__":
    sys.exit(main())
