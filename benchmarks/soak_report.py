"""What a soak gave, the bounds it is held to, and its report."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from lmc.bench.machine import describe_hardware, describe_software
from lmc.report import (
    Column,
    Figure,
    Report,
    Section,
    Table,
    new_axes,
    print_table,
    report_markdown,
    to_figure,
    to_json,
    write_file,
    write_pictures,
)

WARM_SHARE = 0.25  # of the time, in which tiers fill up and engines settle
FLAT_SHARE = 0.01  # of its memory that a process may gain in an hour
HIT_POINTS = 2.0  # percent of prompt tokens between the simulator's hits and the measured ones
RESAMPLES = 2000
MIB = 1 << 20
PAUSE_S = 30.0
GIVEN_UP = "given up"


@dataclass(frozen=True)
class Sample:
    """One look at the engine's processes and the cache."""

    at_s: float
    requests: int
    rss_bytes: dict[str, int]  # by process
    threads: int
    files: int  # open descriptors
    disk_bytes: int
    chunks: dict[str, int]  # by tier
    pins: int
    pending: int


@dataclass(frozen=True)
class Left:
    """Before a clear of the idle cache: pending, pins. After it: chunks, bytes on disk, and what vLLM itself counts."""

    pending: int
    pins: int
    chunks: dict[str, int]
    disk_bytes: int
    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True)
class Soak:
    """`left` is None for an engine without the cache, which then has no hits either."""

    samples: list[Sample]
    left: Left | None
    statuses: dict[str, int]
    compared: int
    ties: int
    differences: list[str]
    counts: dict[str, float]
    disk_capacity: int
    prompt_tokens: int = 0
    measured_hits: dict[str, int] = field(default_factory=dict)
    predicted_hits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Growth:
    """Bytes per hour: least squares over the means of minutes, with a 95 % interval from a bootstrap over minutes."""

    per_hour: float
    low: float
    high: float
    mean: float

    @property
    def is_flat(self) -> bool:
        return self.high <= FLAT_SHARE * self.mean


@dataclass(frozen=True)
class Bound:
    text: str
    found: str
    met: bool


