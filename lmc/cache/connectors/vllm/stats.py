"""lmc's counters on vLLM's own /metrics: what they grew by travels with the engine's output to the API server, which adds it up there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmc.cache.connectors.guard import answered

_EVERY_SECONDS = 1.0
_SUFFIX = "_total"
_PREFIX = "vllm:"  # apart from lmc's own endpoint, so that whoever scrapes both counts nothing twice


@dataclass
class LmcStats(KVConnectorStats):  # type: ignore[misc]
    """data: "name|label=value|..." -> growth."""

    data: dict[str, float] = field(default_factory=dict)

    @answered(lambda self: None)
    def reset(self) -> None:
        self.data = {}

    @answered(lambda self, other: self)
    def aggregate(self, other: KVConnectorStats) -> LmcStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0.0) + value
        return self

    @answered(lambda self: {})
    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        return {name.replace("|", " "): round(value, 3) for name, value in sorted(self.data.items())}

    @answered(lambda self: True)
    def is_empty(self) -> bool:
        return not self.data


class CounterGrowth:
    """Reads how much a registry's counters grew, at most once a second."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._clock = clock
        self._next = 0.0
        self._seen: dict[str, float] = {}

    def take(self) -> LmcStats | None:
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + _EVERY_SECONDS
        grown = {}
        for family in self._registry.collect():
            if family.type != "counter":
                continue
            for sample in family.samples:
                if sample.name.endswith(_SUFFIX):
                    name = "|".join(
                        [sample.name, *(f"{label}={value}" for label, value in sorted(sample.labels.items()))]
                    )
                    growth = sample.value - self._seen.get(name, 0.0)
                    if growth > 0:
                        grown[name] = growth
                        self._seen[name] = sample.value
        return LmcStats(grown) if grown else None


class LmcPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Runs in the API server. A counter is made when it first grows, since only the cache knows which tiers and reasons there are."""

    def __init__(self, *arguments: Any) -> None:  # Any: vLLM's own signature, passed on
        super().__init__(*arguments)
        self._counters: dict[str, Any] = {}  # Any: vLLM chooses the class

    @answered(lambda self, transfer_stats_data, engine_idx=0: None)
    def observe(self, transfer_stats_data: dict[str, float], engine_idx: int = 0) -> None:
        for key, growth in transfer_stats_data.items():
            name, *labels = key.split("|")
            pairs = [label.split("=", 1) for label in labels]
            counter = self._counters.get(name)
            if counter is None:
                counter = self._counters[name] = self._counter_cls(
                    name=_PREFIX + name.removesuffix(_SUFFIX),
                    documentation="Of lmc; explained on its own metrics endpoint",
                    labelnames=[*self._labelnames, *(label for label, _ in pairs)],
                )
            values = [*self.per_engine_labelvalues[engine_idx], *(value for _, value in pairs)]
            counter.labels(*values).inc(growth)
