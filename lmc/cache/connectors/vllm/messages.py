"""What travels between the scheduler's process and the workers' inside vLLM's own metadata."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmc.cache.connectors.guard import answered
from lmc.cache.connectors.vllm.adapters import Loaded
from lmc.cache.plan import Plan, Report, WorkerReady


@dataclass
class Introduction(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    ready: WorkerReady | None
    failure: str = ""


@dataclass
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    plan: Plan
    # request -> its adapter, and the digests of the adapter's weights by rank
    adapters: dict[str, tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    asks_adapters: bool = False  # which adapters are loaded
    asks_model: int = 0  # the number of the last reset, if the workers shall say which weights they hold after it
    # blocks that the step may write and that earlier steps may still be storing; None: any block may be one of them
    overwritten: frozenset[int] | None = None
    refused: bool = False  # there is no cache, or no longer, though this rank has opened its part


@dataclass
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    report: Report
    adapters: Loaded = field(default_factory=dict)
    answers_adapters: bool = False
    answers_model: int = 0  # the number of the reset by which the step asked
    model: str = ""  # the name of what the engine holds now, then
    gone: bool = False  # the cache has ended on a rank

    @answered(lambda self, other: StepReport(Report(), gone=True))
    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        return StepReport(
            self.report.merge(other.report),
            {**self.adapters, **other.adapters},
            self.answers_adapters and other.answers_adapters,
            self.answers_model or other.answers_model,
            self.model or other.model,
            self.gone or other.gone,
        )
