"""A random model with real variance: small enough to start in seconds, sensitive enough that wrong KV changes its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

VOCABULARY = 512


def make_tiny_llama(folder: Path, *, seed: int = 0, kv_heads: int = 4) -> Path:
    """A 4-layer Llama with 512 token ids and no tokenizer; prompts are token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(LlamaForCausalLM, LlamaConfig(**{**_SHAPE, "num_key_value_heads": kv_heads}), folder, seed)


def make_tiny_phi(folder: Path, *, original_length: int, seed: int = 0) -> Path:
    """LongRoPE: rotary factors change where the engine's longest context is beyond original_length."""
    from transformers import Phi3Config, Phi3ForCausalLM

    factors = [1.0 + 0.5 * index for index in range(16)]
    rope = {"rope_type": "longrope", "type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 16}
    rope |= {"long_factor": factors, "original_max_position_embeddings": original_length}
    config = Phi3Config(**_SHAPE, rope_scaling=rope, original_max_position_embeddings=original_length, pad_token_id=0)
    _save(Phi3ForCausalLM, config, folder, seed)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "original_max_position_embeddings": original_length}))
    return folder


def make_tiny_deepseek(folder: Path, *, seed: int = 0) -> Path:
    """MLA: one latent vector for all heads of a layer."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shape = {**_SHAPE, "num_key_value_heads": 8}
    del shape["head_dim"]
    experts = {"first_k_dense_replace": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    groups = {"n_group": 1, "topk_group": 1}
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "q_lora_rank": None}
    return _save(DeepseekV3ForCausalLM, DeepseekV3Config(**shape, **experts, **groups, **sizes), folder, seed)


def make_tiny_mistral(folder: Path, *, window: int, seed: int = 0) -> Path:
    """The same with sliding-window attention in every layer."""
    from transformers import MistralConfig, MistralForCausalLM

    return _save(MistralForCausalLM, MistralConfig(**_SHAPE, sliding_window=window), folder, seed)


def make_tiny_gemma(folder: Path, *, window: int, pattern: str = "wwfw", seed: int = 0) -> Path:
    """Layers with windows, and some that keep all tokens (f). By default one full and three window groups of KV cache that share memory."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {**_SHAPE, "num_hidden_layers": len(pattern)}
    kinds = ["full_attention" if kind == "f" else "sliding_attention" for kind in pattern]
    config = Gemma3TextConfig(**shape, sliding_window=window, layer_types=kinds, query_pre_attn_scalar=32)
    return _save(Gemma3ForCausalLM, config, folder, seed)


def make_tiny_gemma4(folder: Path, *, window: int, seed: int = 0) -> Path:
    """Heads of the full layer are larger than those of the windows, so vLLM gives the windows larger blocks."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    shape = {**_SHAPE, "tie_word_embeddings": True, "sliding_window": window, "layer_types": kinds, "pad_token_id": 2}
    config = Gemma4TextConfig(**shape, hidden_size_per_layer_input=32, vocab_size_per_layer_input=VOCABULARY)
    return _save(Gemma4ForCausalLM, config, folder, seed)


def make_tiny_llama4(folder: Path, *, span: int, seed: int = 0) -> Path:
    """Three layers that attend inside spans of tokens, and a full one."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    shape = {**_SHAPE, "intermediate_size": 256, "intermediate_size_mlp": 512, "pad_token_id": 2}
    config = Llama4TextConfig(**shape, **experts, attention_chunk_size=span, no_rope_layers=[1, 1, 1, 0])
    return _save(Llama4ForCausalLM, config, folder, seed)


def make_tiny_gpt_oss(folder: Path, *, window: int, seed: int = 0) -> Path:
    """Experts, attention sinks, and windows in every other layer: a window group and a full one of two layers each."""
    from transformers import GptOssConfig, GptOssForCausalLM

    kinds = ["sliding_attention", "full_attention"] * 2
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(**_SHAPE, sliding_window=window, layer_types=kinds, pad_token_id=2, **experts)
    return _save(GptOssForCausalLM, config, folder, seed)


