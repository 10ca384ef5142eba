"""Several KV groups under vLLM's own scheduler and block tables: random traffic in which every byte that a pass reads is checked.

The model runner only moves bytes (moving_engine.py), so that thousands of steps take seconds; test_vllm_hybrid.py has real models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from lmc.cache.connectors.vllm import groups as groups_module
from lmc.cache.connectors.vllm import worker as worker_module
from lmc.cache.connectors.vllm.groups import read_groups
from lmc.cache.parts import Group
from lmc.cache.settings import load_settings
from lmc.errors import ConfigError, LayoutError
from lmc.serve.engines import vllm_transfer_config
from tests.engines.moving_engine import BLOCK_TOKENS, WIDTH, MovingEngine, answer_to, spec_of
from tests.engines.test_vllm_hooks import vllm_config

pytestmark = [pytest.mark.engine, pytest.mark.fault]

FULL = Group("full", BLOCK_TOKENS)
MODELS = {
    "windows": (Group("window", BLOCK_TOKENS, 60), FULL, Group("window", BLOCK_TOKENS, 60)),
    "two windows": (FULL, Group("window", BLOCK_TOKENS, 20), Group("window", BLOCK_TOKENS, 128)),
    "only a window": (Group("window", BLOCK_TOKENS, 60),),
    "spans of tokens": (FULL, Group("local", BLOCK_TOKENS, 64)),
    "several that keep all tokens": (FULL, Group("window", BLOCK_TOKENS, 60), FULL),
    "blocks of unequal size": (Group("window", 2 * BLOCK_TOKENS, 60), FULL),
    "states": (Group("state", BLOCK_TOKENS), FULL, Group("state", BLOCK_TOKENS)),
    "states kept inside a step": (FULL, Group("state", BLOCK_TOKENS, span=1)),
    "states and a window": (FULL, Group("window", BLOCK_TOKENS, 40), Group("state", BLOCK_TOKENS)),
}

NUM_BLOCKS = 120  # with fewer, a preempted request may wait in vLLM for blocks of one behind it that has loaded


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker_module, "find_models", list)
    require, refused = groups_module._require_proven, MODELS["blocks of unequal size"]

    def require_others(found: Any, *config: Any) -> None:  # which work, but no real model with them was compared
        if sorted(found, key=str) != sorted(refused, key=str):
            require(found, *config)

    monkeypatch.setattr(groups_module, "_require_proven", require_others)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)


def engine_on(model: Path, disk: Path, kinds: str, *, shares_blocks: bool, num_ranks: int = 1) -> MovingEngine:
    has_states = any(group.kind == "state" for group in MODELS[kinds])
    chunk = BLOCK_TOKENS if has_states else 32
    flags = {"metrics.enabled": False, "chunk_tokens": chunk, "host.capacity": 160 * 4096, "disk.fsync": False}
    flags |= {"disk.path": str(disk), "disk.capacity": "4MiB", "transfer_backend": "torch", "close_timeout": 1}
    flags |= {"checkpoint_tokens": 96, "strict": True}
    transfer = vllm_transfer_config(load_settings(flags=flags).config)
    config = vllm_config(model, kv_transfer_config=transfer, enable_prefix_caching=shares_blocks)
    config.scheduler_config.max_num_batched_tokens = 90
    config.cache_config.mamba_cache_mode = "align" if has_states else "none"
    return MovingEngine(config, num_blocks=NUM_BLOCKS, num_ranks=num_ranks, groups=MODELS[kinds])


def break_some_loads(engine: MovingEngine, generator: random.Random) -> list[int]:
    """One load in eight of some rank fails. Returns the list that counts them."""
    failed: list[int] = []
    for worker in engine.workers:
        backend = worker._worker.worker.copier.backend

        def broken(descriptors: Any, *arguments: Any, execute: Any = backend.execute) -> None:
            if descriptors.direction == "load" and generator.random() < 0.125:
                failed.append(1)
                raise OSError("injected")
            execute(descriptors, *arguments)

        backend.execute = broken
    return failed


@pytest.mark.parametrize(
    ("kinds", "shares_blocks"),
    [  # without its own prefix cache vLLM keeps no state for later
        pytest.param(kinds, shares, id=f"{kinds}, {'with' if shares else 'without'} vLLM's prefix cache")
        for kinds in MODELS
        for shares in (False, True)
        if shares or "states" not in kinds
    ],
)
def test_no_pass_reads_a_wrong_byte(tiny_llama: Path, tmp_path: Path, kinds: str, shares_blocks: bool) -> None:
    """Prompts that share starts, chunked prefill, preemptions, aborts, failed loads, and a restart on the same disk."""
    generator = random.Random(f"{kinds} {shares_blocks}")
    known: list[list[int]] = [[generator.randrange(400) for _ in range(300)] for _ in range(3)]
    loaded = preempted = failures = 0
    for ranks in (1, 2) if kinds in ("windows", "states") else (1,):
        folder = tmp_path / f"disk of {ranks}"
        for start in range(2):
            engine = engine_on(tiny_llama, folder, kinds, shares_blocks=shares_blocks, num_ranks=ranks)
            failed = break_some_loads(engine, generator)
            aborted = set()
            for number in range(30):
                text = generator.choice(known)
                text = text[: generator.randrange(20, len(text))] if generator.random() < 0.7 else text
                text = [*text, *(generator.randrange(400) for _ in range(generator.randrange(1, 60)))][:330]
                known = [*known[-8:], text]
                engine.add(f"r{number}", text)
                for _ in range(generator.randrange(6)):
                    engine.step()
                if shares_blocks and number % 5 == 4:
                    engine.run()
                    engine.scheduler.reset_prefix_cache()  # so that lmc is what is left to hit
                if generator.random() < 0.1:
                    aborted.add(f"r{number}")
                    engine.abort(f"r{number}")
                elif (
                    generator.random() < 0.15
                ):  # all that run are preempted, also where a load keeps vLLM from the reset
                    with contextlib.suppress(RuntimeError):
                        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            engine.run()
            for name, request in engine.requests.items():
                assert request.is_finished()
                preempted += request.num_preemptions
                if name not in aborted:
                    assert list(request.output_token_ids) == answer_to(list(request.prompt_token_ids)), name
            cache = engine.connector._scheduler.scheduler
            cache.directory.check()
            tiers = {
                sample.labels["tier"]: sample.value
                for family in cache.metrics.registry.collect()
                for sample in family.samples
                if sample.name == "lmc_hit_tokens_total"
            }
            loaded += int(tiers.get("host", 0))
            assert start == 0 or tiers.get("disk", 0) > 0, "nothing was found after the restart"
            failures += len(failed)
            pool = engine.scheduler.kv_cache_manager.block_pool
            assert engine.scheduler.reset_prefix_cache()
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
            engine.close()
    assert loaded > (500 if shares_blocks else 1000)
    assert preempted > 0 and failures > 0


def config_of(*groups: Group, **changed: object) -> Any:
    """changed: fields of those specs that have them."""
    specs = []
    for spec in map(spec_of, groups):
        own = {name: value for name, value in changed.items() if hasattr(spec, name)}
        specs.append(dataclasses.replace(spec, **own))
    named = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=named)


WINDOW = Group("window", BLOCK_TOKENS, 64)
PLAIN: Any = SimpleNamespace(speculative_config=None)
LAYOUT: Any = SimpleNamespace(fingerprint="the same")


@pytest.mark.parametrize(
    ("config", "vllm", "why"),
    [
        (config_of(WINDOW, WINDOW), PLAIN, "of which no layer keeps all tokens"),
        (config_of(Group("local", BLOCK_TOKENS, 64)), PLAIN, "of which no layer keeps all tokens"),
        (config_of(FULL, Group("window", 2 * BLOCK_TOKENS, 64)), PLAIN, "unequal size"),
        (
            config_of(FULL, Group("state", BLOCK_TOKENS), mamba_type=MambaAttentionBackendEnum.SHORT_CONV),
            PLAIN,
            "SHORT_CONV",
        ),
        (config_of(FULL, WINDOW), SimpleNamespace(speculative_config=1), "speculative decoding"),
        (config_of(FULL, non_causal=True), PLAIN, "depends on later tokens"),
        (config_of(WINDOW, extra_retained_tokens=3), PLAIN, "drafts need more"),
    ],
)
def test_what_is_not_proven_is_refused(config: Any, vllm: Any, why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        read_groups(config, vllm)


def test_states_are_refused_where_vllm_keeps_none_for_later() -> None:
    full, state = config_of(FULL, Group("state", BLOCK_TOKENS)).kv_cache_groups
    for changed, why in (
        ({"mamba_cache_mode": "none"}, "--enable-prefix-caching"),
        ({"block_size": 64}, "unequal size"),
    ):
        other = dataclasses.replace(state, kv_cache_spec=dataclasses.replace(state.kv_cache_spec, **changed))
        config = KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=[full, other])
        with pytest.raises(LayoutError, match=why):
            read_groups(config, PLAIN)


def test_what_is_kept_for_one_request_only_is_refused() -> None:
    full, window = config_of(FULL, WINDOW).kv_cache_groups
    config = KVCacheConfig(
        num_blocks=10,
        kv_cache_tensors=[],
        kv_cache_groups=[full, dataclasses.replace(window, enable_kv_transfer=False)],
    )
    with pytest.raises(LayoutError, match="for one request only"):
        read_groups(config, PLAIN)


def test_shapes_of_states_and_windows_are_in_the_name() -> None:
    state = config_of(FULL, Group("state", BLOCK_TOKENS))
    spec = state.kv_cache_groups[1].kv_cache_spec
    names = {read_groups(config_of(WINDOW), PLAIN).fingerprint([LAYOUT])}
    names.add(read_groups(config_of(Group("window", BLOCK_TOKENS, 80)), PLAIN).fingerprint([LAYOUT]))
    names.add(read_groups(config_of(FULL), PLAIN).fingerprint([LAYOUT]))
    for shapes in ((WIDTH,), (2, WIDTH // 2)):
        state.kv_cache_groups[1] = KVCacheGroupSpec(["layer.1"], dataclasses.replace(spec, shapes=(shapes,)))
        names.add(read_groups(state, PLAIN).fingerprint([LAYOUT, LAYOUT]))
    assert len(names) == 5


def test_chunks_of_a_window_end_before_their_blocks_leave_it() -> None:
    groups = read_groups(config_of(Group("window", BLOCK_TOKENS, 60)), PLAIN)
    assert groups.chunk_tokens(load_settings(flags={}).config) == 48
    assert groups.chunk_tokens(load_settings(flags={"chunk_tokens": 32}).config) == 32
    with pytest.raises(ConfigError, match="use 48 or less"):
        groups.chunk_tokens(load_settings(flags={"chunk_tokens": 64}).config)
    with pytest.raises(LayoutError, match="smaller --block-size"):
        read_groups(config_of(Group("window", BLOCK_TOKENS, 15)), PLAIN)


def test_the_layers_of_each_group_are_in_the_name() -> None:
    """Another version of vLLM may share layers out in another way."""
    one, other = config_of(FULL, WINDOW, WINDOW), config_of(FULL, WINDOW, WINDOW)
    first, second = other.kv_cache_groups[1:]
    first.layer_names, second.layer_names = second.layer_names, first.layer_names
    layouts = [LAYOUT] * 3
    assert read_groups(one, PLAIN).fingerprint(layouts) != read_groups(other, PLAIN).fingerprint(layouts)
    assert read_groups(one, PLAIN).fingerprint(layouts) == read_groups(one, PLAIN).fingerprint(layouts)
