"""Greedy tokens with and without lmc on a real engine: python -m benchmarks.equality [WORKLOAD...] [--model MODEL] [--out FOLDER].

Prompts of the workload files go through vLLM with nothing but its own prefix cache, then with lmc, each workload in one of the scenarios of
tests/engines/equality.py: random concurrency, a tiny KV space that forces preemptions, random aborts and resets, tiers and copies that
fail. Exit code 1 when a token or log-probability differs other than behind a tie, or something is left over. What earlier calls wrote
about other workloads to FOLDER stays in the report.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson
import yaml

from lmc.bench.machine import describe_hardware, describe_software
from lmc.bench.prompts import build_prompts
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Workload, overlay
from lmc.model import EMBEDDED, resolve_model
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from tests.engines.equality import CHANCES, SCENARIOS, Verdict, run_scenario
from tests.engines.scenario import TIE
from tests.engines.vllm_driver import VllmDriver

FOLDER = Path(__file__).parents[1] / "workloads"
CONTEXT, BLOCKS, CONCURRENCY, HOST, DISK = (
    896,
    96,
    12,
    "96MiB",
    "192MiB",
)  # KV space for a third of the requests that may run
BATCHED_TOKENS = 256

# Workload file, what is changed of it so that a CPU gets through, and the scenario it runs in.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "function-calling": (
        {"tools": {"pick": {"groups": 60, "per_group": 3, "min_prompt_tokens": 150, "max_prompt_tokens": 800}}},
        0,
    ),
    "multi-turn-chat": ({"chat": {"pick": {"sessions": 70}}}, 1),
    "document-qa": ({"questions": {"pick": {"groups": 7, "per_group": 14, "max_prompt_tokens": 660}}}, 2),
}


def requests_of(name: str, model: Path) -> list[dict[str, Any]]:
    """All requests of a workload, turn by turn, with outputs long enough to cross a block's end."""
    document = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    workload = Workload.model_validate(overlay(document, {"parts": CASES[name][0]}))
    prompts = build_prompts(workload, ModelTokenizer.load(model), FOLDER)
    turns = sorted((request for session in prompts.sessions for request in session), key=lambda request: request.turn)
    return [
        {"id": request.id, "prompt": request.prompt.tolist(), "output": 8 + number % 5 * 8}
        for number, request in enumerate(turns)
    ]


def run_case(name: str, model: Path, seed: int) -> dict[str, Any]:
    """One workload with and without lmc, as a row of results.json."""
    requests = requests_of(name, model)
    started = time.perf_counter()
    with VllmDriver(
        model,
        settings=None,
        enable_prefix_caching=True,  # halves the time that the reference takes
        max_model_len=CONTEXT,
        max_num_seqs=CONCURRENCY,
        max_num_batched_tokens=BATCHED_TOKENS,
    ) as plain:
        wanted = plain.call("traffic", requests=requests, seed=seed, concurrency=CONCURRENCY, chances={})["outcomes"]
    scenario = SCENARIOS[CASES[name][1]]
    with tempfile.TemporaryDirectory() as folder:
        verdict = run_scenario(
            scenario,
            model,
            requests,
            wanted,
            Path(folder),
            seed=seed,
            host=HOST,
            disk=DISK,
            blocks=BLOCKS,
            context=CONTEXT,
            concurrency=CONCURRENCY,
        )
    return {
        "workload": name,
        "scenario": scenario.name,
        "about": scenario.about,
        "sent": len(requests),
        "prompt_tokens": sum(len(request["prompt"]) for request in requests),
        "seconds": time.perf_counter() - started,
        "seed": seed,
        "software": describe_software(),
        "passed": passed(verdict),
        **asdict(verdict),
    }


def passed(verdict: Verdict) -> bool:
    """No difference, nothing left over, and the run put lmc to the test at all."""
    return (
        not verdict.comparison.differences
        and not any(verdict.leftovers.values())
        and verdict.preemptions > 0
        and sum(verdict.loaded.values()) > 0
    )


