"""Layouts of caches that vLLM's own code planned and allocated. No engine is started."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmc.cache.transfer.backends.host import HostBackend
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.planner import Direction, plan, slot_bytes

pytest.importorskip("vllm", reason="needs vLLM's code")

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ModuleNotFoundError:  # before 0.33
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from lmc.cache.connectors.vllm.groups import read_groups

pytestmark = pytest.mark.compat

NUM_BLOCKS = 6
BLOCK_TOKENS = 32

full = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=3, head_size=8, dtype=torch.bfloat16)


def with_indexer(attention: KVCacheSpec, key_bytes: int) -> list[tuple[list[str], KVCacheSpec]]:
    """Sparse attention: each layer keeps a key for every token beside its KV, by which tokens are chosen."""
    key = MLAAttentionSpec(
        block_size=32, num_kv_heads=1, head_size=key_bytes, dtype=torch.uint8, cache_role=SparseCacheRole.INDEXER
    )
    layers = {f"layers.{n}.{part}": spec for n in range(2) for part, spec in (("attn", attention), ("indexer", key))}
    return [(list(layers), UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs=layers))]


latent = {"block_size": 32, "num_kv_heads": 1, "head_size": 576}
SPECS: dict[str, list[tuple[list[str], KVCacheSpec]]] = {
    "dense": [(["a", "b", "c"], full)],
    "fp8": [
        (["a", "b"], FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=16, dtype=torch.float8_e4m3fn)),
    ],
    "mla": [(["a", "b"], MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=24, dtype=torch.float32))],
    "two sizes in a group": [
        (
            ["a", "b", "c"],
            UniformTypeKVCacheSpecs(
                block_size=32,
                kv_cache_specs={
                    "a": full,
                    "b": FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=16, dtype=torch.bfloat16),
                    "c": full,
                },
            ),
        )
    ],
    "deepseek v3.2": with_indexer(MLAAttentionSpec(**latent, dtype=torch.bfloat16), 132),
    "deepseek v3.2 in fp8": with_indexer(
        MLAAttentionSpec(**latent, dtype=torch.uint8, cache_dtype_str="fp8_ds_mla", state_content_bytes=656), 132
    ),
    "minimax m3": with_indexer(
        FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=128, dtype=torch.bfloat16), 256
    ),
    "sliding window": [
        (["a", "b"], full),
        (
            ["c", "d"],
            SlidingWindowSpec(block_size=32, num_kv_heads=3, head_size=8, dtype=torch.bfloat16, sliding_window=64),
        ),
    ],
    "padded": [
        (
            ["a", "b"],
            FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=8, dtype=torch.bfloat16, page_size_padded=4096),
        )
    ],
    "mamba": [(["a", "b"], MambaSpec(block_size=32, shapes=((5, 7), (3,)), dtypes=(torch.float32, torch.bfloat16)))],
}


def allocate(
    groups: list[tuple[list[str], KVCacheSpec]],
    order: str,
    num_blocks: int = NUM_BLOCKS,
    kernel_tokens: int | None = None,
) -> tuple[KVCacheConfig, dict[str, torch.Tensor]]:
    layout = KVCacheLayout[order]
    cache = SimpleNamespace(
        get_resolved_kv_cache_layout=lambda: layout,
        num_gpu_blocks_override=num_blocks,
        prefix_cache_retention_interval=None,
    )
    config = get_kv_cache_config_from_groups(
        SimpleNamespace(attention_config=SimpleNamespace(hisparse_config=None), cache_config=cache),
        [KVCacheGroupSpec(names, spec) for names, spec in groups],
        1 << 30,
    )
    sizes = None if kernel_tokens is None else [kernel_tokens] * len(groups)
    return config, allocate_kv_cache(config, torch.device("cpu"), layout, sizes)


def check_round_trip(layout: KVLayout, own: dict[str, torch.Tensor], everything: dict[str, torch.Tensor]) -> None:
    """Store two chunks, wipe the cache, load them: the views hold the old values in these blocks and zeros elsewhere."""
    generator = torch.Generator().manual_seed(1)
    storage = next(iter(everything.values())).untyped_storage()
    memory = torch.tensor([], dtype=torch.uint8).set_(storage)
    memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8, generator=generator))
    blocks = np.array([4, 1, 3, 5], dtype=np.int64)
    originals = {name: as_bytes(view).clone() for name, view in own.items()}
    slots = np.zeros((2, slot_bytes(layout, 2)), dtype=np.uint8)
    addresses = np.array([slots[0].ctypes.data, slots[1].ctypes.data], dtype=np.uint64)
    HostBackend().execute(plan(layout, blocks, addresses, Direction.STORE))
    memory.zero_()
    HostBackend().execute(plan(layout, blocks, addresses, Direction.LOAD))
    for name, view in own.items():
        now = as_bytes(view).unflatten(0, (NUM_BLOCKS, -1))
        was = originals[name].unflatten(0, (NUM_BLOCKS, -1))
        for block in range(NUM_BLOCKS):
            if block in blocks:
                assert torch.equal(now[block], was[block]), (name, block)
            else:
                assert not now[block].any(), (name, block)


def as_bytes(view: torch.Tensor) -> torch.Tensor:
    return view.view(torch.uint8)


ORDERS = [layout.name for layout in KVCacheLayout]
BLOCK_OUTERMOST = {"BLHNC", "BLNHC", "BHLNC"}
SPLIT_PAGES = {"LHBNC", "BHLNC"}  # vLLM itself refuses these with padding or with pages of different sizes
WITH_INDEXER = ["deepseek v3.2", "deepseek v3.2 in fp8", "minimax m3"]
REFUSED = {(kind, order) for kind in ("padded", "two sizes in a group", *WITH_INDEXER) for order in SPLIT_PAGES}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", SPECS)
def test_blocks_come_back_where_vllm_looks_for_them(kind: str, order: str) -> None:
    if (kind, order) in REFUSED:
        with pytest.raises((AssertionError, ValueError)):
            allocate(SPECS[kind], order)
        return
    config, caches = allocate(SPECS[kind], order)
    for group, (names, _) in enumerate(SPECS[kind]):
        layout = KVLayout.from_vllm(caches, config, isa="vec", group=group)
        assert layout.block_tokens == BLOCK_TOKENS
        assert layout.num_blocks == NUM_BLOCKS
        own = {name: caches[name] for name in names}
        assert layout.block_bytes == sum(as_bytes(view).numel() for view in own.values()) // NUM_BLOCKS
        assert [layer.names for layer in layout.layers] == [(name,) for name in caches if name in names]
        if order in BLOCK_OUTERMOST and kind != "padded":
            assert len(layout.regions) == 1
        check_round_trip(layout, own, caches)


@pytest.mark.parametrize("kind", WITH_INDEXER)
def test_an_indexers_keys_are_in_the_one_group_and_each_layer_is_whole(kind: str) -> None:
    """As vLLM groups them itself; none of these models runs on a CPU."""
    ((_, spec),) = SPECS[kind]
    assert isinstance(spec, UniformTypeKVCacheSpecs)
    assert UniformTypeKVCacheSpecs.from_specs(dict(spec.kv_cache_specs)) == spec
    config, caches = allocate(SPECS[kind], "LBHNC")
    assert not read_groups(config, None).is_hybrid  # type: ignore[arg-type]  # asked for several groups only
    layout = KVLayout.from_vllm(caches, config, isa="vec")
    assert [layer.names for layer in layout.layers] == [(name,) for name in caches]
    assert layout.block_bytes == sum(one.page_size_bytes for one in spec.kv_cache_specs.values())
    without = {name: one for name, one in spec.kv_cache_specs.items() if "indexer" not in name}
    plain = UniformTypeKVCacheSpecs(block_size=BLOCK_TOKENS, kv_cache_specs=without)
    other_config, others = allocate([(list(without), plain)], "LBHNC")
    assert KVLayout.from_vllm(others, other_config, isa="vec").fingerprint != layout.fingerprint


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_kernel_blocks_are_regrouped(order: str) -> None:
    config, caches = allocate(SPECS["dense"], order, kernel_tokens=16)
    assert caches["a"].shape[0] == 2 * NUM_BLOCKS
    layout = KVLayout.from_vllm(caches, config, isa="vec")
    assert len(layout.regions) == 3
    check_round_trip(layout, caches, caches)
    whole_config, whole = allocate(SPECS["dense"], order)
    assert layout.fingerprint != KVLayout.from_vllm(whole, whole_config, isa="vec").fingerprint


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (kind, order)
        for kind in ("dense", "mla", "two sizes in a group")
        for order in ORDERS
        if (kind, order) not in REFUSED
    ],
)
def test_fingerprint_does_not_depend_on_the_size_of_the_cache(kind: str, order: str) -> None:
    fingerprints = set()
    for num_blocks in (2, 6, 17):
        config, caches = allocate(SPECS[kind], order, num_blocks)
        fingerprints.add(KVLayout.from_vllm(caches, config, isa="vec").fingerprint)
    assert len(fingerprints) == 1


def test_layers_that_reuse_anothers_cache_are_no_layers_of_their_own() -> None:
    config, caches = allocate(SPECS["dense"], "LBHNC")
    plain = KVLayout.from_vllm(caches, config, isa="vec")
    caches["d"] = caches["a"]
    shared = KVLayout.from_vllm(caches, config, isa="vec")
    assert shared.fingerprint == plain.fingerprint
    assert shared.layers[0].names == ("a", "d")
