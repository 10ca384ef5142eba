"""The metrics page of a node: every namespace's metrics with a label that names it, the engines, the state in numbers, and commands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from lmc.cache.config import CacheConfig
from lmc.cache.keys import hashed_name
from lmc.cache.scheduler.admin import Clear, Mailbox, Pin, Prefetch, Result, Unpin
from lmc.cache.scheduler.endpoint import Endpoint
from lmc.cache.scheduler.open import open_endpoint
from lmc.errors import ConfigError

if TYPE_CHECKING:
    from lmc.cache.node.server import Node


def open_page(config: CacheConfig, node: Node) -> Endpoint | None:
    """None if it is off, or if its port is taken."""
    registry = CollectorRegistry()
    registry.register(_Metrics(node))
    commands = _Commands(node, hashed_name(config.tenant))
    return open_endpoint(
        config, commands, _Post(node), registry, lambda: stats(node), lambda newest: spans(node, newest)
    )


def stats(node: Node) -> Result:
    """From any thread. What is read is one number or one copied table each."""
    engines = [
        {
            "engine": session.engine,
            "namespace": session.domain.name.label(),
            "session": session.number,
            "attached": not session.ended,
            "requests": session.num_requests,
            "loaded_chunks": session.num_loads,
            "open_copies": session.num_open,
        }
        for session in list(node.sessions.values())
    ]
    return {
        "node": True,
        "engines": engines,
        "namespaces": [domain.stats() for domain in list(node.domains.values())],
        "memory": {"bytes": node.memory_bytes, "free_bytes": node.free_bytes},
    }


def spans(node: Node, newest: int) -> Result:
    found = {domain.name.label(): domain.spans.read(newest) for domain in list(node.domains.values())}
    return {"namespaces": found}


class _Metrics(Collector):
    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        """The families of all namespaces, each sample with the label `namespace`; then those of the engines."""
        families: dict[str, Metric] = {}
        for domain in list(self._node.domains.values()):
            label = {"namespace": domain.name.label()}
            for family in domain.metrics.registry.collect():
                known = families.get(family.name)
                if known is None:
                    known = families[family.name] = Metric(family.name, family.documentation, family.type)
                known.samples += [one._replace(labels=label | one.labels) for one in family.samples]
        yield from families.values()
        labels = ["engine", "namespace"]
        attached = GaugeMetricFamily("lmc_engine_attached", "1 while the engine is attached", labels=labels)
        requests = GaugeMetricFamily("lmc_engine_requests", "Requests of the engine since it attached", labels=labels)
        copies = GaugeMetricFamily("lmc_engine_open_copies", "Copies that the engine may be making", labels=labels)
        by_engine: dict[tuple[str, str], list[int]] = {}
        for session in list(self._node.sessions.values()):
            values = by_engine.setdefault((session.engine, session.domain.name.label()), [0, 0, 0])
            values[0] |= not session.ended
            values[1] += session.num_requests
            values[2] += session.num_open
        for key, values in by_engine.items():
            for metric, value in zip((attached, requests, copies), values, strict=True):
                metric.add_metric(list(key), value)
        yield from (attached, requests, copies)
        memory = GaugeMetricFamily("lmc_node_free_bytes", "Memory that no namespace has taken yet")
        memory.add_metric([], self._node.free_bytes)
        yield memory


class _Post(Mailbox):
    """Commands run on the node's thread."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node

    def delivered(self) -> None:
        self._node.mail.append(self.run)
        self._node.wake()


class _Commands:
    """A command is for every namespace; what it did in each is in the answer, by the namespace's label."""

    def __init__(self, node: Node, tenant: str) -> None:
        self._node = node
        self._tenant = tenant

    def run(self, command: Pin | Unpin | Prefetch | Clear) -> Result:
        result: Result = {}
        refused: ConfigError | None = None
        for name, domain in self._node.domains.items():
            try:
                result[name.label()] = domain.admin(self._tenant).run(command)
            except ConfigError as error:
                refused = error
        if refused is not None and not result:
            raise refused
        return {"namespaces": result}
