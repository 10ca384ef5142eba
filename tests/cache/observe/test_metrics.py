from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from lmc.cache.directory import Counts
from lmc.cache.observe.metrics import CacheMetrics
from lmc.cache.plan import BreakerReading, CopyReading
from tests.programs import program

ROOT = Path(__file__).parents[3]


@pytest.fixture
def metrics() -> CacheMetrics:
    return CacheMetrics(["host", "disk"], ["redis"])


def names(metrics: CacheMetrics) -> set[str]:
    """As Prometheus stores them."""
    found = set()
    for family in metrics.registry.collect():
        if family.type == "counter":
            found.add(f"{family.name}_total")
        elif family.type == "histogram":
            found |= {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            found.add(family.name)
    return found


def value(metrics: CacheMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"lmc_{name}", labels)


def test_counters_start_at_zero_for_every_tier(metrics):
    for tier in ("host", "disk", "redis"):
        assert value(metrics, "hit_tokens_total", tier=tier) == 0
    assert value(metrics, "written_chunks_total", tier="redis") == 0
    assert value(metrics, "written_chunks_total", tier="host") is None


def test_what_the_directory_counts_is_added_once(metrics):
    counts = Counts(stores_dropped=2)
    counts.gone("disk", "room")
    metrics.settle(counts)
    metrics.settle(counts)
    counts.stores_dropped = 5
    counts.gone("disk", "room")
    counts.gone("disk", "cleared")
    metrics.settle(counts)
    assert value(metrics, "dropped_chunks_total", what="store") == 5
    assert value(metrics, "evicted_chunks_total", tier="disk") == 2
    assert value(metrics, "removed_chunks_total", tier="disk", cause="room") == 2
    assert value(metrics, "removed_chunks_total", tier="disk", cause="cleared") == 1


def test_a_breaker_counts_as_open_while_it_is_open_on_any_rank(metrics):
    metrics.note_breaker(0, "redis", "read", BreakerReading(True, 3, 0, 1))
    metrics.note_breaker(1, "redis", "read", BreakerReading(False, 1, 0, 0))
    assert value(metrics, "breaker_open", tier="redis", direction="read") == 1
    metrics.note_breaker(0, "redis", "read", BreakerReading(False, 4, 9, 1))
    assert value(metrics, "breaker_open", tier="redis", direction="read") == 0
    assert value(metrics, "breaker_events_total", tier="redis", direction="read", event="failures") == 5
    assert value(metrics, "breaker_events_total", tier="redis", direction="read", event="refusals") == 9
    assert value(metrics, "breaker_events_total", tier="redis", direction="read", event="openings") == 1


def test_which_backend_copied_is_counted_once_and_a_problem_is_shown_while_it_lasts(metrics):
    refused = "kernel: the slots are not pinned"
    metrics.note_copying(0, CopyReading({("dma", "load"): 2}, {refused: 2}, 1, 0, "not bound to NUMA node 1"))
    metrics.note_copying(1, CopyReading({("dma", "load"): 1}, {}, 1, 4, ""))
    assert value(metrics, "host_problem", rank="0", problem="not bound to NUMA node 1") == 1
    after = CopyReading({("dma", "load"): 2, ("kernel", "load"): 5}, {refused: 3}, 1, 8, "8 of 16 slots stay pageable")
    metrics.note_copying(0, after)
    metrics.note_copying(0, after)
    assert value(metrics, "transfer_batches_total", backend="dma", direction="load") == 3
    assert value(metrics, "transfer_batches_total", backend="kernel", direction="load") == 5
    assert value(metrics, "transfer_refusals_total", reason=refused) == 3
    assert [value(metrics, "pinned_slots", rank=rank) for rank in "01"] == [8, 4]
    assert value(metrics, "host_problem", rank="0", problem="not bound to NUMA node 1") is None
    assert value(metrics, "host_problem", rank="0", problem="8 of 16 slots stay pageable") == 1
    assert value(metrics, "host_problem", rank="1", problem="") is None


def test_the_dashboard_shows_every_metric_and_no_other(metrics):
    dashboard = (ROOT / "dashboards" / "lmc.json").read_text()
    expressions = " ".join(
        target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel.get("targets", ())
    )
    used = set(re.findall(r"\blmc_\w+", expressions))
    known = names(metrics)
    assert used <= known, f"unknown: {used - known}"
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert families - shown == {"lmc_stored_tokens_total"}  # stored chunks are shown


def labels_of(metrics: CacheMetrics) -> dict[str, tuple[str, ...]]:
    return {one._name: one._labelnames for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)}


def test_the_dashboard_asks_for_labels_that_its_metrics_have(metrics):
    labels = labels_of(metrics)
    targets = [
        target
        for panel in json.loads((ROOT / "dashboards" / "lmc.json").read_text())["panels"]
        for target in panel.get("targets", ())
    ]
    assert len(targets) > 30
    for target in targets:
        asked = {name for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in group.split(", ")} - {
            "le",
            "instance",
        }
        asked |= set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat") or ""))
        for name in re.findall(r"\blmc_\w+", target["expr"]):
            family = re.sub(r"_(bucket|sum|count|total)$", "", name)
            assert asked <= set(labels[family]) or family == "lmc_chunk_bytes", target  # it is joined on nothing
        assert set(re.findall(r'(\w+)=~?"', target["expr"])) == {"instance"}, target


def test_the_rules_ask_for_metrics_and_labels_that_there_are(metrics):
    labels = labels_of(metrics)
    path = ROOT / "dashboards" / "rules.yaml"
    rules = [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    assert {"alert", "record"} <= {kind for rule in rules for kind in rule}
    for rule in rules:
        asked = {name for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for name in group.split(", ")}
        families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in re.findall(r"\blmc_\w+", rule["expr"])}
        assert families and families <= set(labels), rule
        given = {label for family in families for label in labels[family]} | {"instance", "le"}
        assert asked <= given, rule
        if "alert" in rule:
            shown = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
            assert shown <= asked, f"{rule['alert']} shows labels that its expression does not keep"
            assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")


@pytest.mark.program("promtool")
def test_promtool_accepts_the_rules() -> None:
    subprocess.run([program("promtool"), "check", "rules", str(ROOT / "dashboards" / "rules.yaml")], check=True)


def test_the_operations_page_names_every_metric_with_its_labels(metrics):
    page = (ROOT / "docs" / "operations.md").read_text()
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ",".join(labels_of(metrics)[family.name])
        assert f"`{name}{{{labels}}}`" in page if labels else f"`{name}`" in page, name
