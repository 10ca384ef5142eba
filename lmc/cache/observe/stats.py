"""The state of a running cache in numbers, as the endpoint's /stats gives it, and its tiers in one line for the log and `lmc serve`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmc.cache.keys import Namespace
from lmc.cache.observe.accounting import Known
from lmc.cache.observe.metrics import CacheMetrics
from lmc.units import format_count, format_size


def collect_stats(namespace: Namespace, directory: Known, metrics: CacheMetrics, chunk_bytes: int) -> dict[str, object]:
    """`chunk_bytes` is the size of one chunk over all ranks. What is read here is one number or one copied table, so no lock is needed."""
    totals: dict[str, float] = {}
    by_label: dict[str, dict[str, float]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if family.type != "counter" or not sample.name.endswith("_total"):
                continue
            name = sample.name.removeprefix("lmc_").removesuffix("_total")
            if not sample.labels:
                totals[name] = sample.value
            else:
                by_label.setdefault(name, {})["/".join(sample.labels.values())] = sample.value
    room = directory.room()
    return {
        "namespace": namespace.label(),
        "model": namespace.model,
        "chunk_tokens": namespace.chunk_tokens,
        "chunk_bytes": chunk_bytes,
        "tiers": {
            tier: {"chunks": used, "capacity": slots, "bytes": held, "capacity_bytes": most}
            for tier, (used, slots) in directory.usage().items()
            for held, most in [room.get(tier, (used * chunk_bytes, slots * chunk_bytes))]
        },
        "known_chunks": directory.known_remote(),
        "write_queue": directory.num_writing,
        "pending_operations": directory.num_open,
        "pins": directory.num_pins,
        "ranks": {
            str(rank): {
                "copy_threads": reading.threads,
                "pinned_slots": reading.pinned_slots,
                "problem": reading.problem,
            }
            for rank, reading in sorted(metrics.copying.items())
        },
        "totals": totals,
        "by_label": by_label,
    }


def describe_tiers(stats: Mapping[str, Any]) -> str:  # Any: what collect_stats() returns, or the same read from JSON
    """The capacities of the tiers over all ranks: "host 1.5 GiB (256 chunks), disk 100.0 GiB (17,000 chunks)"."""
    return ", ".join(
        f"{tier} {format_size(held['capacity_bytes'])} ({format_count(held['capacity'])} chunks)"
        for tier, held in stats["tiers"].items()
    )
