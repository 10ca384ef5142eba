"""What every transfer backend must do, over every engine layout. A test module calls check_backend with its backend.

An Engine is a paged KV cache built the way an engine builds it, and a second, independent statement of what a chunk slot of it must hold:
numpy indexing of the physical array, without regions, addresses or descriptors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from lmc.cache.plan import SKIP
from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.planner import Descriptors, Direction, plan

Bytes = npt.NDArray[np.uint8]

ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8)
GUARD = 64  # bytes around every slot that no copy may touch


@dataclass
class Engine:
    name: str
    layout: KVLayout
    memory: list[torch.Tensor]  # the allocations, 1-D uint8
    blocks: Callable[[], list[Bytes]]  # the parts of a slot: (num_blocks, bytes) each, in slot order
    layer_parts: list[list[tuple[int, int, int]]]  # per layer: (part, offset, bytes) that it owns

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for allocation in self.memory:
            allocation.copy_(torch.randint(0, 256, allocation.shape, dtype=torch.uint8, generator=generator))

    def bytes(self) -> list[Bytes]:
        return [allocation.cpu().numpy().copy() for allocation in self.memory]

    def slot(self, ids: Sequence[int]) -> Bytes:
        """What the slot of a chunk of these blocks holds; skipped blocks are zero."""
        rows = [part[np.maximum(ids, 0)] * (np.asarray(ids) >= 0)[:, None].astype(np.uint8) for part in self.blocks()]
        return np.concatenate([row.ravel() for row in rows])


def vllm_config(num_blocks: int, block_tokens: int, groups: Sequence[Sequence[str]]) -> Any:
    """The part of vLLM's KVCacheConfig that a layout reads; test_layout_vllm uses the real one."""
    return SimpleNamespace(
        num_blocks=num_blocks,
        kv_cache_groups=[
            SimpleNamespace(layer_names=list(names), kv_cache_spec=SimpleNamespace(block_size=block_tokens))
            for names in groups
        ],
    )


