"""Which of vLLM's options are in the name of a chunk, and which are refused. vLLM's own configuration objects, but no engine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.config
from vllm.config import PoolerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from lmc.cache.connectors.vllm import options
from lmc.cache.connectors.vllm.worker import WorkerSide
from lmc.cache.settings import load_settings
from lmc.errors import ConfigError
from tests.cache.transfer.test_layout_vllm import allocate

pytestmark = pytest.mark.compat


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Hashed:
    """A plugin's configuration: its text says where it lies in memory."""

    def __init__(self, digest: str) -> None:
        self.compute_hash = lambda: digest


def configured(model: Path, **arguments: Any) -> VllmConfig:
    return EngineArgs(model=str(model), skip_tokenizer_init=True, dtype="float32", **arguments).create_engine_config()


@pytest.mark.parametrize("name", options.CLASSES)
def test_every_option_of_the_installed_version_is_decided(name: str) -> None:
    """When this fails with a new version: look what the option does, and write down where it belongs."""
    table = options.CLASSES[name]
    decided = Counter(table.named.split())
    for group in (table.covered, table.refused, table.free):
        assert all(group.values()), "there is always a reason"
        decided.update(option for names in group for option in names.split())
    assert {option for option, times in decided.items() if times > 1} == set(), "decided twice"
    there = {field.name for field in dataclasses.fields(getattr(vllm.config, name)) if not field.name.startswith("_")}
    assert there - set(decided) == set(), "options that nobody has decided about"


def test_each_named_option_changes_the_name(tiny_llama: Path) -> None:
    """Every one that the installed version has, set to something in the finished configuration."""
    plain = options.options_digest(configured(tiny_llama))
    assert (
        options.options_digest(configured(tiny_llama, max_model_len=512, seed=3, block_size=64)) == plain
    )  # which have no part in it
    speculative = {"model": str(tiny_llama), "method": "draft_model", "num_speculative_tokens": 2}
    with_extras: dict[str, Any] = {"enable_lora": True, "speculative_config": speculative}
    seen: dict[str, str] = {
        plain: "plain",
        options.options_digest(configured(tiny_llama, **with_extras)): "with extras",
    }
    assert len(seen) == 2
    for holder, table in (
        ("model_config", options.MODEL),
        ("cache_config", options.CACHE),
        ("attention_config", options.ATTENTION),
        ("load_config", options.LOAD),
        ("lora_config", options.LORA),
        ("speculative_config", options.SPECULATIVE),
        ("", options.WHOLE),
    ):
        for option in table.named.split():
            config = configured(tiny_llama, **with_extras)
            owner = getattr(config, holder) if holder else config
            if hasattr(owner, option):
                object.__setattr__(owner, option, f"another {option}")
                identity = options.options_digest(config)
                assert identity not in seen, (option, seen[identity])
                seen[identity] = option
    for option in options.MULTIMODAL.named.split():
        config = configured(tiny_llama)
        config.model_config.multimodal_config = SimpleNamespace(**{option: "another"})
        assert seen.setdefault(options.options_digest(config), option) == option


def test_an_object_among_the_options_is_named_by_its_digest(tiny_llama: Path) -> None:
    names = set()
    for digest in ("a", "b", "b"):
        config = configured(tiny_llama)
        object.__setattr__(config, "additional_config", Hashed(digest))
        names.add(options.options_digest(config))
    assert len(names) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}},
        {"hf_overrides": {"rms_norm_eps": 1e-3}},
        {"hf_overrides": {"attention_bias": True}},
        {"load_format": "dummy"},
        {"load_format": "dummy", "seed": 1},
        {"enable_lora": True, "lora_target_modules": ["k_proj"]},
    ],
    ids=str,
)
def test_an_option_on_the_command_line_changes_the_name(tiny_llama: Path, arguments: dict[str, Any]) -> None:
    assert options.options_digest(configured(tiny_llama, **arguments)) != options.options_digest(configured(tiny_llama))


