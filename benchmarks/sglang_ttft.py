"""Time to first token on SGLang: cold, device hit, and lmc hit from host memory, in turn, on one server.

    .venvs/sglang/bin/python -m benchmarks.sglang_ttft [--model MODEL] [--tokens 2000] [--rounds 7] [--out reports/sglang-ttft]

Exits with 1 when a ratio is beyond its bound. A ratio is the median over the rounds of one round's ratio, so that a busy machine, which
slows all three alike, disturbs it little.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path

from lmc.bench.machine import describe_hardware, describe_software
from lmc.model import EMBEDDED
from lmc.report import Column, Report, Section, Table, print_table, report_html, report_markdown, to_json, write_file
from tests.engines.sglang_server import SglangServer

KINDS = ("cold", "device hit", "host hit")
BOUNDS = {("host hit", "device hit"): 1.3, ("host hit", "cold"): 0.4}


Round = dict[str, float]  # kind -> seconds to the first token


def measure(model: str, tokens: int, vocabulary: int, rounds: int) -> list[Round]:
    """A prompt per round, new to everybody; the first round warms up and is left out."""
    measured = []
    with (
        tempfile.TemporaryDirectory() as folder,
        SglangServer(model, Path(folder), settings={"host.capacity": "2GiB"}) as server,
    ):
        for number in range(rounds + 1):
            generator = random.Random(number)
            prompt = [generator.randrange(2, vocabulary) for _ in range(tokens)]
            server.flush()
            cold, device = server.generate(prompt, max_tokens=1), server.generate(prompt, max_tokens=1)
            server.settle()
            server.flush()
            host = server.generate(prompt, max_tokens=1)
            assert cold["device"] == cold["loaded"] == host["device"] == 0
            assert device["device"] == host["loaded"] > tokens * 0.9
            assert cold["tokens"] == device["tokens"] == host["tokens"]
            answers = zip(KINDS, (cold, device, host), strict=True)
            measured.append({kind: answer["seconds"] for kind, answer in answers})
    return measured[1:]


def ratio(rounds: list[Round], one: str, other: str) -> float:
    return statistics.median(turn[one] / turn[other] for turn in rounds)


def tables(rounds: list[Round]) -> list[Table]:
    times = []
    for kind in KINDS:
        seconds = sorted(turn[kind] for turn in rounds)
        times.append((kind, statistics.median(seconds), seconds[0], seconds[-1]))
    verdicts = []
    for (one, other), bound in BOUNDS.items():
        found = ratio(rounds, one, other)
        verdicts.append((f"{one} / {other}", found, bound, "reached" if found <= bound else "MISSED"))
    columns = [Column("prompt"), Column("median", "s", 3), Column("lowest", "s", 3), Column("highest", "s", 3)]
    bars = [Column("ratio"), Column("median", "", 2), Column("at most", "", 2), Column("verdict")]
    return [Table("Bars", bars, verdicts), Table("Time to first token", columns, times)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="folder or name")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--vocabulary", type=int, default=512, help="prompts are random ids below this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks.sglang_ttft", *sys.argv[1:]])
    metadata = {"command": command, **describe_hardware(), **describe_software()}
    rounds = measure(options.model, options.tokens, options.vocabulary, options.rounds)
    shown = tables(rounds)
    for table in shown:
        print_table(table)
    if options.out is not None:
        head = (
            f"A prompt of {options.tokens:,} tokens on the model {options.model}, {len(rounds)} rounds in turn on one SGLang server: "
            "computed from its first token, held by SGLang's own cache, and loaded from lmc's host memory after SGLang's cache was emptied."
        )
        report = Report("Time to first token on SGLang", head, [Section("Result", items=shown)], metadata)
        write_file(options.out / "report.md", report_markdown(report))
        write_file(options.out / "report.html", report_html(report))
        write_file(options.out / "result.json", to_json({"rounds": rounds, "made": metadata}))
    return int(any(ratio(rounds, *pair) > bound for pair, bound in BOUNDS.items()))


if __name__ == "__main__":
    sys.exit(main())
