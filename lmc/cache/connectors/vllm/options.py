"""Which of vLLM's options decide the bytes of a chunk. docs/architecture.md ("What is in a name, and why") says what the rule is.

Every field of these config classes stands in exactly one of four places, and a test compares them with the fields of the installed vLLM: a
field that a new version brings fails the test until somebody has decided where it belongs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from lmc.cache.connectors.positions import rope_kinds
from lmc.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


@dataclass(frozen=True)
class Options:
    """The fields of one config class. Keys are field names with spaces between them, values say why they stand there."""

    named: str = ""  # the value is part of the name
    covered: Mapping[str, str] = field(default_factory=dict)  # something else in the name changes with it
    refused: Mapping[str, str] = field(default_factory=dict)  # lmc does not start with it
    free: Mapping[str, str] = field(
        default_factory=dict
    )  # it leaves the bytes as they are, or changes their rounding only


MODEL = Options(
    named="quantization quantization_config model_impl model_class_overrides code_revision convert disable_sliding_window",
    covered={
        "model model_weights revision": "the name of the weights",
        "hf_config hf_text_config hf_overrides hf_config_path config_format": "the configuration in force",
        "generation_config override_generation_config": "what decides KV, a model writes into its configuration",
        "max_model_len": "where the positions' encoding depends on it (length_matters)",
        "dtype": "Namespace.kv_dtype",
        "multimodal_config": "MULTIMODAL",
        "seed": "where weights are drawn at random",
        "word_embeddings_untied_by_checkpoint": "it follows from the weights",
    },
    refused={
        "pooler_config": "where the pooled states of a loaded prefix would be missing: mean and first-token pooling"
    },
    free={
        "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init": "a name is made of token ids",
        "trust_remote_code allow_deprecated_quantization": "a permission: whatever it lets in is in the configuration",
        "allowed_local_media_path allowed_media_domains enable_prompt_embeds": "what a request may carry is named with the request",
        "runner is_submodel_config": "what is done with hidden states after the last layer",
        "served_model_name hf_token io_processor_plugin renderer_num_workers": "the server around the engine",
        "max_logprobs logprobs_mode logits_processors return_sampling_mask use_fp64_gumbel enable_trace_replay "
        "enable_return_routed_experts": "sampling and output, behind the KV",
        "enforce_eager disable_cascade_attn": "kernels: rounding only",
        "enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend sleep_mode_offload_cudagraph "
        "enable_nccl_comm_suspend enable_cumem_allocator": "where memory comes from",
        "spec_target_max_model_len": "when not to speculate",
    },
)

CACHE = Options(
    named="kv_cache_dtype_skip_layers",
    covered={
        "cache_dtype": "Namespace.kv_dtype",
        "block_size user_specified_block_size kv_cache_layout effective_attention_block_size": "the layout's fingerprint",
        "mamba_block_size user_specified_mamba_block_size mamba_cache_dtype mamba_ssm_cache_dtype": (
            "the groups' fingerprint: shapes and types of states"
        ),
        "sliding_window": "the groups' fingerprint; the windows themselves",
    },
    refused={
        "calculate_kv_scales": "scales that are taken from the first batch differ between two starts",
        "mamba_cache_mode": "another one than align keeps no state for later",
        "use_replayssm replayssm_buffer_len use_kda_recoverssm": "a state would be behind its tokens, and the rest elsewhere",
        "simple_cpu_offload_num_blocks": "it belongs to another connector",
    },
    free={
        "gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks num_cpu_blocks num_gpu_blocks_override "
        "kv_cache_size_tokens kv_cache_max_concurrency is_attention_free": "how many blocks there are",
        "enable_prefix_caching prefix_caching_hash_algo prefix_match_unit hash_block_size cache_hit_alignment_tokens": (
            "the engine's own prefix cache; lmc's names are its own"
        ),
        "skip_page_size_padded mamba_page_size_padded": "padding behind the bytes of a block",
        "swa_bounded_replay": "what it computes again is kept for one request only, and such models are refused",
        "prefix_cache_retention_interval enable_mamba_shared_prefix_checkpoint enable_mamba_fine_grained_prefix_cache": (
            "which windows and states the engine keeps for itself"
        ),
        "kv_sharing_fast_prefill": "layers that read another layer's KV have none of their own",
        "kv_offloading_size kv_offloading_backend": "vLLM's own offloading is another connector",
    },
)

PARALLEL = Options(
    covered={
        "tensor_parallel_size": "Namespace.tp_size",
        "rank": "a chunk's name and its rank together find its bytes",
    },
    refused={
        "pipeline_parallel_size": "a rank would hold some of the layers only",
        "prefill_context_parallel_size": "ranks would hold different tokens of a prompt",
        "decode_context_parallel_size cp_kv_cache_interleave_size dcp_kv_cache_interleave_size dcp_comm_backend dcp_q_replicate": (
            "a block would span more tokens, shared out over the ranks"
        ),
    },
    free={
        "data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local data_parallel_index "
        "data_parallel_master_ip data_parallel_rpc_port data_parallel_master_port data_parallel_backend "
        "data_parallel_external_lb data_parallel_hybrid_lb dp_sync_interval disable_nccl_for_dp_synchronization "
        "enable_elastic_ep elastic_ep_max_dp_size": "each data-parallel engine holds whole prompts of its own",
        "enable_expert_parallel enable_ep_weight_filter enable_eplb eplb_config expert_placement_strategy all2all_backend "
        "is_moe_model": "where experts are computed: rounding only",
        "enable_hc_sp disable_custom_all_reduce enable_batch_sharded_sampling": "how ranks sum up: rounding only",
        "enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold": (
            "a batch in halves; loads layer by layer are off with it, since a layer then runs twice in a pass"
        ),
        "max_parallel_loading_workers enable_shm_tensor_arena ray_workers_use_nsight ray_runtime_env placement_group "
        "distributed_executor_backend worker_cls sd_worker_cls worker_extension_cls master_addr master_port node_rank nnodes numa_bind "
        "numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids distributed_timeout_seconds "
        "cpu_distributed_timeout_seconds enable_fault_tolerance fault_tolerance_config world_size": "how processes are started and met",
    },
)

LORA = Options(
    named="lora_dtype target_modules enable_tower_connector_lora enable_mixed_moe_lora_format enable_moe_shared_loras",
    covered={"default_mm_loras": "the adapter is part of the request"},
    free={
        "max_lora_rank max_loras max_cpu_loras specialize_active_lora": "room for adapters",
        "fully_sharded_loras": "how ranks share an adapter: rounding only",
        "max_lora_cls_labels": "a head behind the KV",
    },
)

SPECULATIVE = Options(
    named="method quantization kv_cache_dtype index_share_for_mtp_iteration parallel_drafting",
    covered={
        "model revision code_revision draft_model_config": "the draft model's own identity: its KV is in the chunk too"
    },
    free={
        "target_model_config target_parallel_config draft_parallel_config draft_tensor_parallel_size tensor_parallel_size": (
            "the target's own, or the layout's fingerprint"
        ),
        "num_speculative_tokens num_speculative_tokens_per_batch_size prompt_lookup_max prompt_lookup_min "
        "suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor "
        "suffix_decoding_min_token_prob max_model_len disable_padded_drafter_batch disable_eagle_block_drop "
        "disable_lookahead_block_hashes": "which tokens are proposed; the target decides which are kept",
        "rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length enable_adaptive_verification "
        "draft_sample_method dspark_draft_topk use_local_argmax_reduction use_heterogeneous_vocab draft_lm_head_quantization "
        "fly_entropy_threshold fly_entropy_top_k fly_window_size xpress_topc": "sampling, behind the KV",
        "enforce_eager moe_backend attention_backend": "kernels of the draft model; its backend is in the layout's fingerprint",
        "draft_load_config": "where the draft's weights come from is the target's rule",
    },
)

ATTENTION = Options(
    named="disable_flashinfer_q_quantization use_prefill_query_quantization indexer_kv_dtype indexer_sparse_logits",
    covered={"backend backend_per_kind": "the layout's fingerprint names each layer's backend"},
    refused={
        "use_non_causal": "KV would depend on tokens that come later",
        "hisparse_config": "a part of the KV would be in host memory",
    },
    free={
        "minimax_m3_msa_decode_backend minimax_m3_indexer_cp flash_attn_version use_trtllm_attention mla_prefill_backend "
        "trtllm_ragged_backend sparse_mla_force_mqa": "kernels: rounding only",
        "flash_attn_max_num_splits_for_cuda_graph tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph "
        "sparse_mla_prefill_workspace_factor indexer_tp_shard_min_rows flex_attn_block_m flex_attn_block_n "
        "flex_attn_q_block_size flex_attn_kv_block_size": "how kernels share out their work: rounding only",
    },
)

LOAD = Options(
    named="model_loader_extra_config",
    covered={"load_format": "the name of the weights; weights made up at random are named by their seed"},
    free={
        "download_dir device ignore_patterns pt_load_map_location safetensors_load_strategy safetensors_prefetch_num_threads "
        "safetensors_prefetch_block_size use_tqdm_on_load": "how the same weights get into memory",
    },
)

MULTIMODAL = Options(
    named="mm_processor_kwargs mm_encoder_attn_dtype video_pruning_rate video_pruning_method",
    refused={"mm_encoder_fp8_scale_path": "a file of scales that has no name"},
    free={
        "media_io_kwargs mm_hasher_algorithm": "an image is named by what was read and by its hash",
        "limit_per_prompt enable_mm_embeds allow_missing_mm_embeddings language_model_only interleave_mm_strings": (
            "what a request may carry"
        ),
        "mm_encoder_attn_backend mm_encoder_tp_mode mm_device_do_normalize": "kernels of the encoder: rounding only",
        "mm_processor_cache_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_tensor_ipc mm_ipc_gpu_memory_gb "
        "skip_mm_profiling mm_encoder_only mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin": "memory and processes",
    },
)

WHOLE = Options(
    named="additional_config",
    covered={
        "model_config": "MODEL",
        "cache_config": "CACHE",
        "parallel_config": "PARALLEL",
        "lora_config": "LORA",
        "speculative_config": "SPECULATIVE",
        "attention_config": "ATTENTION",
        "load_config": "LOAD",
        "quant_config": "it follows from ModelConfig.quantization, quantization_config and the weights",
    },
    refused={
        "diffusion_config": "KV would depend on tokens that come later",
    },
    free={
        "mamba_config": "kernels: rounding only",
        "compilation_config kernel_config optimization_level performance_mode": "kernels and graphs: rounding only",
        "scheduler_config": "what is computed together: rounding only",
        "device_config offload_config engram_config": "where weights lie",
        "weight_transfer_config": "weights that change come with a reset",
        "aux_output_config watermark_config structured_outputs_config reasoning_config": "sampling and output, behind the KV",
        "ec_manager_config ec_transfer_config kv_events_config kv_transfer_config": "other caches, and this one",
        "logging_config observability_config profiler_config watchdog_config instance_id shutdown_timeout": "operations",
    },
)

CLASSES = {
    "ModelConfig": MODEL,
    "CacheConfig": CACHE,
    "ParallelConfig": PARALLEL,
    "LoRAConfig": LORA,
    "SpeculativeConfig": SPECULATIVE,
    "AttentionConfig": ATTENTION,
    "LoadConfig": LOAD,
    "MultiModalConfig": MULTIMODAL,
    "VllmConfig": WHOLE,
}

_SHARED_OUT = "a block's tokens would be shared out over the ranks"
_LATER = "KV would depend on tokens that come later"

# Rotary encodings whose factors are the same at every max_model_len.
_LENGTH_FREE = frozenset(
    [
        "default",
        "linear",
        "ntk",
        "llama3",
        "yarn",
        "deepseek_yarn",
        "deepseek_llama_scaling",
        "proportional",
        "mrope",
        "bailing_mrope",
    ]
)


def named_options(vllm_config: VllmConfig) -> dict[str, Any]:
    """The values in force of all options that are named; what is not set is left out."""
    model = vllm_config.model_config
    holders = {
        "model": (MODEL, model),
        "cache": (CACHE, vllm_config.cache_config),
        "lora": (LORA, vllm_config.lora_config),
        "speculative": (SPECULATIVE, _drafts(vllm_config)),
        "attention": (ATTENTION, getattr(vllm_config, "attention_config", None)),
        "load": (LOAD, vllm_config.load_config),
        "multimodal": (MULTIMODAL, model.multimodal_config),
        "vllm": (WHOLE, vllm_config),
    }
    found = {
        f"{holder}.{name}": value
        for holder, (options, config) in holders.items()
        for name in options.named.split()
        if (value := getattr(config, name, None))
    }
    if vllm_config.load_config.load_format == "dummy":
        found["random weights"] = model.seed
    if length_matters(configuration(model)):
        found["model.max_model_len"] = model.max_model_len
    found["configuration"] = configuration(model)
    if (drafts := _drafts(vllm_config)) is not None:
        found["draft configuration"] = configuration(drafts.draft_model_config)
    return found


def options_digest(vllm_config: VllmConfig) -> str:
    """A name for these values, equal on every rank and at every start."""
    return blake3(json.dumps(named_options(vllm_config), sort_keys=True, default=_text).encode()).hexdigest()[:32]


def _text(value: object) -> str:
    """vLLM's own objects say what they are by a digest; the text of others may hold their place in memory."""
    return str(value.compute_hash()) if hasattr(value, "compute_hash") else str(value)


