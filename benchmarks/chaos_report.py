"""What a chaotic run left behind, the bounds that it is held to, and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos_faults import ACTS
from lmc.bench.machine import describe_hardware, describe_software
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from tests.engines.equality import Comparison

MIB = 1 << 20
TIERS = ("host", "disk", "redis")
MEMORY_SHARE = 0.10  # that the process may have grown since the warm-up: vLLM itself grows on a CPU
THREADS = (
    14  # of the tiers, which are started when there is a job for them: disk 4 + 4, Redis 2 + 2, and 2 that ask Redis
)
DESCRIPTORS = 8  # connections and files that may be open now and were not then


@dataclass(frozen=True)
class Sample:
    """The engine's process between two rounds of traffic."""

    at_s: float
    requests: int
    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Chaos:
    minutes: float
    seed: int
    comparison: Comparison
    tally: Mapping[str, int]  # what happened to requests
    done: Mapping[str, int]  # what was done to tiers
    loaded: Mapping[str, int]  # tier -> tokens
    loaded_after: Mapping[str, int]  # the same, of the calm round at the end
    misses: Mapping[str, int]
    failures: Mapping[str, int]
    preemptions: int
    samples: Sequence[Sample]  # the first is after the warm-up, the last after the calm round
    leftovers: Mapping[str, int]
    slots_after_reset: Mapping[str, int]
    free_host_slots: tuple[int, int]  # free, and all


@dataclass(frozen=True)
class Bound:
    text: str
    found: str
    met: bool


def judge(chaos: Chaos) -> list[Bound]:
    compared, first, last = chaos.comparison, chaos.samples[0], chaos.samples[-1]
    answers = f"{compared.requests} answers, {len(compared.ties)} ties, {len(compared.differences)} wrong"
    left = ", ".join(f"{count} {name}" for name, count in chaos.leftovers.items() if count) or "nothing"
    used = ", ".join(f"{count} in {tier}" for tier, count in chaos.slots_after_reset.items())
    free, slots = chaos.free_host_slots
    growth = last.rss_bytes - first.rss_bytes
    grown = f"{growth / MIB:+.1f} MiB of {first.rss_bytes / MIB:.0f} MiB"
    tried = {
        "preemptions": chaos.preemptions,
        **{f"tokens from {tier}": n for tier, n in chaos.loaded.items()},
        **chaos.done,
    }
    return [
        Bound(
            "no answer differs from the engine's own, other than behind a tie",
            answers,
            not compared.differences and compared.requests > 0,
        ),
        Bound("no pin, copy, promise, request or block is left", left, not any(chaos.leftovers.values())),
        Bound(
            "after a reset no chunk is left and every host slot is free",
            f"{used}; {free} of {slots} slots free",
            not any(chaos.slots_after_reset.values()) and free == slots,
        ),
        Bound(f"memory is within {MEMORY_SHARE:.0%} of what it was", grown, growth <= MEMORY_SHARE * first.rss_bytes),
        Bound(
            f"at most {DESCRIPTORS} more descriptors than after the warm-up",
            f"{first.descriptors}, then {last.descriptors}",
            last.descriptors <= first.descriptors + DESCRIPTORS,
        ),
        Bound(
            f"at most {THREADS} more threads than after the warm-up, which the tiers may start",
            f"{first.threads}, then {last.threads}",
            last.threads <= first.threads + THREADS,
        ),
        Bound(
            "everything was tried: preemptions, loads from every tier, every fault",
            _listed(tried),
            chaos.preemptions > 0 and all(chaos.loaded.get(tier) for tier in TIERS) and len(chaos.done) == len(ACTS),
        ),
        Bound("the cache still serves afterwards", _listed(chaos.loaded_after), sum(chaos.loaded_after.values()) > 0),
    ]


def write_chaos(chaos: Chaos, folder: Path | None, command: str) -> bool:
    """Show the bounds, and write report.md and results.json if there is a folder. Returns whether all are met."""
    bounds = judge(chaos)
    table = Table(
        "Bounds",
        [Column("bound"), Column("found"), Column("verdict")],
        [[one.text, one.found, "met" if one.met else "NOT met"] for one in bounds],
    )
    print_table(table)
    if folder is None:
        return all(one.met for one in bounds)
    happened = Table(
        "What happened",
        [Column("what"), Column("how often")],
        [
            ["requests", _listed(chaos.tally)],
            ["done to tiers", _listed(chaos.done)],
            ["tokens loaded, by tier", _listed(chaos.loaded)],
            ["lookups that ended early", _listed(chaos.misses)],
            ["operations that failed", _listed(chaos.failures)],
        ],
    )
    over_time = Table(
        "The engine's process",
        [
            Column("minute", decimals=1),
            Column("requests"),
            Column("resident", "MiB", 0),
            Column("descriptors"),
            Column("threads"),
        ],
        [
            [one.at_s / 60, one.requests, one.rss_bytes / MIB, one.descriptors, one.threads]
            for one in _thinned(chaos.samples)
        ],
        "The first row is after the warm-up, a round without faults; the last after the faults and a calm round.",
    )
    compared = chaos.comparison
    summary = (
        f"{chaos.minutes:g} minutes of 64 streams on one engine with all tiers, under faults: {compared.requests} answers compared, "
        f"{len(compared.differences)} wrong. {sum(one.met for one in bounds)} of {len(bounds)} bounds are met."
    )
    text = (
        "A tiny random Llama whose KV space holds a few of the streams. Streams are aborted, caches reset, copies fail and leave garbage. "
        "Disk and Redis are forged, killed or hang; chunks are authenticated by a key. Answers are compared with those of the engine "
        "without the cache."
    )
    sections = [Section("Bounds", text, [table]), Section("Course", "", [happened, over_time])]
    if compared.differences:
        sections.append(Section("Wrong answers", "\n\n".join(compared.differences[:50])))
    metadata = {"command": command} | describe_hardware() | describe_software()
    report = Report("Chaos: everything at once on one engine", summary, sections, metadata)
    write_file(folder / "report.md", report_markdown(report))
    write_file(folder / "results.json", to_json({"bounds": bounds, "metadata": metadata, **vars(chaos)}))
    return all(one.met for one in bounds)


def _thinned(samples: Sequence[Sample], rows: int = 20) -> list[Sample]:
    step = max(1, len(samples) // rows)
    return [*samples[:-1:step], samples[-1]]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
