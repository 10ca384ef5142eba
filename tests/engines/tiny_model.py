"""A random model with real variance: small enough to start in seconds, sensitive enough that wrong KV changes its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512


def make_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """A 4-layer Llama with 512 token ids and no tokenizer; prompts are token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(LlamaForCausalLM, LlamaConfig(**_SHAPE), folder, seed)


def make_tiny_mistral(folder: Path, *, window: int, seed: int = 0) -> Path:
    """The same with sliding-window attention in every layer."""
    from transformers import MistralConfig, MistralForCausalLM

    return _save(MistralForCausalLM, MistralConfig(**_SHAPE, sliding_window=window), folder, seed)


def make_tiny_gemma(folder: Path, *, window: int, seed: int = 0) -> Path:
    """Layers with sliding windows and layers with full attention in turn: two groups of KV cache that share memory."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    turns = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(**_SHAPE, sliding_window=window, layer_types=turns, query_pre_attn_scalar=32)
    return _save(Gemma3ForCausalLM, config, folder, seed)


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _save(model_class: Any, config: Any, folder: Path, seed: int) -> Path:
    import torch

    torch.manual_seed(seed)
    model_class(config).to(torch.float32).save_pretrained(folder)
    return folder