def vllm_engine(
    order: str,
    dtype: torch.dtype,
    *,
    layers: int = 3,
    num_blocks: int = 7,
    heads: int = 2,
    tokens: int = 4,
    content: int = 12,
    ratio: int = 1,
    shared: bool = False,
    pad: int = 0,
    device: str = "cpu",
) -> Engine:
    """An allocation of vLLM 0.32: axes L B H N C in physical order; ratio kernel blocks per block; pad elements after each page."""
    sizes = {"L": layers, "B": num_blocks * ratio, "H": heads, "N": tokens, "C": content}
    physical = [sizes[axis] for axis in order]
    if pad:  # the two outermost axes are L and B, so that a page is one run
        flat = torch.zeros(layers * num_blocks * ratio, heads * tokens * content + pad, dtype=dtype, device=device)
        array = flat[:, : heads * tokens * content].unflatten(0, tuple(physical[:2])).unflatten(2, tuple(physical[2:]))
        allocation = flat
    else:
        allocation = array = torch.zeros(physical, dtype=dtype, device=device)
    logical = array.permute([order.index(axis) for axis in "LBHNC"])
    caches = {f"layer.{index}": logical[index] for index in range(layers)}
    if shared:
        caches["layer.shared"] = logical[0]
    config = vllm_config(num_blocks, tokens * ratio, [[f"layer.{index}" for index in range(layers)]])
    layout = KVLayout.from_vllm(caches, config, isa="vec")
    memory = allocation.view(torch.uint8).view(-1)
    item = dtype.itemsize
    page = heads * tokens * content * item

    def blocks() -> list[Bytes]:
        """Slots follow the physical order with the blocks of a run together: one part per index of the axes before B."""
        raw = array.contiguous().view(torch.uint8).cpu().numpy()
        raw = raw.reshape(*physical[:-1], content * item)
        outer = order.index("B")
        lead = int(np.prod(physical[:outer], dtype=int))
        return [part.reshape(num_blocks, -1) for part in raw.reshape(lead, num_blocks, -1)]

    def padded_blocks() -> list[Bytes]:
        raw = array.contiguous().view(torch.uint8).cpu().numpy().reshape(*physical[:2], page)
        rows = raw if order[0] == "L" else raw.swapaxes(0, 1)
        return [part.reshape(num_blocks, page) for part in rows]

    if order[0] == "L" and order[1] == "B":
        owned = [[(layer, 0, page * ratio)] for layer in range(layers)]
    elif order == "LHBNC":
        owned = [[(layer * heads + head, 0, page // heads * ratio) for head in range(heads)] for layer in range(layers)]
    elif order[:2] == "BL" and not pad:
        owned = [[(0, layer * page, page)] for layer in range(layers)]
    elif order[:2] == "BL":
        owned = [[(layer, 0, page)] for layer in range(layers)]
    else:
        run = page // heads
        owned = [[(0, (head * layers + layer) * run, run) for head in range(heads)] for layer in range(layers)]
    return Engine(f"vllm-{order}", layout, [memory], padded_blocks if pad else blocks, owned)


def sglang_engine(
    dtype: torch.dtype,
    *,
    mla: bool = False,
    layers: int = 3,
    num_blocks: int = 7,
    page: int = 4,
    heads: int = 2,
    dim: int = 6,
    device: str = "cpu",
) -> Engine:
    heads = 1 if mla else heads
    buffers = [
        torch.zeros(num_blocks * page, heads, dim, dtype=dtype, device=device)
        for _ in range(layers if mla else 2 * layers)
    ]
    if mla:
        layout = KVLayout.from_sglang(buffers, None, page)
    else:
        layout = KVLayout.from_sglang(buffers[0::2], buffers[1::2], page)
    memory = [buffer.view(torch.uint8).view(-1) for buffer in buffers]
    size = page * heads * dim * dtype.itemsize
    per_layer = 1 if mla else 2
    owned = [[(layer * per_layer + part, 0, size) for part in range(per_layer)] for layer in range(layers)]
    return Engine(
        "sglang-mla" if mla else "sglang",
        layout,
        memory,
        lambda: [allocation.cpu().numpy().reshape(num_blocks, size) for allocation in memory],
        owned,
    )


@st.composite
def engines(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> Engine:
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from([*ORDERS, "mla", "kernel-blocks", "shared", "padded", "sglang", "sglang-mla"]))
    content = draw(st.sampled_from([8, 12, 5, 1]))
    num_blocks = draw(st.integers(6, 12))
    layers = draw(st.integers(1, 4))
    if kind == "sglang" or kind == "sglang-mla":
        return sglang_engine(dtype, mla=kind == "sglang-mla", layers=layers, num_blocks=num_blocks, dim=content)
    if kind == "mla":
        return vllm_engine("LBHNC", dtype, heads=1, content=content, layers=layers, num_blocks=num_blocks)
    if kind == "kernel-blocks":
        order = draw(st.sampled_from(["LBHNC", "LBNHC", "LHBNC"]))
        return vllm_engine(order, dtype, ratio=2, content=content, layers=layers, num_blocks=num_blocks)
    if kind == "shared":
        return vllm_engine("LBNHC", dtype, shared=True, content=content, layers=layers, num_blocks=num_blocks)
    if kind == "padded":
        order = draw(st.sampled_from(["LBHNC", "LBNHC", "BLHNC", "BLNHC"]))
        return vllm_engine(order, dtype, pad=16, content=content, layers=max(layers, 2), num_blocks=num_blocks)
    return vllm_engine(kind, dtype, content=content, layers=max(layers, 2), num_blocks=num_blocks)


@st.composite
def block_tables(draw: st.DrawFn, num_blocks: int) -> list[list[int]]:
    """Chunks of scattered or consecutive blocks, no block twice; a ragged tail or a held head shows as SKIP."""
    per_chunk = draw(st.integers(1, 3))
    num_chunks = draw(st.integers(1, num_blocks // per_chunk))
    ids = draw(st.permutations(range(num_blocks))) if draw(st.booleans()) else list(range(num_blocks))
    ids = list(ids[: per_chunk * num_chunks])
    skipped_tail = draw(st.integers(0, per_chunk - 1))
    skipped_head = draw(st.integers(0, per_chunk - 1 - skipped_tail)) if num_chunks == 1 else 0
    ids = [SKIP] * skipped_head + ids[skipped_head : len(ids) - skipped_tail] + [SKIP] * skipped_tail
    return [ids[start : start + per_chunk] for start in range(0, len(ids), per_chunk)]


class Slots:
    """Chunk slots in one buffer, guard bytes between them, in shuffled order."""

    def __init__(self, num: int, slot_bytes: int, seed: int, *, pinned: bool = False) -> None:
        generator = np.random.default_rng(seed)
        self.stride = slot_bytes + GUARD
        self.size = slot_bytes
        filling = generator.integers(0, 256, GUARD + num * self.stride, dtype=np.uint8)
        self.buffer = torch.from_numpy(filling).pin_memory().numpy() if pinned else filling
        self.order = generator.permutation(num)
        offsets = GUARD + self.order * self.stride
        self.addresses = (self.buffer.ctypes.data + offsets).astype(np.uint64)

    def __getitem__(self, chunk: int) -> Bytes:
        start = GUARD + int(self.order[chunk]) * self.stride
        return self.buffer[start : start + self.size]


def check_backend(
    backend: Backend,
    engine: Engine,
    table: list[list[int]],
    seed: int,
    *,
    plan_descriptors: Callable[..., Descriptors] = plan,
    stream: int = 0,
) -> None:
    """Store and load the table: slots hold what the oracle says, the loaded cache what was stored, and nothing else changed."""
    engine.fill(seed)
    before = engine.bytes()
    ids = np.array([block for chunk in table for block in chunk], dtype=np.int64)
    slots = Slots(len(table), engine.layout.block_bytes * len(table[0]), seed, pinned=engine.layout.device != "cpu")
    expected = slots.buffer.copy()
    present = [np.asarray(chunk) >= 0 for chunk in table]
    for chunk, blocks in enumerate(table):
        start = GUARD + int(slots.order[chunk]) * slots.stride
        mask = slot_mask(engine, present[chunk])
        expected[start : start + slots.size][mask] = engine.slot(blocks)[mask]

    backend.execute(plan_descriptors(engine.layout, ids, slots.addresses, Direction.STORE), stream)
    assert np.array_equal(slots.buffer, expected), (
        f"{engine.name}: a slot holds wrong bytes, or bytes around it changed"
    )
    assert all(np.array_equal(now, was) for now, was in zip(engine.bytes(), before, strict=True)), "a store wrote"

    engine.fill(seed + 1)
    untouched = engine.bytes()
    backend.execute(plan_descriptors(engine.layout, ids, slots.addresses, Direction.LOAD), stream)
    assert np.array_equal(slots.buffer, expected), f"{engine.name}: a load wrote to a slot"
    for chunk, blocks in enumerate(table):
        mask = slot_mask(engine, present[chunk])
        assert np.array_equal(engine.slot(blocks)[mask], slots[chunk][mask]), (
            f"{engine.name}: a load brought wrong bytes"
        )
    check_untouched(engine, untouched, [block for block in ids.tolist() if block >= 0])


def slot_mask(engine: Engine, present: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which bytes of a slot belong to blocks that take part."""
    return np.concatenate([np.repeat(present, part.shape[1]) for part in engine.blocks()])


def check_untouched(engine: Engine, before: list[Bytes], loaded: list[int]) -> None:
    """Everything but the loaded blocks' own bytes (other blocks, padding) is as it was."""
    after = engine.bytes()
    parts = engine.blocks()
    kept = [part.copy() for part in parts]
    for allocation, was in zip(engine.memory, before, strict=True):
        allocation.copy_(torch.from_numpy(was))
    originals = [part.copy() for part in engine.blocks()]
    others = np.setdiff1d(np.arange(engine.layout.num_blocks), loaded)
    for now, was in zip(kept, originals, strict=True):
        assert np.array_equal(now[others], was[others]), f"{engine.name}: a load wrote to another block"
    changed = sum(int((now != was).sum()) for now, was in zip(after, before, strict=True))
    inside = sum(int((now[loaded] != was[loaded]).sum()) for now, was in zip(kept, originals, strict=True))
    assert changed == inside, f"{engine.name}: a load wrote outside the blocks"
