"""What a hit needs of a KV group, by lmc's parts, is what vLLM's managers ask of their own prefix cache, no block more and none less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.parts import Group, Parts, chunk_tokens_for, fits
from lmc.probe.model_shape import split_layers

pytestmark = pytest.mark.engine


def longest_hit(group: Group, cached: set[int], num_tokens: int) -> int:
    """The longest hit of at most num_tokens that vLLM finds where these blocks of a prompt are in its pool."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
    from vllm.v1.core.single_type_kv_cache_manager import (
        ChunkedLocalAttentionManager,
        FullAttentionManager,
        MambaManager,
        SlidingWindowManager,
    )
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

    size = group.block_tokens
    common = {"block_size": size, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    manager, spec = {
        "full": lambda: (FullAttentionManager, FullAttentionSpec(**common)),
        "window": lambda: (SlidingWindowManager, SlidingWindowSpec(**common, sliding_window=group.span)),
        "local": lambda: (
            ChunkedLocalAttentionManager,
            ChunkedLocalAttentionSpec(**common, attention_chunk_size=group.span),
        ),
        "state": lambda: (MambaManager, MambaSpec(size, shapes=((1,),), dtypes=(torch.float32,))),
    }[group.kind]()
    pool = BlockPool(num_tokens // size + 2, enable_caching=True, hash_block_size=size)
    hashes = [BlockHash(bytes([0, index // 256, index % 256])) for index in range(num_tokens // size)]
    for index in cached:
        pool.cached_block_hash_to_block.insert(make_block_hash_with_group_id(hashes[index], 0), pool.blocks[index + 1])
    blocks, length = manager.find_longest_cache_hit(
        block_hashes=hashes,
        max_length=num_tokens,
        kv_cache_group_ids=[0],
        block_pool=pool,
        kv_cache_spec=spec,
        drop_eagle_block=False,
        alignment_tokens=size,
    )
    assert length == len(blocks[0]) * size
    return length


groups = st.builds(
    lambda kind, block, span: Group(kind, block, {"window": span, "local": block * (1 + span % 9)}.get(kind, 0)),
    st.sampled_from(["full", "window", "local", "state"]),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(2, 120),
)


@settings(max_examples=300, deadline=None)
@given(group=groups, blocks=st.integers(1, 60))
def test_a_hit_needs_of_a_group_what_vllm_needs(group: Group, blocks: int) -> None:
    size, tokens = group.block_tokens, blocks * group.block_tokens
    needed = set(range(group.first_needed(tokens) // size, blocks))
    assert longest_hit(group, needed, tokens) == tokens
    for index in needed:
        assert longest_hit(group, needed - {index}, tokens) < tokens, f"block {index} of {blocks} is not needed"


@settings(max_examples=300, deadline=None)
@given(
    others=st.lists(groups.filter(lambda group: group.kind in ("window", "local")), min_size=1, max_size=3),
    block=st.sampled_from([2, 8]),
    chunks=st.integers(1, 12),
    data=st.data(),
)
def test_the_parts_of_a_hit_are_the_needed_blocks_in_whole_chunks(
    others: list[Group], block: int, chunks: int, data: st.DataObject
) -> None:
    model = (Group("full", block), *others)
    chunk = data.draw(st.integers(1, 300).filter(lambda size: fits(model, size)) | st.just(chunk_tokens_for(model, 1)))
    parts = Parts(chunk, model)
    for number, group in enumerate(model):
        size = group.block_tokens
        held: set[int] = set()
        for index in parts.needed(number, chunks):
            end = (index + 1) * chunk // size
            held |= set(range(end - parts.blocks[number], end))
        assert held == set(range(group.first_needed(chunks * chunk) // size, chunks * chunk // size))


@settings(max_examples=200, deadline=None)
@given(full=st.integers(1, 40), windows=st.integers(1, 40), data=st.data())
def test_layers_are_split_into_the_groups_that_vllm_makes(full: int, windows: int, data: st.DataObject) -> None:
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    common = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = {"full": FullAttentionSpec(**common), "window": SlidingWindowSpec(**common, sliding_window=64)}
    kinds = data.draw(st.permutations(["full"] * full + ["window"] * windows))
    made = _get_kv_cache_groups_uniform_page_size({f"layer {at}": specs[kind] for at, kind in enumerate(kinds)})
    names = {FullAttentionSpec: "full", SlidingWindowSpec: "window"}
    groups = [(names[type(group.kv_cache_spec)], len(group.layer_names)) for group in made]
    assert split_layers({kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}) == groups