def growth(samples: Sequence[Sample], process: str) -> Growth:
    """Of one process ("all": of all together) after the warm-up."""
    settled = _settled(samples)
    minutes = np.array([int(sample.at_s // 60) for sample in settled])
    times = np.array([sample.at_s / 3600 for sample in settled])
    values = np.array([_rss(sample, process) for sample in settled], dtype=np.float64)
    at_h, mean = (
        np.array([column[minutes == minute].mean() for minute in np.unique(minutes)]) for column in (times, values)
    )
    draws = np.random.default_rng(0).integers(0, len(at_h), size=(RESAMPLES, len(at_h)))
    slopes = [_slope(at_h[draw], mean[draw]) for draw in draws if np.ptp(at_h[draw]) > 0]
    low, high = np.percentile(slopes, [2.5, 97.5])
    return Growth(_slope(at_h, mean), float(low), float(high), float(mean.mean()))


def _rss(sample: Sample, process: str) -> int:
    return sum(sample.rss_bytes.values()) if process == "all" else sample.rss_bytes.get(process, 0)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    return float((centred @ y) / (centred @ centred))


def judge(soak: Soak) -> list[Bound]:
    bounds = [*_bounds_over_time(soak), *_bounds_of_traffic(soak)]
    if soak.left is not None:
        bounds += [_bound_on_hits(soak), *_bounds_at_the_end(soak.left)]
    return bounds


def _bounds_over_time(soak: Soak) -> list[Bound]:
    total = growth(soak.samples, "all")
    gained = f"{_mib(total.per_hour)} per hour ({_mib(total.low)} to {_mib(total.high)}) of {_mib(total.mean)}"
    flat = f"memory of all processes: the interval's upper end is at most {FLAT_SHARE:.0%} of it per hour"
    fullest = max(sample.disk_bytes for sample in soak.samples)
    filled = f"at most {_mib(fullest)} of {_mib(soak.disk_capacity)}"
    bounds = [Bound(flat, gained, total.is_flat)]
    bounds.append(Bound("the disk tier stays within its capacity", filled, fullest <= soak.disk_capacity))
    settled = _settled(soak.samples)
    for name, counts in (("threads", [s.threads for s in settled]), ("open files", [s.files for s in settled])):
        early, late = max(counts[: len(counts) // 2]), max(counts[len(counts) // 2 :])
        text = f"{name}: at most as many in the second half of the time as in the first"
        bounds.append(Bound(text, f"{early}, then {late}", late <= early))
    return bounds


def _bounds_of_traffic(soak: Soak) -> list[Bound]:
    failed = [status for status in soak.statuses if status not in ("ok", GIVEN_UP)]
    same = f"{soak.compared} compared, {soak.ties} numerical ties, {len(soak.differences)} differences"
    return [
        Bound("every request was answered, or given up by its user", _counted(soak.statuses), not failed),
        Bound("a prompt's greedy tokens are the same every time", same, not soak.differences),
    ]


def _bound_on_hits(soak: Soak) -> Bound:
    hits = (soak.measured_hits, soak.predicted_hits)
    measured, predicted = (100 * sum(tiers.values()) / soak.prompt_tokens for tiers in hits)
    rates = f"{measured:.2f} %, predicted {predicted:.2f} %"
    return Bound(
        f"hit rate within {HIT_POINTS:g} points of the simulator's", rates, abs(measured - predicted) <= HIT_POINTS
    )


def _bounds_at_the_end(left: Left) -> list[Bound]:
    open_ends = f"{left.pins} pins, {left.pending} pending"
    kept = f"{_counted(left.chunks)} chunks; {left.disk_bytes} bytes on disk"
    vllm = f"{left.running} running, {left.waiting} waiting, {left.kv_usage:.0%} of its KV space"
    is_empty = not (any(left.chunks.values()) or left.disk_bytes)
    return [
        Bound("idle at the end: no pin, no pending copy", open_ends, not (left.pins or left.pending)),
        Bound("after a clear: no chunk in any tier, no file", kept, is_empty),
        Bound("vLLM holds no request and no block", vllm, not (left.running or left.waiting or left.kv_usage)),
    ]


def _settled(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.at_s >= WARM_SHARE * samples[-1].at_s]


def write_soak(soak: Soak, folder: Path, command: str) -> None:
    """report.md with a picture, samples.csv, results.json."""
    bounds = judge(soak)
    table = Table(
        "Bounds",
        [Column("bound"), Column("found"), Column("verdict")],
        [[bound.text, bound.found, "met" if bound.met else "NOT met"] for bound in bounds],
    )
    last = soak.samples[-1]
    paused = _paused_s(soak.samples) / 60
    tokens = f", {soak.prompt_tokens:,} prompt tokens" if soak.prompt_tokens else ""
    summary = (
        f"{last.at_s / 60:.0f} minutes of mixed traffic from two users on one engine (the client paused for {paused:.0f} of them): "
        f"{sum(soak.statuses.values())} requests{tokens}. "
        f"{sum(bound.met for bound in bounds)} of {len(bounds)} bounds are met."
    )
    metadata = {"command": command} | describe_hardware() | describe_software()
    sections = [Section("Bounds", "", [table]), Section("Memory", "", [_growth_table(soak), _picture(soak)])]
    if soak.predicted_hits:
        sections.append(Section("Hits", "", [_hits_table(soak)]))
    if soak.differences:
        sections.append(Section("Differences", "\n\n".join(soak.differences)))
    report = Report("Soak: mixed traffic on one engine", summary, sections, metadata)
    print_table(table)
    write_file(folder / "report.md", report_markdown(report))
    write_pictures(folder, report)
    write_file(folder / "samples.csv", _csv(soak.samples))
    shown = {name: value for name, value in vars(soak).items() if name != "samples"}
    write_file(folder / "results.json", to_json({"bounds": bounds, "metadata": metadata, **shown}))


def _paused_s(samples: Sequence[Sample]) -> float:
    """Time without samples: the client was stopped, so that others could measure on this machine."""
    gaps = [after.at_s - before.at_s for before, after in pairwise(samples)]
    return sum(gap for gap in gaps if gap > PAUSE_S)


def _growth_table(soak: Soak) -> Table:
    processes = sorted({process for sample in soak.samples for process in sample.rss_bytes})
    rows = [(process, growth(soak.samples, process)) for process in (*processes, "all")]
    return Table(
        "Resident memory after the warm-up",
        [
            Column("process"),
            Column("mean", "MiB", 0),
            Column("growth", "MiB per hour", 1),
            Column("low", "", 1),
            Column("high", "", 1),
        ],
        [[name, one.mean / MIB, one.per_hour / MIB, one.low / MIB, one.high / MIB] for name, one in rows],
        f"The first {WARM_SHARE:.0%} of the time is left out. Least squares over the means of minutes; the interval is a 95 % bootstrap.",
    )


def _picture(soak: Soak) -> Figure:
    picture, (memory, tiers) = new_axes(2)
    minutes = [sample.at_s / 60 for sample in soak.samples]
    for process in sorted({process for sample in soak.samples for process in sample.rss_bytes}):
        memory.plot(minutes, [sample.rss_bytes.get(process, 0) / MIB for sample in soak.samples], label=process)
    memory.set(xlabel="minutes", ylabel="resident memory (MiB)", ylim=(0, None))
    memory.legend(frameon=False)
    for tier in soak.samples[-1].chunks:
        tiers.plot(minutes, [sample.chunks[tier] for sample in soak.samples], label=f"chunks in {tier}")
    tiers.plot(minutes, [sample.requests for sample in soak.samples], label="requests so far")
    tiers.set(xlabel="minutes", ylim=(0, None))
    tiers.legend(frameon=False)
    return to_figure(picture, "Memory and tiers over time", "A flat stretch in the requests is a pause of the client.")


def _hits_table(soak: Soak) -> Table:
    rows = [
        [tier, soak.measured_hits.get(tier, 0), predicted, 100 * predicted / soak.prompt_tokens]
        for tier, predicted in soak.predicted_hits.items()
    ]
    return Table(
        "Hit tokens by tier",
        [Column("tier"), Column("measured"), Column("predicted"), Column("predicted", "% of prompt tokens")],
        rows,
        "Predicted: the engine's own record, replayed through the live cache's directory in `lmc sim replay` with the same settings.",
    )


def _csv(samples: Sequence[Sample]) -> str:
    processes = sorted({process for sample in samples for process in sample.rss_bytes})
    tiers = list(samples[-1].chunks)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["at_s", "requests", *(f"{process} rss" for process in processes), "threads", "files", "disk_bytes", *tiers]
    )
    for one in samples:
        rss = [one.rss_bytes.get(process, 0) for process in processes]
        chunks = [one.chunks[tier] for tier in tiers]
        writer.writerow([round(one.at_s, 1), one.requests, *rss, one.threads, one.files, one.disk_bytes, *chunks])
    return out.getvalue()


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f} MiB"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