def test_random_weights_are_named_by_their_seed(tiny_llama: Path) -> None:
    names = {options.options_digest(configured(tiny_llama, load_format="dummy", seed=seed)) for seed in (0, 1, 1)}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("config", "matters"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, False),
        ({"rope_scaling": None}, False),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, False),
        ({"rope_scaling": {"type": "su", "long_factor": [1.0]}}, True),
        ({"rope_parameters": {"rope_type": "longrope"}}, True),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, True),
        ({"rope_parameters": {"rope_type": "not invented yet"}}, True),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}, "sliding_attention": None}}, True),
        ({"text_config": {"rope_parameters": {"rope_type": "longrope"}}}, True),
        ({"text_config": {"model_type": "llama4_text"}}, True),
        ({"quantization_config": {"type": "int"}}, False),
    ],
    ids=str,
)
def test_where_the_longest_context_matters(config: dict[str, Any], matters: bool) -> None:
    assert options.length_matters(config) is matters


PLAIN = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=32, dtype=torch.float32)


def opened(config: VllmConfig, *, strict: bool, spec: FullAttentionSpec = PLAIN) -> WorkerSide:
    """The worker's side on blocks that vLLM laid out."""
    kv_cache_config, caches = allocate([(["a", "b"], spec)], "LBHNC")
    settings = load_settings(flags={"metrics.enabled": False, "host.capacity": "4MiB", "strict": strict}).config
    layers = dict.fromkeys(
        caches, SimpleNamespace(isa="vec")
    )  # stand in for attention layers, which a model would make
    config.compilation_config.static_forward_context.update(layers)
    side = WorkerSide(settings, config, kv_cache_config)
    side.open(caches)
    return side


def test_a_plain_configuration_is_not_refused(tiny_llama: Path) -> None:
    side = opened(configured(tiny_llama), strict=True)
    assert side.introduce().ready is not None
    side.close()


@pytest.mark.parametrize(
    ("holder", "option", "value", "flag"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config", "pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("cache_config", "calculate_kv_scales", True, "--calculate-kv-scales"),
        ("attention_config", "use_non_causal", True, "use_non_causal"),
        ("attention_config", "hisparse_config", object(), "hisparse_config"),
        ("", "diffusion_config", object(), "--diffusion-config"),
    ],
)
def test_what_changes_what_a_block_holds_is_refused(
    tiny_llama: Path, holder: str, option: str, value: Any, flag: str
) -> None:
    config = configured(tiny_llama)
    object.__setattr__(getattr(config, holder) if holder else config, option, value)
    side = opened(config, strict=False)
    assert side.worker is None, "a cache of blocks that are not what lmc takes them for"
    introduction = side.introduce()
    assert introduction.ready is None and flag in introduction.failure and "--no-cache" in introduction.failure
    with pytest.raises(ConfigError, match=flag):
        opened(config, strict=True)


@pytest.mark.parametrize(("pooling", "refused"), [("MEAN", True), ("CLS", True), ("LAST", False)])
def test_pooling_that_reads_the_whole_prompt_is_refused(tiny_llama: Path, pooling: str, refused: bool) -> None:
    """Of a loaded prefix vLLM has no hidden states."""
    config = configured(
        tiny_llama, runner="pooling", convert="embed", pooler_config=PoolerConfig(seq_pooling_type=pooling)
    )
    side = opened(config, strict=False)
    assert ("--pooler-config" in side.failure) is refused
    assert (side.worker is None) is refused
    side.close()


def test_attention_to_later_tokens_is_refused(tiny_llama: Path) -> None:
    """As of models that read the whole prompt both ways: KV is then not a matter of the tokens before it."""
    spec = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=32, dtype=torch.float32, non_causal=True)
    side = opened(configured(tiny_llama), strict=False, spec=spec)
    assert side.worker is None and "later tokens" in side.failure
