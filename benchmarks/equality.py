"""Greedy tokens with and without lmc on a real engine: python -m benchmarks.equality [CASE...] [--model MODEL] [--out FOLDER].

Prompts of the workload files go through vLLM with nothing but its own prefix cache, then with lmc, each case in one of the scenarios of
tests/engines/equality.py: random concurrency, a tiny KV space that forces preemptions, random aborts and resets, tiers and copies that
fail. Exit code 1 when a token or log-probability differs other than behind a tie, or something is left over. What earlier calls wrote
about other cases to FOLDER stays in the report.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import yaml

from lmc.bench.machine import describe_hardware, describe_software
from lmc.bench.outputs import TIE_LOGPROB
from lmc.bench.prompts import build_prompts
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Workload, overlay
from lmc.model import EMBEDDED, resolve_model
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from tests.engines.equality import BATCHED_TOKENS, CHANCES, CHUNK, SCENARIOS, Scenario, run_scenario
from tests.engines.tiny_model import VOCABULARY, make_tiny_falcon, make_tiny_gemma, make_tiny_llama
from tests.engines.vllm_driver import VllmDriver

TINY = "tiny"
FOLDER = Path(__file__).parents[1] / "workloads"
CONTEXT, CONCURRENCY = 896, 12
HOST_CHUNKS, DISK_CHUNKS = 32, 64
OPEN_SESSIONS = 24
LONG_CHATS = "row.history | length >= 4 and row.history | map(attribute='bot') | join | length > 1200"


@dataclass(frozen=True)
class Case:
    """A workload, what is changed of it so that a CPU gets through, a scenario, and KV space for a few of 12 requests."""

    workload: str
    parts: dict[str, Any]
    scenario: Scenario
    blocks: int
    family: str = ""  # a tiny model of another family than the one asked for
    make: Callable[[Path], Path] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the engine, with and without lmc


_PARTS = Scenario(
    "several KV groups",
    "vLLM's prefix cache on; loads in the background; a disk whose files rot",
    True,
    1,
    ("disk",),
    {"store_decode": True, "checkpoint_tokens": 128},
)
_CHAT = {"chat": {"where": LONG_CHATS, "pick": {"sessions": 60, "max_prompt_tokens": 800}}}
CASES = {
    "function-calling": Case(
        "function-calling",
        {"tools": {"pick": {"groups": 60, "per_group": 3, "min_prompt_tokens": 150, "max_prompt_tokens": 800}}},
        SCENARIOS[0],
        40,
    ),
    "multi-turn-chat": Case("multi-turn-chat", _CHAT, SCENARIOS[1], 40),
    "two-engines": Case("multi-turn-chat", _CHAT, SCENARIOS[3], 40),
    "document-qa": Case(
        "document-qa",
        {"questions": {"pick": {"groups": 7, "per_group": 14, "max_prompt_tokens": 660}}},
        SCENARIOS[2],
        40,
    ),
    "gemma-3": Case("multi-turn-chat", _CHAT, _PARTS, 110, "tiny Gemma 3", partial(make_tiny_gemma, window=64)),
    "falcon-h1": Case(
        "multi-turn-chat",
        _CHAT,
        _PARTS,
        80,
        "tiny Falcon-H1",
        make_tiny_falcon,
        {
            "block_size": 64,
            "max_num_batched_tokens": 64,
        },  # on a CPU vLLM's Mamba 2 computes one block of a prompt at a time
    ),
}


def requests_of(name: str, vocabulary: int | None) -> list[dict[str, Any]]:
    """All requests of a case's workload, so many sessions at a time, with outputs long enough to cross a block's end; ids folded into a
    smaller vocabulary."""
    case = CASES[name]
    document = yaml.safe_load((FOLDER / f"{case.workload}.yaml").read_text())
    workload = Workload.model_validate(overlay(document, {"parts": case.parts}))
    prompts = build_prompts(workload, ModelTokenizer.load(resolve_model(EMBEDDED)), FOLDER)
    generator = random.Random(workload.seed)
    waiting = [list(session) for session in prompts.sessions]
    generator.shuffle(waiting)
    requests = []
    while waiting:
        session = waiting[generator.randrange(min(OPEN_SESSIONS, len(waiting)))]
        requests.append(session.pop(0))
        waiting = [session for session in waiting if session]
    return [
        {"id": request.id, "prompt": _folded(request.prompt.tolist(), vocabulary), "output": 8 + number % 5 * 8}
        for number, request in enumerate(requests)
    ]


def _folded(tokens: list[int], vocabulary: int | None) -> list[int]:
    return tokens if vocabulary is None else [2 + token % (vocabulary - 2) for token in tokens]


def run_case(name: str, model: Path, seed: int, vocabulary: int | None) -> dict[str, Any]:
    """One case with and without lmc, as a row of results.json."""
    case = CASES[name]
    requests = requests_of(name, vocabulary)
    started = time.perf_counter()
    options = {"max_num_batched_tokens": BATCHED_TOKENS, **case.options}
    with VllmDriver(
        model,
        settings=None,
        enable_prefix_caching=True,  # halves the time that the reference takes
        max_model_len=CONTEXT,
        max_num_seqs=CONCURRENCY,
        **options,
    ) as plain:
        wanted = plain.call("traffic", requests=requests, seed=seed, concurrency=CONCURRENCY, chances={})["outcomes"]
    scenario = replace(case.scenario, options={**case.scenario.options, **case.options})
    with tempfile.TemporaryDirectory() as folder:
        verdict = run_scenario(
            scenario,
            model,
            requests,
            wanted,
            Path(folder),
            seed=seed,
            host_chunks=HOST_CHUNKS,
            disk_chunks=DISK_CHUNKS,
            blocks=case.blocks,
            context=CONTEXT,
            concurrency=CONCURRENCY,
            rot_seconds=0.1 if vocabulary else 1.0,  # the embedded model takes ten times as long
        )
    return {
        "workload": case.workload,
        "model": case.family or (TINY if vocabulary else EMBEDDED),
        "scenario": scenario.name,
        "about": scenario.about,
        "sent": len(requests),
        "prompt_tokens": sum(len(request["prompt"]) for request in requests),
        "seconds": time.perf_counter() - started,
        "seed": seed,
        "software": describe_software(),
        "passed": verdict.passed,
        **asdict(verdict),
    }


def as_report(rows: list[dict[str, Any]]) -> Report:
    compared = sum(row["comparison"]["requests"] for row in rows)
    different = sum(len(row["comparison"]["differences"]) for row in rows)
    ties = sum(len(row["comparison"]["ties"]) for row in rows)
    left = sum(sum(row["leftovers"].values()) for row in rows)
    worst = max(row["comparison"]["logprob_error"] for row in rows)
    summary = (
        f"{compared} completed requests of {len({row['workload'] for row in rows})} workloads: {different} with a wrong token, "
        f"{ties} that took another way at a tie (two best log-probabilities less than {TIE_LOGPROB:g} apart). "
        f"Largest difference of a chosen token's log-probability: {worst:.1e}. "
        f"Left over at the end (pins, operations, requests, blocks, ...): {left}."
    )
    equality = Table(
        "Equality",
        [
            Column(name)
            for name in ("workload", "model", "scenario", "sent", "aborted", "completed", "tokens", "ties", "wrong")
        ]
        + [Column("largest log-probability difference", decimals=7), Column("left over")],
        [
            (
                row["workload"],
                row["model"],
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
        [Column(name) for name in ("workload", "model", "preemptions", "resets", "failed loads", "failed stores")]
        + [Column("done to tiers"), Column("operations that failed"), Column("tokens loaded, by tier")],
        [
            (
                row["workload"],
                row["model"],
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
    setups = dict.fromkeys(f"- {row['scenario']}: {row['about']}" for row in rows)
    text = "\n".join(
        [
            f"{CONCURRENCY} requests at most in an engine, KV space for a few of them, steps of {BATCHED_TOKENS} tokens; chunks of "
            f"{CHUNK} tokens, {HOST_CHUNKS} of them in an engine's host memory and {DISK_CHUNKS} on disk. "
            f"{OPEN_SESSIONS} sessions are open at a time. A request is aborted with probability "
            f"{CHANCES.abort:g}, a load fails with {CHANCES.failed_load:g} and leaves garbage behind, a store with "
            f"{CHANCES.failed_store:g}. Model {TINY}: random weights, the prompts' ids folded into its {VOCABULARY}.",
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
        "command": "; ".join(_command(model) for model in dict.fromkeys(row["model"] for row in rows)),
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


def _command(model: str) -> str:
    cases = "".join(f" {name}" for name, case in CASES.items() if model and case.family == model)
    return f"python -m benchmarks.equality{cases} --out reports/equality" + (
        f" --model {TINY}" if model == TINY else ""
    )


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items())) or "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [name for name, case in CASES.items() if not case.family]
    parser.add_argument("cases", nargs="*", default=usual, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--model", default=EMBEDDED, choices=[EMBEDDED, TINY], help="tiny: random weights, the prompts' ids folded"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {unknown.pop()!r}; there are {', '.join(CASES)}")
    results = options.out / "results.json" if options.out else None
    known = orjson.loads(results.read_bytes()) if results is not None and results.is_file() else []
    rows = {(row["workload"], row["scenario"], row["model"]): row for row in known}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            make = CASES[name].make or (make_tiny_llama if options.model == TINY else None)
            model = make(Path(folder) / name) if make is not None else resolve_model(EMBEDDED)
            row = run_case(name, model, options.seed, VOCABULARY if make is not None else None)
            rows[row["workload"], row["scenario"], row["model"]] = row
            if results is not None:
                write_file(results, to_json(list(rows.values())))
    report = as_report(list(rows.values()))
    if options.out:
        write_file(options.out / "report.md", report_markdown(report))
    for table in report.sections[0].items:
        assert isinstance(table, Table)
        print_table(table)
    print(report.summary)
    return int(not all(row["passed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
