"""The class that vLLM calls. Each hook is one call of the scheduler's or the worker's side, and guarded: see guard.py."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmc.cache.config import CacheConfig
from lmc.cache.connectors.guard import answered, complain, guarded
from lmc.cache.connectors.vllm.groups import KVGroups, read_groups
from lmc.cache.connectors.vllm.identity import block_outermost
from lmc.cache.connectors.vllm.messages import Introduction, StepPlan, StepReport
from lmc.cache.connectors.vllm.parallel import share_of
from lmc.cache.connectors.vllm.scheduler import SchedulerSide
from lmc.cache.connectors.vllm.stats import LmcPromMetrics, LmcStats
from lmc.cache.connectors.vllm.versions import CacheHitSource
from lmc.cache.connectors.vllm.worker import WorkerSide
from lmc.cache.observe.logs import use_format
from lmc.cache.parts import Group
from lmc.cache.plan import Report
from lmc.cache.settings import load_settings
from lmc.cache.share import of_directory, of_engine, part_of
from lmc.errors import ConfigError, LayoutError, LmcError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.config.kv_transfer import KVTransferConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class LmcConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM ships no types that mypy follows here
    """Settings come from kv_connector_extra_config: "settings" (dotted keys) over LMC_* variables over the file "config"."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Raises ConfigError for bad settings. After any other fault the engine starts without the cache."""
        super().__init__(vllm_config, role, kv_cache_config)
        self._side: SchedulerSide | WorkerSide
        try:
            self._side = _open_side(vllm_config, role, kv_cache_config)
        except LmcError:
            raise
        except Exception as error:  # noqa: BLE001  see guard.py
            complain("fault at the start; the engine runs WITHOUT the cache", error)
            without = CacheConfig()
            if role is KVConnectorRole.SCHEDULER:
                self._side = SchedulerSide(without, 1)
            else:
                self._side = WorkerSide(without, vllm_config, kv_cache_config)
            self._side.give_up()

    @property
    def strict(self) -> bool:
        return self._side.config.strict

    def end_cache(self) -> None:
        self._side.give_up()

    @property
    def _scheduler(self) -> SchedulerSide:
        assert isinstance(self._side, SchedulerSide)
        return self._side

    @property
    def _worker(self) -> WorkerSide:
        assert isinstance(self._side, WorkerSide)
        return self._side

    # Scheduler

    @property
    @guarded(lambda self: False)
    def requires_kv_delivery(self) -> bool:
        return False

    @guarded(lambda self, metadata: None, at_start=True)
    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._scheduler.meet([metadata[rank] for rank in sorted(metadata)])

    @guarded(lambda self, request, num_computed_tokens: (0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        found, background = self._scheduler.lookup(request, num_computed_tokens)
        self._scheduler.promises.offer(request.request_id, num_computed_tokens, found, background)
        return found, background

    def _keep_promise(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._scheduler.promises.keep(request.request_id, blocks.get_block_ids(), num_external_tokens)

    @guarded(_keep_promise)
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._keep_promise(request, blocks, num_external_tokens)
        self._scheduler.admit(request, blocks.get_block_ids(), num_external_tokens)

    @guarded(lambda self, request, num_external_tokens: {})
    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        return self._scheduler.sources(request, num_external_tokens)

    def _refusal(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        step = self._scheduler.refusal()
        self._scheduler.promises.planned()
        return step

    @guarded(_refusal)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        step = self._scheduler.step(scheduler_output)
        self._scheduler.promises.planned()
        return step

    @guarded(lambda self, connector_output: None)
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, StepReport):
            self._scheduler.learn(report)

    @guarded(lambda self, request, block_ids: (False, None))
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request)

    @guarded(lambda self, request, block_ids: (False, None))
    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request)

    @guarded(lambda self: False)
    def has_pending_push_work(self) -> bool:
        return self._scheduler.busy

    @guarded(lambda self: True)
    def reset_cache(self) -> bool | None:
        return self._scheduler.reset()

    @guarded(lambda self: [])
    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._scheduler.take_events()

    # API server

    @classmethod
    @answered(lambda cls, vllm_config: None)
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return block_outermost(vllm_config)

    @classmethod
    @answered(lambda cls, data=None: None)
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return LmcStats(data or {})

    @classmethod
    @answered(lambda cls, *arguments: None)
    def build_prom_metrics(cls, *arguments: Any) -> KVConnectorPromMetrics | None:
        return LmcPromMetrics(*arguments)

    # Worker

    @guarded(lambda self, kv_caches: None, at_start=True)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._worker.open(kv_caches)

    @classmethod
    @answered(lambda cls, kv_transfer_config: True)
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """Asked from vLLM 0.33 on, which then calls the two hooks below."""
        return True

    @guarded(lambda self: None)
    def unregister_kv_caches(self) -> None:
        self._worker.detach()

    @guarded(lambda self: None)
    def restore_kv_caches(self) -> None:
        self._worker.attach()

    @guarded(lambda self: Introduction(None, self._worker.failure), at_start=True)
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.introduce()

    @guarded(lambda self, kv_connector_metadata: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepPlan)
        if kv_connector_metadata.refused:
            self._worker.refuse()
        self._worker.fence(kv_connector_metadata.overwritten)

    @guarded(lambda self, forward_context, **kwargs: self._worker.owed.begin(self._step().plan))
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._worker.begin(self._step(), forward_context)

    @guarded(lambda self, layer_name: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        self._worker.wait_layer(layer_name)

    @guarded(lambda self, layer_name, kv_layer, attn_metadata, **kwargs: None)
    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Stores copy whole chunks in wait_for_save."""

    @guarded(lambda self: None)
    def wait_for_save(self) -> None:
        self._worker.end(self._step())

    def _loaded(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        loaded = self._worker.loaded()
        failed = self._worker.failed_requests()
        results = KVConnectorTransferResults(finished_recving=loaded, **({"failed_recving": failed} if failed else {}))
        self._worker.owed.told_requests(loaded)
        return results

    @guarded(_loaded)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._loaded(finished_req_ids)

    def _failed_blocks(self) -> set[int]:
        failed = self._worker.failed_blocks()
        self._worker.owed.told_blocks()
        return failed

    @guarded(_failed_blocks)
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._failed_blocks()

    @guarded(lambda self: StepReport(Report(), gone=True))
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._worker.report()

    # Both

    @guarded(lambda self: None)
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._side.stats()

    @guarded(lambda self: None)
    def shutdown(self) -> None:
        self._side.close()

    def _step(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepPlan)
        return metadata


def _open_side(
    vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
) -> SchedulerSide | WorkerSide:
    _log_like_vllm()
    asked = _settings(vllm_config)
    share = share_of(vllm_config, asked.engines_on_node)
    config = of_engine(asked, share)
    use_format(config.log_format)
    if role is KVConnectorRole.WORKER:
        return WorkerSide(config, vllm_config, kv_cache_config)
    if not kv_cache_config.kv_cache_groups:
        return _without_kv(config)
    groups = _known_groups(kv_cache_config, vllm_config)
    groups.chunk_tokens(config)
    events = vllm_config.kv_events_config
    announces = events is not None and events.enable_kv_cache_events
    config = _recoverable(of_directory(config, share), vllm_config, is_hybrid=groups.is_hybrid)
    return SchedulerSide(config, groups.groups[0].block_tokens, announces, part=part_of(asked, share), groups=groups)


def _known_groups(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> KVGroups:
    """The model's groups; its first alone if lmc does not support it, as the workers will say."""
    try:
        return read_groups(kv_cache_config, vllm_config)
    except LayoutError:
        return KVGroups((0,), (Group("full", kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size),), ((),))


def _without_kv(config: CacheConfig) -> SchedulerSide:
    """Raises LayoutError with strict settings."""
    if config.strict:
        raise LayoutError("the model keeps no KV, so there is nothing to cache; run it with --no-cache")
    logging.getLogger(__name__).warning("lmc: running WITHOUT the cache: the model keeps no KV")
    side = SchedulerSide(config, 1)
    side.give_up()
    return side


def _settings(vllm_config: VllmConfig) -> CacheConfig:
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
    if unknown := sorted(set(extra) - {"settings", "config"}):
        raise ConfigError(f"unknown key {unknown[0]!r} in kv_connector_extra_config; there are settings and config")
    file = Path(extra["config"]) if extra.get("config") else None
    return load_settings(file, os.environ, extra.get("settings")).config


def _recoverable(config: CacheConfig, vllm_config: VllmConfig, *, is_hybrid: bool) -> CacheConfig:
    """The settings, with all loads in the background where vLLM goes on with wrong ids or KV after one that failed before the pass.

    That is where it plans a step before it has the output of the last (vLLM issue 45138), with its second model runner (issue 49250), and
    with its own prefix cache: of the requests that share the blocks of a failed load only the first computes them again. The others take
    them for computed in the next step, also if the first was aborted or computes only a part of them there. A load in the background has
    ended, well or not, before its request is in a batch, and before its blocks are shared. Of a model with several KV groups vLLM takes no
    other failure.
    """
    if (
        is_hybrid
        or vllm_config.scheduler_config.async_scheduling
        or vllm_config.use_v2_model_runner
        or vllm_config.cache_config.enable_prefix_caching
    ):
        logging.getLogger(__name__).info(
            "lmc: every load runs in the background, whatever background_load_tokens says: "
            "as it is set up, vLLM cannot recompute one that fails before the pass"
        )
        return config.model_copy(update={"background_load_tokens": 1})
    return config


def _log_like_vllm() -> None:
    """vLLM gives handlers to its own loggers only."""
    ours = logging.getLogger("lmc")
    if not ours.handlers:
        ours.handlers = list(logging.getLogger("vllm").handlers)
        ours.setLevel(logging.INFO)
        ours.propagate = not ours.handlers
