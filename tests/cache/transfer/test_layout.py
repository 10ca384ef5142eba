from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings

from lmc.cache.transfer.layout import KVLayout
from lmc.errors import LayoutError
from tests.contracts.transfer import ORDERS, engines, sglang_engine, vllm_config, vllm_engine


@settings(deadline=None)
@given(engines())
def test_ranges_stay_inside_the_allocations_and_never_meet(engine) -> None:  # type: ignore[no-untyped-def]
    extents = [(memory.data_ptr(), memory.data_ptr() + memory.numel()) for memory in engine.memory]
    spans: list[tuple[int, int]] = []
    for block in range(engine.layout.num_blocks):
        ranges = engine.layout.ranges(block)
        assert sum(size for _, size in ranges) == engine.layout.block_bytes
        spans += [(start, start + size) for start, size in ranges]
    spans.sort()
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    assert all(any(low <= start and stop <= high for low, high in extents) for start, stop in spans)


@settings(deadline=None)
@given(engines())
def test_every_layer_owns_its_pieces_and_together_they_are_the_block(engine) -> None:  # type: ignore[no-untyped-def]
    owned = [[(piece.region, piece.offset, piece.size) for piece in layer.pieces] for layer in engine.layout.layers]
    assert owned == engine.layer_parts
    assert sum(piece.size for layer in engine.layout.layers for piece in layer.pieces) == engine.layout.block_bytes


@pytest.mark.parametrize(
    ("order", "regions"), [("LBHNC", 3), ("LBNHC", 3), ("LHBNC", 6), ("BLHNC", 1), ("BLNHC", 1), ("BHLNC", 1)]
)
def test_blocks_are_merged_as_far_as_the_order_allows(order: str, regions: int) -> None:
    assert len(vllm_engine(order, torch.bfloat16).layout.regions) == regions


def test_fingerprint_ignores_where_and_how_large_the_cache_is() -> None:
    for order in ORDERS:
        first = vllm_engine(order, torch.float16, num_blocks=6).layout
        second = vllm_engine(order, torch.float16, num_blocks=11).layout
        assert first.fingerprint == second.fingerprint
    assert (
        sglang_engine(torch.uint8, num_blocks=5).layout.fingerprint
        == sglang_engine(torch.uint8, num_blocks=9).layout.fingerprint
    )


def test_fingerprint_is_the_same_text_in_every_process() -> None:
    """A stored chunk outlives the process: a changed fingerprint must be a decision (and a new LAYOUT_VERSION)."""
    assert vllm_engine("LBHNC", torch.float32).layout.fingerprint == "vllm-4t-1152b-5c375bef3de630d788ad7d49ff2f5e1d"


def test_fingerprints_differ_where_bytes_could() -> None:
    layouts = [vllm_engine(order, torch.float16).layout for order in ORDERS]
    layouts += [vllm_engine("LBHNC", dtype).layout for dtype in (torch.float32, torch.bfloat16, torch.uint8)]
    layouts += [
        vllm_engine("LBHNC", torch.float16, heads=4, content=6).layout,
        vllm_engine("LBHNC", torch.float16, tokens=8, content=6).layout,
        vllm_engine("LBHNC", torch.float16, tokens=2, ratio=2).layout,
        vllm_engine("LBHNC", torch.float16, layers=4).layout,
        sglang_engine(torch.float16, dim=6).layout,
        sglang_engine(torch.float16, dim=6, mla=True, heads=2).layout,
    ]
    caches = {"layer.0": torch.zeros(4, 2, 4, 8)}
    config = vllm_config(4, 4, [["layer.0"]])
    layouts += [KVLayout.from_vllm(caches, config, isa=isa) for isa in ("vec", "amx")]
    fingerprints = [layout.fingerprint for layout in layouts]
    assert len(set(fingerprints)) == len(fingerprints)


def test_shared_layers_are_one_layer() -> None:
    plain = vllm_engine("LBNHC", torch.bfloat16).layout
    shared = vllm_engine("LBNHC", torch.bfloat16, shared=True).layout
    assert shared.fingerprint == plain.fingerprint
    assert shared.layers[0].names == ("layer.0", "layer.shared")


