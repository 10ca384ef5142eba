"""The cache for plain Hugging Face Transformers: generation of one prompt at a time, which skips the prefill of what was seen before.

The shortest whole adapter, kept small as the example of docs/adding-an-engine.md. The model's KV is a StaticCache; position p of the prompt
lies in block p // BLOCK_TOKENS, so the block table of every request is 0, 1, 2, ... and lmc copies straight into the model's tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache

from lmc.cache.config import CacheConfig, chunk_tokens_for
from lmc.cache.connectors.base import LocalCache
from lmc.cache.connectors.weights import HeldWeights, name_weights
from lmc.cache.keys import Namespace
from lmc.cache.transfer.layout import KVLayout
from lmc.errors import ConfigError, LayoutError

BLOCK_TOKENS = 32


@dataclass(frozen=True)
class Generation:
    tokens: list[int]  # without the prompt
    num_loaded: int  # prompt tokens that were not computed


class CachedGenerator:
    """One model on one device with room for max_tokens of prompt and output. Raises LayoutError, ConfigError or TierError."""

    def __init__(self, model: Any, config: CacheConfig, *, max_tokens: int) -> None:  # transformers' PreTrainedModel
        self._model = model
        self._kv = StaticCache(model.config, max_cache_len=max_tokens // BLOCK_TOKENS * BLOCK_TOKENS)
        if any(layer.is_sliding for layer in self._kv.layers):
            raise LayoutError("models with sliding-window layers are not supported on Transformers")
        shape = model.config.get_text_config(decoder=True)
        size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        self._kv.early_initialization(1, shape.num_key_value_heads, size, model.dtype, model.device)
        layout = KVLayout.from_sglang(
            [layer.keys[0].transpose(0, 1) for layer in self._kv.layers],  # (tokens, heads, size), as a view
            [layer.values[0].transpose(0, 1) for layer in self._kv.layers],
            BLOCK_TOKENS,
            packing=str(model.config._attn_implementation),
        )
        namespace = Namespace(
            engine="transformers",
            model=name_weights([HeldWeights([model]).read()]),
            revision=str(getattr(model.config, "_commit_hash", None) or ""),
            kv_dtype=str(model.dtype),
            layout=layout.fingerprint,
            chunk_tokens=chunk_tokens_for(config, BLOCK_TOKENS),
        )
        self.cache = LocalCache(config, namespace, layout)
        self._blocks = range(layout.num_blocks)
        self._requests = itertools.count()

    def generate(self, prompt: Sequence[int], **options: object) -> Generation:
        """Options go to the model's own generate(); a prompt that does not fit is a ConfigError."""
        room = len(self._blocks) * BLOCK_TOKENS
        if len(prompt) >= room:
            raise ConfigError(f"a prompt of {len(prompt)} tokens does not fit; max_tokens gives room for {room - 1}")
        request = f"request {next(self._requests)}"
        loaded = self.cache.lookup(request, prompt)
        if not self.cache.load(request, loaded, self._blocks):
            loaded = 0
        for layer in self._kv.layers:
            layer.cumulative_length.fill_(loaded)  # where generate() goes on
        ids = torch.tensor([list(prompt)], device=self._model.device)
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=self._kv, use_cache=True, **options
        )
        self.cache.store(request, prompt, len(prompt), self._blocks)
        self.cache.finish(request)
        return Generation(output[0, len(prompt) :].tolist(), loaded)

    def close(self) -> None:
        self.cache.close()
