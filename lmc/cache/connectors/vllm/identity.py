"""What decides the bytes of a chunk, read off vLLM's own objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from blake3 import blake3

from lmc.cache.scheduler.cache import Identity
from lmc.errors import LayoutError
from lmc.model import adapter_digest, weights_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


def request_identity(request: Request, tenant: str) -> Identity:
    """Adapter, tenant and salt, and what stands at multimodal placeholders and at positions given as embeddings."""
    lora = request.lora_request
    return Identity(
        lora=_adapter_identity(lora) if lora else "",
        tenant=json.dumps([tenant, request.cache_salt]) if request.cache_salt else tenant,
        extra=_content_identity(request) if request.mm_features or request.prompt_embeds is not None else None,
    )


def _adapter_identity(lora: LoRARequest) -> str:
    """An adapter is met once under an id, unless it is reloaded in place; what its files hold later is not what the engine runs."""
    met = _met_adapter.__wrapped__ if lora.load_inplace else _met_adapter
    return met(lora.lora_int_id, lora.lora_name, lora.lora_path)


@lru_cache(maxsize=4096)
def _met_adapter(number: int, name: str, path: str) -> str:
    folder = Path(path).expanduser()
    return adapter_digest(folder) if (folder / "adapter_config.json").is_file() else f"{name}\0{path}"


def _content_identity(request: Request) -> Callable[[int, int], bytes]:
    embeddings = request.prompt_embeds
    spans = [
        (feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length, feature.identifier)
        for feature in request.mm_features
    ]

    def between(start: int, end: int) -> bytes:
        inside = [(first - start, last - start, name) for first, last, name in spans if first < end and last > start]
        identity = json.dumps(inside).encode()
        if embeddings is not None and start < len(embeddings):
            rows = embeddings[start:end].contiguous().view(torch.uint8).numpy()
            identity += blake3(rows).digest()
        return identity

    return between


def model_identity(vllm_config: VllmConfig) -> str:
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


def require_full_attention(kv_cache_config: KVCacheConfig) -> None:
    """Raises LayoutError when a request does not keep the KV of all its tokens in its blocks."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise LayoutError(f"a hybrid model with {len(groups)} KV cache groups is not supported; run it with --no-cache")
    spec = groups[0].kv_cache_spec
    for one in getattr(spec, "kv_cache_specs", {"": spec}).values():
        if type(one).__name__ not in ("FullAttentionSpec", "MLAAttentionSpec"):
            raise LayoutError(f"a model with {type(one).__name__} KV is not supported; run it with --no-cache")


def page_packing(vllm_config: VllmConfig, kv_caches: dict[str, torch.Tensor]) -> str:
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
