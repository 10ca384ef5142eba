"""vLLM's KV connector, out of tree: --kv-transfer-config with kv_connector LmcConnector and kv_connector_module_path this module.

vLLM makes one object in the scheduler process (it holds the CacheEngine) and one in each worker process (it holds a CacheWorker). The
worker introduces itself through the handshake metadata, plans travel in the connector metadata, reports in the worker metadata.

A request is looked up in memory. Chunks on lower tiers are first staged into host slots while the answer is "ask again"; what is promised
lies in host memory and is copied before the forward pass. So no block is ever written by a thread that could be late.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from blake3 import blake3
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmc.cache.config import CacheConfig, chunk_tokens_for
from lmc.cache.directory import HOST
from lmc.cache.engine import CacheEngine, Identity, describe_tiers
from lmc.cache.keys import Namespace
from lmc.cache.layout import KVLayout
from lmc.cache.open import open_worker
from lmc.cache.plan import Plan, Report, WorkerReady
from lmc.cache.settings import load_settings
from lmc.cache.worker import CacheWorker
from lmc.errors import ConfigError, LmcError
from lmc.model import weights_digest

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


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


@dataclass
class _Tracked:
    """A request between its first lookup and its end."""

    request: Request
    computed: int = 0  # tokens the engine held itself at the last lookup


class LmcConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM ships no types that mypy follows here
    """Settings come from kv_connector_extra_config: "settings" (dotted keys) over LMC_* variables over the file "config"."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        self._config = _settings(vllm_config)
        self._block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._side: _Scheduler | _Worker
        if role is KVConnectorRole.SCHEDULER:
            chunk_tokens_for(self._config, self._block_tokens)
            self._side = _Scheduler(self._config, self._block_tokens)
        else:
            self._side = _Worker(self._config, vllm_config, kv_cache_config)

    @property
    def _scheduler(self) -> _Scheduler:
        assert isinstance(self._side, _Scheduler)
        return self._side

    @property
    def _worker(self) -> _Worker:
        assert isinstance(self._side, _Worker)
        return self._side

    # Scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._scheduler.meet([metadata[rank] for rank in sorted(metadata)])

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.lookup(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.admit(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        return self._scheduler.sources(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return StepPlan(self._scheduler.plan(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            self._scheduler.apply(report.report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.finish(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.finish(request)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self._scheduler.busy

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset()

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.open(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.introduce()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._worker.begin(self._step_plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete when start_load_kv returns."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Stores copy whole chunks in wait_for_save."""

    def wait_for_save(self) -> None:
        self._worker.end(self._step_plan())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return KVConnectorTransferResults()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._worker.report()
        return StepReport(report) if report else None

    # Both

    def shutdown(self) -> None:
        self._side.close()

    def _step_plan(self) -> Plan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepPlan)
        return metadata.plan


@dataclass
class _Scheduler:
    """The scheduler's half. A fault in lmc ends the cache, never the engine: promises not yet planned are then recomputed."""

    config: CacheConfig
    block_tokens: int
    engine: CacheEngine | None = None
    tracked: dict[str, _Tracked] = field(default_factory=dict)
    promised: list[int] = field(default_factory=list)  # blocks that this step's plan must fill

    def meet(self, introductions: list[KVConnectorHandshakeMetadata]) -> None:
        ready: list[WorkerReady] = []
        failures: list[str] = []
        for introduction in introductions:
            assert isinstance(introduction, Introduction)
            if introduction.ready is not None:
                ready.append(introduction.ready)
                failures += introduction.ready.warnings
            else:
                failures.append(introduction.failure)
        if len(ready) < len(introductions):
            logger.error("lmc: running WITHOUT the cache: %s", "; ".join(failures))
            return
        self.engine = CacheEngine(self.config, ready, self.block_tokens)
        tiers = describe_tiers(self.engine.directory.usage(), self.engine.chunk_bytes * len(ready))
        logger.info(
            "lmc: cache on, %d tokens per chunk, %s, metrics at %s",
            self.engine.chunk_tokens,
            tiers,
            self.engine.metrics_url,
        )

    def lookup(self, request: Request, computed: int) -> int | None:
        if self.engine is None or request.skip_reading_prefix_cache:
            return 0
        with self:
            self.tracked.setdefault(request.request_id, _Tracked(request)).computed = computed
            identity = _identity(request, self.config)
            return self.engine.lookup(request.request_id, request.all_token_ids, computed, identity)
        return 0

    def admit(self, request: Request, blocks: list[int], num_external: int) -> None:
        tracked = self.tracked.get(request.request_id)
        if tracked is None:
            return
        if num_external:
            first = tracked.computed // self.block_tokens
            self.promised += blocks[first : first + num_external // self.block_tokens]
        if self.engine is not None:
            with self:
                self.engine.admit(request.request_id, num_external, blocks)

    def sources(self, request: Request, num_external: int) -> dict[CacheHitSource, int]:
        if self.engine is None or not num_external:
            return {}
        names = {HOST: CacheHitSource.HOST, "disk": CacheHitSource.DISK}
        sources: dict[CacheHitSource, int] = {}
        for tier, tokens in self.engine.loaded_from(request.request_id).items():
            source = names.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            sources[source] = sources.get(source, 0) + tokens
        return sources

    def plan(self, output: SchedulerOutput) -> Plan:
        promised, self.promised = self.promised, []
        if self.engine is not None:
            with self:
                for request_id, num_scheduled in output.num_scheduled_tokens.items():
                    self._plan_store(output, request_id, num_scheduled)
                return self.engine.take_plan()
        return Plan(failed_blocks=promised)

    def _plan_store(self, output: SchedulerOutput, request_id: str, num_scheduled: int) -> None:
        tracked = self.tracked.get(request_id)
        if tracked is None or self.engine is None:
            return
        request = tracked.request
        num_valid = min(request.num_computed_tokens + num_scheduled, request.num_tokens)
        if self.engine.wants_store(request_id, num_valid, request.num_prompt_tokens):
            blocks = output.kv_connector_block_state.get_block_ids(request_id)
            if blocks is not None:
                self.engine.store(request_id, request.all_token_ids, num_valid, request.num_prompt_tokens, blocks[0])

    def apply(self, report: Report) -> None:
        if self.engine is not None:
            with self:
                self.engine.apply(report)

    def finish(self, request: Request) -> None:
        self.tracked.pop(request.request_id, None)
        if self.engine is not None:
            with self:
                self.engine.finish(request.request_id)

    @property
    def busy(self) -> bool:
        return self.engine is not None and self.engine.busy

    def reset(self) -> bool:
        return self.engine is None or self.engine.reset()

    def __enter__(self) -> None:
        """A guarded section: an exception that leaves a hook would end vLLM, so here it ends the cache."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        logger.error("lmc: fault in the cache; the engine goes on WITHOUT it", exc_info=error)
        self.close()
        return True

    def close(self) -> None:
        if self.engine is not None:
            engine, self.engine = self.engine, None
            engine.close()


@dataclass
class _Worker:
    """A worker's half."""

    config: CacheConfig
    vllm_config: VllmConfig
    kv_cache_config: KVCacheConfig
    worker: CacheWorker | None = None
    failure: str = "the engine registered no KV cache"

    def open(self, kv_caches: dict[str, torch.Tensor]) -> None:
        parallel = self.vllm_config.parallel_config
        try:
            if parallel.pipeline_parallel_size > 1:
                raise ConfigError("pipeline parallelism is not supported")
            layout = KVLayout.from_vllm(kv_caches, self.kv_cache_config, isa=_packing(self.vllm_config, kv_caches))
            namespace = Namespace(
                engine="vllm",
                model=_model_identity(self.vllm_config),
                revision=str(self.vllm_config.model_config.revision or ""),
                kv_dtype=f"{self.vllm_config.model_config.dtype}/{self.vllm_config.cache_config.cache_dtype}",
                layout=layout.fingerprint,
                chunk_tokens=chunk_tokens_for(self.config, layout.block_tokens),
                tp_size=parallel.tensor_parallel_size,
            )
            self.worker = open_worker(self.config, namespace, layout, rank=parallel.rank, num_ranks=parallel.world_size)
        except (LmcError, OSError) as error:
            if self.config.strict:
                raise
            self.failure = str(error)
            logger.error("lmc: no cache on rank %d: %s", parallel.rank, error)

    def introduce(self) -> Introduction:
        return Introduction(self.worker.ready() if self.worker is not None else None, self.failure)

    def begin(self, plan: Plan) -> None:
        if self.worker is not None:
            self.worker.begin(plan)

    def end(self, plan: Plan) -> None:
        if self.worker is not None:
            self.worker.end(plan)

    def failed_blocks(self) -> set[int]:
        return self.worker.take_failed_blocks() if self.worker is not None else set()

    def report(self) -> Report | None:
        return self.worker.take_report() if self.worker is not None else None

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


def _settings(vllm_config: VllmConfig) -> CacheConfig:
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
    if unknown := sorted(set(extra) - {"settings", "config"}):
        raise ConfigError(f"unknown key {unknown[0]!r} in kv_connector_extra_config; there are settings and config")
    file = Path(extra["config"]) if extra.get("config") else None
    return load_settings(file, os.environ, extra.get("settings")).config


def _identity(request: Request, config: CacheConfig) -> Identity:
    lora = request.lora_request
    tenant = json.dumps([config.tenant, request.cache_salt]) if request.cache_salt else config.tenant
    return Identity(
        lora=f"{lora.lora_name}\0{lora.lora_path}" if lora else "",
        tenant=tenant,
        extra=_multimodal_identity(request) if request.mm_features else None,
    )


def _multimodal_identity(request: Request) -> Callable[[int, int], bytes]:
    spans = [
        (feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length, feature.identifier)
        for feature in request.mm_features
    ]

    def between(start: int, end: int) -> bytes:
        return json.dumps(
            [(first - start, last - start, name) for first, last, name in spans if first < end and last > start]
        ).encode()

    return between


def _model_identity(vllm_config: VllmConfig) -> str:
    """The weights and every configuration value that the engine has in force."""
    model = vllm_config.model_config
    in_force = json.loads(model.hf_config.to_json_string(use_diff=False))
    for volatile in ("transformers_version", "_name_or_path"):
        in_force.pop(volatile, None)
    folder = Path(model.model)
    weights = weights_digest(folder) if folder.is_dir() else model.model
    return (
        f"{weights}-{blake3(json.dumps(in_force, sort_keys=True).encode()).hexdigest()[:16]}-{model.quantization or ''}"
    )


def _packing(vllm_config: VllmConfig, kv_caches: dict[str, torch.Tensor]) -> str:
    """What orders the bytes inside a page: the attention ISA on CPU, the attention backend elsewhere."""
    layers = vllm_config.compilation_config.static_forward_context
    names = set()
    for name in kv_caches:
        layer = layers.get(name)
        if layer is not None:
            backend = (
                layer.get_attn_backend().get_name() if hasattr(layer, "get_attn_backend") else type(layer).__name__
            )
            names.add(f"{backend}:{getattr(layer, 'isa', '')}")
    return ",".join(sorted(names))


def _log_like_vllm() -> None:
    """vLLM gives handlers to its own loggers only."""
    ours = logging.getLogger("lmc")
    if not ours.handlers:
        ours.handlers = list(logging.getLogger("vllm").handlers)
        ours.setLevel(logging.INFO)
        ours.propagate = not ours.handlers
