"""What travels between the scheduler's process and the workers' inside vLLM's own metadata."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmc.cache.plan import Plan, Report, WorkerReady


@dataclass
class Introduction(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    ready: WorkerReady | None
    failure: str = ""


@dataclass
class StepPlan(KVConnectorMetadata):  # type: ignore[misc]
    plan: Plan


@dataclass
class StepReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        return StepReport(self.report.merge(other.report))