def test_aliased_groups_are_described_one_at_a_time() -> None:
    """Hybrid models overlay their groups on the same bytes; a block belongs to one group."""
    memory = torch.zeros(2, 5, 2, 4, 8)
    caches = {"full.0": memory[0], "full.1": memory[1], "window.0": memory[0], "window.1": memory[1]}
    config = vllm_config(5, 4, [["full.0", "full.1"], ["window.0", "window.1"]])
    with pytest.raises(LayoutError, match="2 KV cache groups"):
        KVLayout.from_vllm(caches, config, isa="vec")
    full, window = (KVLayout.from_vllm(caches, config, isa="vec", group=group) for group in (0, 1))
    assert full.ranges(3) == window.ranges(3)
    assert full.layers[1].names == ("full.1",)


def test_meta_tensors_have_the_same_fingerprint() -> None:
    config = vllm_config(4, 4, [["a"]])
    real, meta = (
        KVLayout.from_vllm({"a": torch.empty(4, 2, 4, 8, device=device)}, config, isa="vec")
        for device in ("cpu", "meta")
    )
    assert real.fingerprint == meta.fingerprint


def cache(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("caches", "groups", "isa", "message"),
    [
        ({"a": cache(4, 2, 4, 8)}, [["a"]], "", "ISA"),
        ({"a": cache(2, 4, 2, 4, 8)}, [["a"]], "vec", "not \\[blocks, heads, tokens, content\\]"),
        ({"a": cache(5, 2, 4, 8)}, [["a"]], "vec", "do not divide"),
        ({"a": cache(4, 2, 4, 8)}, [["a", "b"]], "vec", "layer b of KV cache group 0 has no KV cache"),
        ({"a": cache(4, 2, 4, 8), "b": cache(4, 2, 4, 8)}, [["a"]], "vec", "belongs to no KV cache group"),
        ({"a": [cache(4, 8)]}, [["a"]], "vec", "is a list"),
        ({}, [[]], "vec", "no layer has a KV cache"),
        ({"a": cache(4, 2, 4, 1).expand(4, 2, 4, 8)}, [["a"]], "vec", "overlaps itself"),
        ({"a": cache(4, 2, 4, 16)[..., ::2]}, [["a"]], "vec", "is contiguous"),
        ({"a": cache(1, 2, 4, 8).expand(4, 2, 4, 8)}, [["a"]], "vec", "blocks overlap"),
    ],
)
def test_unknown_layouts_are_refused(caches: object, groups: list[list[str]], isa: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        KVLayout.from_vllm(caches, vllm_config(4, 4, groups), isa=isa)  # type: ignore[arg-type]


def test_layers_that_share_a_part_of_their_bytes_are_refused() -> None:
    memory = torch.zeros(6 * 64)
    caches = {"a": memory[: 4 * 64].view(4, 2, 4, 8), "b": memory[64 : 5 * 64].view(4, 2, 4, 8)}
    with pytest.raises(LayoutError, match="share bytes"):
        KVLayout.from_vllm(caches, vllm_config(4, 4, [["a", "b"]]), isa="vec")


def test_a_layer_that_reaches_into_the_next_block_of_another_is_refused() -> None:
    """Interleaved layers must fit into one block's stride."""
    memory = torch.zeros(4 * 96 + 64)
    strides = (96, 32, 8, 1)
    for offset, fits in ((32, True), (64, False)):
        caches = {
            "a": memory.as_strided((4, 1, 4, 8), strides),
            "b": memory.as_strided((4, 2, 4, 8), strides, storage_offset=offset),
        }
        if fits:
            assert len(KVLayout.from_vllm(caches, vllm_config(4, 4, [["a", "b"]]), isa="vec").regions) == 1
        else:
            with pytest.raises(LayoutError, match="share bytes"):
                KVLayout.from_vllm(caches, vllm_config(4, 4, [["a", "b"]]), isa="vec")


def test_sglang_refuses_what_it_does_not_know() -> None:
    with pytest.raises(LayoutError, match="1 K buffers but 0 V buffers"):
        KVLayout.from_sglang([cache(8, 2, 4)], [], 4)
    with pytest.raises(LayoutError, match=r"is not \(tokens, heads, dim\)"):
        KVLayout.from_sglang([cache(8, 4)], None, 4)
    with pytest.raises(LayoutError, match="less than one page"):
        KVLayout.from_sglang([cache(3, 1, 4)], None, 4)
    with pytest.raises(LayoutError, match="different numbers of pages"):
        KVLayout.from_sglang([cache(8, 2, 4)], [cache(12, 2, 4)], 4)


def test_a_block_that_does_not_exist_is_refused() -> None:
    with pytest.raises(LayoutError, match="block 7 does not exist"):
        vllm_engine("LBHNC", torch.float32).layout.ranges(7)