def as_report(rows: list[dict[str, Any]], model: str) -> Report:
    compared = sum(row["comparison"]["requests"] for row in rows)
    different = sum(len(row["comparison"]["differences"]) for row in rows)
    ties = sum(len(row["comparison"]["ties"]) for row in rows)
    left = sum(sum(row["leftovers"].values()) for row in rows)
    worst = max(row["comparison"]["logprob_error"] for row in rows)
    summary = (
        f"{compared} completed requests of {len(rows)} workloads: {different} with a wrong token, {ties} that took another way at a tie "
        f"(two best log-probabilities less than {TIE:g} apart). Largest difference of a chosen token's log-probability: {worst:.1e}. "
        f"Left over at the end (pins, operations, requests, blocks, ...): {left}."
    )
    equality = Table(
        "Equality",
        [Column(name) for name in ("workload", "scenario", "sent", "aborted", "completed", "tokens", "ties", "wrong")]
        + [Column("largest log-probability difference", decimals=7), Column("left over")],
        [
            (
                row["workload"],
                row["scenario"],
                row["sent"],
                row["tally"]["aborted"],
                row["comparison"]["requests"],
                row["comparison"]["tokens"],
                len(row["comparison"]["ties"]),
                len(row["comparison"]["differences"]),
                row["comparison"]["logprob_error"],
                sum(row["leftovers"].values()),
            )
            for row in rows
        ],
        note="Tokens: output tokens that were compared, up to a tie that went the other way.",
    )
    trouble = Table(
        "What the requests went through",
        [Column(name) for name in ("workload", "preemptions", "resets", "failed loads", "failed stores")]
        + [Column("done to tiers"), Column("operations that failed"), Column("tokens loaded, by tier")],
        [
            (
                row["workload"],
                row["preemptions"],
                row["tally"]["resets"],
                row["tally"]["failed_loads"],
                row["tally"]["failed_stores"],
                _listed(row["media_faults"]),
                _listed(row["failures"]),
                _listed(row["loaded"]),
            )
            for row in rows
        ],
    )
    setups = [f"- {row['scenario']} ({row['workload']}): {row['about']}" for row in rows]
    text = "\n".join(
        [
            f"{CONCURRENCY} requests at most, {BLOCKS} blocks of 32 tokens for all of them, chunks of 64 tokens, {HOST} of host memory, "
            f"{DISK} of disk, steps of {BATCHED_TOKENS} tokens. A request is aborted with probability {CHANCES.abort:g}, a load fails with "
            f"{CHANCES.failed_load:g} and leaves garbage behind, a store with {CHANCES.failed_store:g}.",
            "",
            *setups,
        ]
    )
    ties_table = Table(
        "Ties that went the other way",
        [Column("workload"), Column("where")],
        [(row["workload"], tie) for row in rows for tie in row["comparison"]["ties"]] or [("none", "none")],
    )
    commits = ", ".join(sorted({row["software"].get("commit", "?") for row in rows}))
    metadata = {
        "command": f"python -m benchmarks.equality --model {model} --out reports/equality",
        **describe_hardware(),
        **{name: value for name, value in rows[-1]["software"].items() if name != "commit"},
        "commit": commits,
    }
    return Report(
        "Equality of greedy tokens, with faults",
        summary,
        [Section("Results", text, [equality, trouble, ties_table])],
        metadata,
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items())) or "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=list(CASES), metavar="WORKLOAD", help=", ".join(CASES))
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(CASES):
        parser.error(f"no case {unknown.pop()!r}; there are {', '.join(CASES)}")
    results = options.out / "results.json" if options.out else None
    known = orjson.loads(results.read_bytes()) if results is not None and results.is_file() else []
    rows = {row["workload"]: row for row in known}
    for name in options.workloads:
        rows[name] = run_case(name, resolve_model(options.model), options.seed)
        if results is not None:
            write_file(results, to_json(list(rows.values())))
    report = as_report([rows[name] for name in CASES if name in rows], options.model)
    if options.out:
        write_file(options.out / "report.md", report_markdown(report))
    for table in report.sections[0].items:
        assert isinstance(table, Table)
        print_table(table)
    print(report.summary)
    return int(not all(row["passed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
