"""The connector in a worker's process: opens the rank's cache when vLLM has allocated the KV memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode

from lmc.cache.config import CacheConfig, chunk_tokens_for
from lmc.cache.connectors.vllm.identity import model_identity, page_packing, require_full_attention
from lmc.cache.connectors.vllm.messages import Introduction
from lmc.cache.connectors.vllm.stats import LmcStats
from lmc.cache.keys import Namespace
from lmc.cache.plan import Plan, Report
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.worker.open import open_worker
from lmc.cache.worker.worker import CacheWorker
from lmc.errors import ConfigError, LmcError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


@dataclass
class WorkerSide:
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
            require_full_attention(self.kv_cache_config)
            layout = KVLayout.from_vllm(kv_caches, self.kv_cache_config, isa=page_packing(self.vllm_config, kv_caches))
            namespace = Namespace(
                engine="vllm",
                model=model_identity(self.vllm_config),
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

    def fence(self) -> None:
        if self.worker is not None:
            self.worker.fence()

    def begin(self, plan: Plan, forward_context: ForwardContext) -> None:
        if self.worker is not None:
            self.worker.begin(plan, by_layer=self._runs_layer_hooks(forward_context))

    def wait_layer(self, name: str) -> None:
        if self.worker is not None:
            self.worker.wait_layer(name)

    def end(self, plan: Plan) -> None:
        if self.worker is not None:
            self.worker.end(plan)

    def _runs_layer_hooks(self, forward_context: ForwardContext) -> bool:
        """Whether wait_layer() will be called for every layer of this pass, and before anything asks for failed blocks.

        A replayed full CUDA graph calls no Python, and a draft model's layers run after vLLM has asked.
        """
        return (
            forward_context.attn_metadata is not None
            and forward_context.cudagraph_runtime_mode is not CUDAGraphMode.FULL
            and self.vllm_config.speculative_config is None
        )

    def loaded(self) -> set[str]:
        return self.worker.take_loaded() if self.worker is not None else set()

    def failed_blocks(self) -> set[int]:
        return self.worker.take_failed_blocks() if self.worker is not None else set()

    def report(self) -> Report | None:
        return self.worker.take_report() if self.worker is not None else None

    def stats(self) -> LmcStats | None:
        """The scheduler's half counts for both."""
        return None

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