def make_tiny_falcon(folder: Path, *, seed: int = 0) -> Path:
    """Mamba and attention in every layer: two groups of KV cache, one of them of states that are no tokens' own."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    mamba = {"d_ssm": 512, "n_heads": 16, "d_head": 32, "d_state": 16, "n_groups": 1, "expand": 2, "chunk_size": 32}
    config = FalconH1Config(**_SHAPE, **{f"mamba_{name}": value for name, value in mamba.items()})
    return _save(FalconH1ForCausalLM, config, folder, seed)


def make_tiny_granite(folder: Path, *, seed: int = 0) -> Path:
    """Mamba 2 in every other layer."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    mamba = {"n_heads": 16, "d_head": 32, "n_groups": 1, "d_state": 16, "d_conv": 4, "expand": 2, "chunk_size": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 256}
    shape = {**_SHAPE, **{f"mamba_{name}": value for name, value in mamba.items()}, **experts}
    del shape["head_dim"]
    kinds = ["mamba", "attention"] * 2
    config = GraniteMoeHybridConfig(**shape, layer_types=kinds, position_embedding_type="nope", pad_token_id=2)
    return _save(GraniteMoeHybridForCausalLM, config, folder, seed)


def make_tiny_nemotron(folder: Path, *, seed: int = 0) -> Path:
    """Mamba 2, attention and plain layers, each by itself."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    mamba = {"mamba_num_heads": 16, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "conv_kernel": 4}
    shape = {**_SHAPE, **mamba, "expand": 2, "chunk_size": 32, "num_hidden_layers": 6, "pad_token_id": 2}
    config = NemotronHConfig(**shape, hybrid_override_pattern="M*-M*-")
    return _save(NemotronHForCausalLM, config, folder, seed)


def make_tiny_lfm2(folder: Path, *, seed: int = 0) -> Path:
    """Three layers of short convolutions, which keep a state, and a full one."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    kinds = ["conv", "conv", "full_attention", "conv"]
    conv = {"conv_L_cache": 3, "conv_dim": 256, "conv_dim_out": 256, "conv_use_xavier_init": True}
    blocks = {"block_dim": 256, "block_ff_dim": 512, "block_auto_adjust_ff_dim": False}
    return _save(Lfm2ForCausalLM, Lfm2Config(**_SHAPE, **conv, **blocks, layer_types=kinds), folder, seed)


def make_tiny_qwen3_next(folder: Path, *, seed: int = 0) -> Path:
    """Three layers of the gated delta rule, which keep a state, and a full one."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    kinds = ["linear_attention"] * 3 + ["full_attention"]
    linear = {
        "num_value_heads": 2,
        "num_key_heads": 1,
        "key_head_dim": 128,
        "value_head_dim": 128,
        "conv_kernel_dim": 4,
    }
    shape = {**_SHAPE, **{f"linear_{name}": value for name, value in linear.items()}, "layer_types": kinds}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = Qwen3NextConfig(**shape, **experts, shared_expert_intermediate_size=128)
    return _save(Qwen3NextForCausalLM, config, folder, seed)


def make_tiny_bert(folder: Path, *, seed: int = 0) -> Path:
    """An encoder: it reads a prompt both ways at once, and keeps no KV."""
    from transformers import BertConfig, BertModel

    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**shape, intermediate_size=128, max_position_embeddings=512, initializer_range=0.12)
    return _save(BertModel, config, folder, seed)


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


def add_tokenizer(folder: Path) -> Path:
    """vLLM's pooling models don't start without one, whatever prompts are."""
    _tokenizer([]).save_pretrained(folder)
    return folder


def _tokenizer(special: list[str]) -> Any:
    """One word for each token id; the last ids are the special ones."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = [*(f"w{number}" for number in range(VOCABULARY - len(special))), *special]
    words = {name: number for number, name in enumerate(names)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w2")), additional_special_tokens=special
    )


IMAGE_TOKEN = VOCABULARY - 1
IMAGE_TOKENS = 64  # that an image takes in a prompt, between two that enclose it and behind one that says it is whole
IMAGE_SIDE = 64  # pixels


def make_tiny_idefics(folder: Path, *, seed: int = 0) -> Path:
    """The same Llama behind a random vision tower. IMAGE_TOKEN stands for an image and becomes IMAGE_TOKENS of them, and three others."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlamaConfig,
    )

    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIDE,
        "patch_size": 8,
        "initializer_range": 0.12,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=LlamaConfig(**_SHAPE),
        scale_factor=1,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=1,
        tie_word_embeddings=False,
        vocab_size=VOCABULARY,
    )
    special = [
        "<end_of_utterance>",
        "<global-img>",
        "<fake_token_around_image>",
        "<image>",
    ]  # the last of them is IMAGE_TOKEN
    tokenizer = _tokenizer(special)
    edge = {"longest_edge": IMAGE_SIDE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS).save_pretrained(folder)
    return _save(Idefics3ForConditionalGeneration, config, folder, seed)


def random_image(seed: int) -> Image:
    import numpy as np
    from PIL import Image as images

    return images.fromarray(np.random.default_rng(seed).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8))
