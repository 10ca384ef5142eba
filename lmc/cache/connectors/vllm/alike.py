"""Which tensor-parallel ranks hold the same KV: all of them with MLA, neighbours where there are fewer KV heads than ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from vllm.model_executor.layers.linear import QKVParallelLinear

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def ranks_alike(kv_cache_config: KVCacheConfig, models: Sequence[nn.Module], layers: Sequence[nn.Module]) -> int:
    """So many neighbouring ranks certainly hold the same KV in all of these layers of the models. The same answer on every rank.

    vLLM says it of MLA. Of heads the projection says it that makes K and V beside the attention: a layer of another build counts as one
    whose KV differs.
    """
    told = int(getattr(kv_cache_config, "kv_tp_replicas", 1))  # not in every tested version
    if told > 1:
        return told
    parents = {id(child): module for model in models for module in model.modules() for child in module.children()}
    return math.gcd(*(_heads_alike(parents.get(id(layer))) for layer in layers)) if layers else 1


def _heads_alike(attention: nn.Module | None) -> int:
    found = [one for one in attention.modules() if isinstance(one, QKVParallelLinear)] if attention is not None else []
    return int(found[0].num_kv_head_replicas) if len(found) == 1 else 1