def _drafts(vllm_config: VllmConfig) -> Any:
    """The speculative configuration, if a model drafts whose KV is in the blocks too."""
    speculative = vllm_config.speculative_config
    return speculative if speculative is not None and speculative.draft_model_config is not None else None


def configuration(model: ModelConfig) -> dict[str, Any]:
    """Every value that the model runs with, overrides included."""
    in_force: dict[str, Any] = json.loads(model.hf_config.to_json_string(use_diff=False))
    for volatile in ("transformers_version", "_name_or_path"):
        in_force.pop(volatile, None)
    return in_force


def length_matters(config: Mapping[str, Any]) -> bool:
    """Whether max_model_len decides how positions are encoded: true of every rotary encoding that is not known to be free of it.

    Llama 4 scales attention by position where max_model_len is beyond 32768.
    """
    models = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return any(str(model.get("model_type", "")).startswith("llama4") for model in models) or any(
        kind not in _LENGTH_FREE for kind in rope_kinds(config)
    )


def require_supported_options(vllm_config: VllmConfig) -> None:
    """Raises ConfigError for an option with which blocks would hold something else than lmc takes them to hold."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model = vllm_config.model_config
    multimodal = model.multimodal_config
    attention = getattr(vllm_config, "attention_config", None)
    for option, given, why in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1, "a rank would hold some of the layers only"),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1, _SHARED_OUT),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size > 1, _SHARED_OUT),
        (
            "--calculate-kv-scales",
            getattr(cache, "calculate_kv_scales", False),
            "its scales differ from start to start",
        ),
        ("--diffusion-config", getattr(vllm_config, "diffusion_config", None), _LATER),
        (
            "--use-replayssm",
            getattr(cache, "use_replayssm", False),
            "states would be behind their tokens",
        ),
        ("--pooler-config", not model.is_prefix_caching_supported, "its pooling reads every token's state"),
        ("attention_config.use_non_causal", getattr(attention, "use_non_causal", False), _LATER),
        ("attention_config.hisparse_config", getattr(attention, "hisparse_config", None), "KV would be in host memory"),
        (
            "--mm-encoder-fp8-scale-path",
            getattr(multimodal, "mm_encoder_fp8_scale_path", None),
            "the scales have no name",
        ),
    ):
        if given:
            raise ConfigError(f"{option} is not supported: {why}; leave it out, or run with --no-cache")
