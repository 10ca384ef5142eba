"""Compares two runs of one workload arm by arm, for `lmc bench compare A B`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmc.bench.outputs import compare_outputs
from lmc.bench.records import Comparison, OutputCheck, RequestRecord, read_records, read_results
from lmc.bench.stats import compare, pairs
from lmc.errors import RunError


def compare_runs(a: Path, b: Path, arms: Sequence[str] = ()) -> tuple[list[Comparison], list[OutputCheck]]:
    """Ratios B / A for every arm that both runs have. Raises RunError if a run is invalid or the runs did not send the same requests."""
    results = [read_results(path) for path in (a, b)]
    for path, result in zip((a, b), results, strict=True):
        if not result.valid:
            raise RunError(f"{path}: this run is invalid, so it cannot be compared: {result.problems[0]}")
    names = [arm.name for arm in results[1].arms if arm.name in {other.name for other in results[0].arms}]
    for wanted in arms:
        if wanted not in names:
            raise RunError(
                f"arm {wanted!r} is not in both runs; choose one that is: {', '.join(names) or 'there is none'}"
            )
    if not names:
        raise RunError(f"{a} and {b} have no arm in common; compare two runs of one workload")
    records = [read_records(path if path.is_dir() else path.parent) for path in (a, b)]
    comparisons: list[Comparison] = []
    outputs: list[OutputCheck] = []
    for name in arms or names:
        left, right = ([record for record in run if record.arm == name] for run in records)
        _require_same(name, left, right)
        label_a, label_b = f"{name} in {a}", f"{name} in {b}"
        load = results[0].workload["load"]
        ordered = load["kind"] == "closed" and load["concurrency"] == 1
        comparisons += compare(label_b, label_a, pairs(right, left), int(results[0].workload["seed"]), ordered)
        outputs.append(compare_outputs(label_b, right, label_a, left))
    return comparisons, outputs


def _require_same(arm: str, a: Sequence[RequestRecord], b: Sequence[RequestRecord]) -> None:
    known = {record.request_id: record.prompt_tokens for record in a}
    for record in b:
        if known.get(record.request_id, record.prompt_tokens) != record.prompt_tokens:
            raise RunError(
                f"arm {arm}: {record.request_id} has another prompt in the two runs: they replayed different workloads"
            )
    if not pairs(a, b):
        raise RunError(f"arm {arm}: no request was answered in both runs, so there is nothing to compare")
