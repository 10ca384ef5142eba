"""The connector in a worker's process: opens the rank's cache when vLLM has allocated the KV memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from torch import distributed, nn
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_tp_group

from lmc.cache.config import CacheConfig
from lmc.cache.connectors.guard import contain
from lmc.cache.connectors.vllm.adapters import Loaded, LoadedAdapters
from lmc.cache.connectors.vllm.alike import ranks_alike
from lmc.cache.connectors.vllm.groups import is_window, read_groups
from lmc.cache.connectors.vllm.identity import (
    model_identity,
    page_packing,
    require_prefix_attention,
    weights_source,
)
from lmc.cache.connectors.vllm.messages import Introduction, StepPlan, StepReport
from lmc.cache.connectors.vllm.options import require_supported_options
from lmc.cache.connectors.vllm.promises import Owed
from lmc.cache.connectors.vllm.stats import LmcStats
from lmc.cache.connectors.weights import HeldWeights, WeightsReading, find_models, name_weights, share_readings
from lmc.cache.keys import Namespace
from lmc.cache.node.open import open_worker
from lmc.cache.parts import Parts
from lmc.cache.plan import COPY, SKIP, Plan, Report, RequestCopies, operations_of
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.worker.common import share_slots
from lmc.cache.worker.worker import CacheWorker
from lmc.errors import LayoutError, LmcError, ModelError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class WorkerSide:
    """A worker's half."""

    config: CacheConfig
    vllm_config: VllmConfig
    kv_cache_config: KVCacheConfig
    worker: CacheWorker | None = None
    weights: HeldWeights | None = None
    model: str = ""  # the name of the model whose KV this is
    adapters: LoadedAdapters | None = None
    asked: StepPlan | None = None  # the step under way
    told: Loaded = field(default_factory=dict)
    alike: int = 1  # neighbouring ranks that hold the same KV
    others: Sequence[tuple[KVLayout, int]] = ()  # of further KV groups: where they are, and the blocks of a part
    failure: str = "the engine registered no KV cache"
    owed: Owed = field(default_factory=Owed)
    gone: bool = False  # the cache has ended, and the scheduler's side is to know

    def open(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """All ranks must take part, whatever goes wrong on one of them."""
        try:
            readings = self._share_reading(lambda: self._first_reading(kv_caches))
            self.worker = self._open_worker(lambda: self._describe(kv_caches, readings))
        except (LmcError, OSError) as error:
            if self.config.strict:
                raise
            self.failure = str(error)
            logger.error("lmc: no cache on rank %d: %s", self.vllm_config.parallel_config.rank, error)

    def _open_worker(self, describe: Callable[[], tuple[Namespace, KVLayout]]) -> CacheWorker:
        parallel = self.vllm_config.parallel_config
        here = int(getattr(parallel, "local_world_size", parallel.world_size))
        alike = math.gcd(self.alike, here)
        if self.config.node is not None:
            alike = 1  # a node's slots hold every rank's part
        elif self.is_hybrid and alike > 1:
            alike = 1
            if parallel.rank == 0:
                logger.warning("lmc: ranks that hold the same KV store a copy each: not all layers keep all tokens")
        (namespace, layout), common = share_slots(
            self.config, describe, rank=parallel.rank, alike=alike, num_ranks=here, gather=self._of_all_ranks
        )
        if common is None:
            return open_worker(self.config, namespace, layout, rank=parallel.rank, num_ranks=here, others=self.others)
        namespace = replace(namespace, tp_size=namespace.tp_size // alike)
        with common:
            return open_worker(
                self.config, namespace, layout, rank=parallel.rank, num_ranks=here // alike, common=common
            )

    def _of_all_ranks(self, one: T) -> list[T]:
        group = get_tp_group()
        given = [one] * group.world_size
        distributed.all_gather_object(given, one, group=group.cpu_group)
        return given

    def _describe(
        self, kv_caches: dict[str, torch.Tensor], readings: Sequence[WeightsReading]
    ) -> tuple[Namespace, KVLayout]:
        """What is in this rank's KV memory, and where. Raises LmcError if it cannot be cached."""
        groups = read_groups(self.kv_cache_config, self.vllm_config)
        if groups.window and self.config.node is not None:
            raise LayoutError("node is not supported for a model in which every layer has a window; leave it out")
        packing = page_packing(self.vllm_config, kv_caches)
        require_prefix_attention(packing)
        layouts = [
            KVLayout.from_vllm(kv_caches, self.kv_cache_config, isa=packing, group=number) for number in groups.order
        ]
        chunk_tokens = groups.chunk_tokens(self.config)
        self.others = list(zip(layouts[1:], Parts(chunk_tokens, groups.groups).blocks[1:], strict=True))
        self.model = model_identity(self.vllm_config, name_weights(readings))
        namespace = Namespace(
            engine="vllm",
            model=self.model,
            revision=str(self.vllm_config.model_config.revision or ""),
            kv_dtype=f"{self.vllm_config.model_config.dtype}/{self.vllm_config.cache_config.cache_dtype}",
            layout=groups.fingerprint(layouts),
            chunk_tokens=chunk_tokens,
            tp_size=self.vllm_config.parallel_config.tensor_parallel_size,
        )
        return namespace, layouts[0]

    def _first_reading(self, kv_caches: dict[str, torch.Tensor]) -> WeightsReading:
        if self.gone:
            raise ModelError(self.failure)
        require_supported_options(self.vllm_config)
        self._find_weights(kv_caches)
        assert self.weights is not None
        return self.weights.read(
            weights_source(self.vllm_config) if self.vllm_config.parallel_config.rank == 0 else None
        )

    def _share_reading(self, read: Callable[[], WeightsReading]) -> list[WeightsReading]:
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        return share_readings(read, get_tp_group() if ranks > 1 else None)

    def _find_weights(self, kv_caches: dict[str, torch.Tensor]) -> None:
        parallel, layers = self.vllm_config.parallel_config, self.vllm_config.compilation_config.static_forward_context
        known = [layers[name] for name in kv_caches if isinstance(layers.get(name), nn.Module)]
        models = find_models(known)
        elsewhere = parallel.enable_expert_parallel and parallel.data_parallel_size > 1  # are some of the experts
        self.weights = HeldWeights(models, is_all=len(known) == len(kv_caches) and not elsewhere)
        if len(known) == len(kv_caches):
            self.alike = ranks_alike(self.kv_cache_config, models, known)
        if self.vllm_config.lora_config is not None:
            self.adapters = LoadedAdapters.of(models, parallel.rank)

    def introduce(self) -> Introduction:
        return Introduction(self.worker.ready() if self.worker is not None else None, self.failure)

    def fence(self, overwritten: frozenset[int] | None) -> None:
        if self.worker is not None:
            self.worker.fence(overwritten)

    def detach(self) -> None:
        if self.worker is not None:
            self.worker.detach()

    def attach(self) -> None:
        if self.worker is not None:
            self.worker.attach()

    def begin(self, step: StepPlan, forward_context: ForwardContext) -> None:
        self.asked = step
        self.owed.begin(step.plan)
        if self.worker is not None:
            plan = step.plan
            if step.adapters:
                plan = self._refuse_loads(step)
            self.worker.begin(plan, by_layer=self._runs_layer_hooks(forward_context))

    def wait_layer(self, name: str) -> None:
        if self.worker is not None:
            self.worker.wait_layer(name)

    def end(self, step: StepPlan) -> None:
        if self.worker is not None:
            plan = step.plan
            if step.adapters and (wrong := self._of_other_adapters(step, plan.stores)):
                self.worker.give_up(operations_of(wrong), COPY)
                plan = replace(plan, stores=[one for one in plan.stores if one not in wrong])
            self.worker.end(plan)

    def _refuse_loads(self, step: StepPlan) -> Plan:
        """The plan without the loads of requests whose adapter is no longer the one by which they were named."""
        plan = step.plan
        wrong = self._of_other_adapters(step, plan.loads)
        late = self._of_other_adapters(step, plan.background_loads, may_be_absent=True)
        if not wrong and not late:
            return plan
        assert self.worker is not None
        self.worker.give_up(operations_of([*wrong, *late]), COPY)
        blocks = [block for one in (*wrong, *late) for chunk in one.chunks for block in chunk.blocks if block != SKIP]
        return replace(
            plan,
            loads=[one for one in plan.loads if one not in wrong],
            background_loads=[one for one in plan.background_loads if one not in late],
            failed_blocks=[*plan.failed_blocks, *blocks],
            failed_requests=[*plan.failed_requests, *(one.request_id for one in late)],
        )

    def _of_other_adapters(
        self, step: StepPlan, requests: Sequence[RequestCopies], *, may_be_absent: bool = False
    ) -> list[RequestCopies]:
        """may_be_absent: the engine loads the adapter after this step, if it does not hold it now."""
        if self.adapters is None:
            return []
        loaded, rank, wrong = self.adapters.read(), self.adapters.rank, []
        for request in requests:
            number, digests = step.adapters.get(request.request_id, (0, ()))
            if digests and loaded.get((number, rank), digests[rank] if may_be_absent else "") != digests[rank]:
                wrong.append(request)
        return wrong

    def _runs_layer_hooks(self, forward_context: ForwardContext) -> bool:
        """Whether wait_layer() will be called for every layer of this pass, and before anything asks for failed blocks.

        A replayed full CUDA graph calls no Python, a draft model's layers run after vLLM has asked, and a batch in halves
        (--enable-dbo) runs each layer twice, on two threads.
        """
        return (
            forward_context.attn_metadata is not None
            and forward_context.cudagraph_runtime_mode is not CUDAGraphMode.FULL
            and self.vllm_config.speculative_config is None
            and not self.vllm_config.parallel_config.use_ubatching
        )

    def loaded(self) -> set[str]:
        """Requests whose background load has ended; without a cache, all that have not been told of."""
        return self.worker.take_loaded() if self.worker is not None else set(self.owed.background)

    @property
    def is_hybrid(self) -> bool:
        """Several KV groups, or a window: told of failed blocks vLLM ends, or rewinds into blocks that are gone; it takes requests."""
        groups = self.kv_cache_config.kv_cache_groups
        return len(groups) > 1 or any(is_window(group) for group in groups)

    def failed_requests(self) -> set[str]:
        """Of the requests of the last loaded(), those that vLLM shall compute from the start."""
        failed = self.worker.take_failed_requests() if self.worker is not None else set(self.owed.background)
        return failed if self.is_hybrid else set()

    def failed_blocks(self) -> set[int]:
        """Blocks that were promised but not filled. Call it after loaded()."""
        failed = self.worker.take_failed_blocks() if self.worker is not None else set(self.owed.blocks)
        return set() if self.is_hybrid else failed

    def report(self) -> StepReport | None:
        """What has become of copies, and what the step asked."""
        asked, self.asked = self.asked, None
        model = (
            self._model_now() if asked is not None and asked.asks_model else ""
        )  # first, since all ranks must take part
        if self.gone:
            return StepReport(Report(), gone=True)
        report = self.worker.take_report() if self.worker is not None else None
        adapters = self.adapters.read() if self.adapters is not None else {}
        asks_adapters, asks_model = (asked.asks_adapters, asked.asks_model) if asked is not None else (False, 0)
        if not report and adapters == self.told and not asks_adapters and not asks_model:
            return None
        self.told = adapters
        return StepReport(report or Report(), adapters, asks_adapters, asks_model, model)

    def _model_now(self) -> str:
        readings = self._share_reading(self._reading)
        if any(one.changed for one in readings):
            self.model = model_identity(self.vllm_config, name_weights(readings))
        return self.model

    def _reading(self) -> WeightsReading:
        if self.weights is None:
            raise ModelError("this rank has not read its weights")
        return self.weights.read(None)

    def stats(self) -> LmcStats | None:
        """The scheduler's half counts for both."""
        return None

    def refuse(self) -> None:
        """The scheduler's side has no cache, or no longer."""
        if self.worker is not None:
            self.give_up()
        self.gone = False  # it knows

    def give_up(self) -> None:
        """Go on without the cache. No block is read or written any more when this returns; what was promised counts as failed."""
        self.gone = True
        self.failure = "a fault in the cache"
        worker, self.worker = self.worker, None
        if worker is not None:
            contain(worker.copier.close)  # whatever else fails: an engine's block must not change under it
            worker.close(0.0)  # the engine waits

    def close(self) -> None:
        if self.worker is not None:
            worker, self.worker = self.worker, None
            worker.close()
