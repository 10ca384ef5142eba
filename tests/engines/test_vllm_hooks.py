"""What lmc reads off vLLM's own objects for a device, without an engine: blocks that a step overwrites, and the layout that it asks for."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.attention.backends.utils import _DEFAULT_LAYOUT_PREFERENCE, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from lmc.cache.connectors.vllm import identity
from lmc.cache.connectors.vllm.scheduler import blocks_overwritten
from lmc.cache.settings import load_settings
from lmc.cache.transfer.planner import Direction, plan
from lmc.serve.engines import vllm_transfer_config
from tests.contracts.transfer import vllm_engine

pytestmark = pytest.mark.engine

BLOCK_TOKENS = 16


def vllm_config(model: Path, **arguments: Any) -> Any:
    settings = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 2048, "block_size": BLOCK_TOKENS}
    settings |= {"max_num_batched_tokens": 256, "max_num_seqs": 8, "async_scheduling": False, "enforce_eager": True}
    return EngineArgs(model=str(model), **settings, **arguments).create_engine_config()


def scheduler_of(model: Path, num_blocks: int) -> Scheduler:
    config = vllm_config(model, enable_prefix_caching=True)
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
        log_stats=False,
    )


def test_every_block_that_changes_hands_is_named_in_the_step_that_writes_it(tiny_llama: Path) -> None:
    """vLLM's own scheduler with few blocks: prefix hits, chunked prefill, preemption. A pass may write a block that another request wrote
    before only if the step names it, for then the fence waits for a store that still reads it."""
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_TOKENS, hash_function)
    scheduler = scheduler_of(tiny_llama, num_blocks=40)
    generator = random.Random(3)
    head = [generator.randrange(2, 500) for _ in range(96)]
    requests: dict[str, Request] = {}
    for index in range(24):
        tokens = head[: 32 * generator.randrange(4)] + [
            generator.randrange(2, 500) for _ in range(generator.randrange(20, 200))
        ]
        request = Request(f"r{index}", tokens, SamplingParams(max_tokens=40), None, block_hasher=hasher)
        requests[request.request_id] = request
        scheduler.add_request(request)
    writer: dict[int, str] = {}
    changed = quiet = preemptions = 0
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        named = blocks_overwritten(output)
        quiet += not named
        preemptions += len(output.preempted_req_ids or ())
        for rid, count in output.num_scheduled_tokens.items():
            start = requests[rid].num_computed_tokens - count
            table = scheduler.kv_cache_manager.get_block_ids(rid)[0]
            for block in table[start // BLOCK_TOKENS : -(-(start + count) // BLOCK_TOKENS)]:
                if writer.get(block, rid) != rid:
                    changed += 1
                    assert block in named, (
                        f"{rid} writes block {block} of {writer[block]}, and the step does not say so"
                    )
                writer[block] = rid
        ids = list(output.num_scheduled_tokens)
        sampled = [[7] if requests[i].num_computed_tokens >= requests[i].num_tokens else [] for i in ids]
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={rid: index for index, rid in enumerate(ids)},
                sampled_token_ids=sampled,
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
    assert changed > 50 and preemptions, "the test says nothing"
    assert quiet > 5, "where nothing is handed out nothing waits"


def names(*layouts: str) -> list[list[str]]:
    return [list(layouts)]


DEFAULT = [layout.name for layout in _DEFAULT_LAYOUT_PREFERENCE]


@pytest.mark.parametrize(
    ("device", "blackwell", "supported", "chosen"),
    [
        ("cuda", False, DEFAULT, "BLNHC"),
        ("cuda", True, ["LBHNC", "BLHNC"], "BLHNC"),  # FlashInfer's kernels there
        ("cuda", False, ["LBNHC"], "LBNHC"),  # a backend that reads nothing else: vLLM's own choice
        ("cpu", False, ["LBHNC"], "LBHNC"),
    ],
)
def test_vllm_is_asked_for_a_layout_with_whole_blocks(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    blackwell: bool,
    supported: list[str],
    chosen: str,
) -> None:
    monkeypatch.setattr(identity, "_is_blackwell", lambda: blackwell)
    settings = load_settings(flags={"metrics.enabled": False}).config
    config = vllm_config(tiny_llama, kv_transfer_config=vllm_transfer_config(settings))
    monkeypatch.setattr(config.device_config, "device_type", device)
    assert resolve_kv_cache_layout(config, names(*supported)).name == chosen


def test_a_cpu_engine_is_not_warned_of_a_layout_that_it_cannot_have(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_settings(flags={"metrics.enabled": False}).config
    config = vllm_config(tiny_llama, kv_transfer_config=vllm_transfer_config(settings))
    with caplog.at_level(logging.WARNING):
        resolve_kv_cache_layout(config, names("LBHNC"))
    assert "does not satisfy" not in caplog.text


def test_whole_blocks_are_a_copy_each_and_not_one_for_each_layer() -> None:
    blocks, slots = np.array([9, 3, 11, 6]), np.array([1 << 40], dtype=np.uint64)
    count = {}
    for order in ("LBNHC", "BLNHC"):
        layout = vllm_engine(order, torch.bfloat16, layers=32, num_blocks=16).layout
        count[order] = len(plan(layout, blocks, slots, Direction.STORE))
    assert count == {"LBNHC": 128, "BLNHC": 4}
