"""What decides the bytes of a chunk, read off vLLM's own objects."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from blake3 import blake3
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from lmc.cache.connectors.vllm.options import options_digest
from lmc.cache.connectors.vllm.versions import LAYOUT_NAMES
from lmc.cache.keys import hashed_name
from lmc.cache.scheduler.cache import Identity
from lmc.errors import LayoutError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

_FROM_FILES = {"auto", "fastsafetensors", "gguf", "hf", "instanttensor", "mistral", "npcache", "pt", "safetensors"}


def request_identity(request: Request, tenant: str, adapter: str = "") -> Identity:
    """Adapter, tenant (by its hashed name) and salt, and what the model gets at each position beside the token id."""
    salt = hashed_name(request.cache_salt or "")
    return Identity(lora=adapter, tenant=tenant, salt=salt, extra=_content_identity(request))


def _content_identity(request: Request) -> Callable[[int, int], bytes] | None:
    """What stands at multimodal placeholders, which positions are given as embeddings, and as which."""
    embeddings = request.prompt_embeds
    parameters = request.pooling_params.extra_kwargs if request.pooling_params is not None else None
    spans = [
        (feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length, feature.identifier)
        for feature in request.mm_features
    ]
    if not spans and embeddings is None and not parameters:
        return None
    embedded = _embedded_positions(request)

    def between(start: int, end: int) -> bytes:
        """Empty where there are tokens only, whatever follows."""
        inside = [(first - start, last - start, name) for first, last, name in spans if first < end and last > start]
        rows = torch.zeros(end - start, dtype=torch.bool)
        rows[: max(0, len(embedded) - start)] = embedded[start:end]
        if not inside and not parameters and not rows.any():
            return b""
        identity = json.dumps([inside, parameters], sort_keys=True, default=repr).encode()
        if embeddings is not None and rows.any():
            chosen = embeddings[start:end][rows[: len(embeddings) - start]]
            identity += b"\0" + np.packbits(rows.numpy()).tobytes() + str(chosen.dtype).encode()
            identity += blake3(chosen.reshape(-1).view(torch.uint8).numpy()).digest()
        return identity

    return between


def _embedded_positions(request: Request) -> torch.Tensor:
    """(prompt tokens,) bool: where the model gets an embedding of the client's; the token id there means nothing.

    Without a mask, and with both, vLLM's two model runners disagree about which of them counts, so both belong to the name.
    """
    embeddings, mask = request.prompt_embeds, request.prompt_is_token_ids
    if embeddings is None:
        return torch.zeros(0, dtype=torch.bool)
    if mask is None:
        return torch.ones(len(embeddings), dtype=torch.bool)
    return ~torch.tensor(mask, dtype=torch.bool)[: len(embeddings)]


def model_identity(vllm_config: VllmConfig, weights: str) -> str:
    """The weights, by their name, and every option and configuration value in force that decides KV."""
    return f"{weights}-{options_digest(vllm_config)}"


def weights_source(vllm_config: VllmConfig) -> Path | None:
    """The folder or file that the engine has loaded as it is; None if it made its weights up, or got them elsewhere."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format not in _FROM_FILES:
        return None
    if os.path.exists(model.model):  # noqa: PTH110  # Path's raises what only this rank may meet
        return Path(model.model)
    try:
        found = snapshot_download(
            model.model, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
        )
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # neither a path nor on the hub
    return Path(found)


def require_prefix_attention(packing: str) -> None:
    """Raises LayoutError where the engine's kernel attends to the tokens of one step only, whatever was loaded before them."""
    if any(name.startswith("CPU_MLA:") for name in packing.split(",")):
        raise LayoutError(
            "vLLM's MLA on a CPU without AMX cannot go on from a prefix that was computed before; run it with --no-cache"
        )


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


def block_outermost(vllm_config: VllmConfig) -> str | None:
    """vLLM's name for the layout in which all layers of a block lie together, so that a block is one copy and not one for each layer.

    Inside a block tokens and heads stay in the order that the attention kernels like best: vLLM has both orders under the same backends,
    except those of MLA, with one head, and FlashInfer's on Blackwell. vLLM keeps its own choice, with a warning, where none of its
    backends can read the layout.
    """
    if vllm_config.device_config.device_type != "cuda":
        return None  # the CPU's kernels read one layout only
    heads_first = vllm_config.model_config.use_mla or _is_blackwell()
    name = "BLHNC" if heads_first else "BLNHC"
    return name if name in LAYOUT_NAMES else None


def _is_blackwell() -> bool:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return capability is not None and capability.major == 10
