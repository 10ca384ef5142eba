"""Where one block's bytes are in an engine's paged KV cache, and the text that names this arrangement.

A layout is a list of *regions*: region r of block b is the bytes [base + b * stride, + size). Everything that an engine can vary (which
dimension is outermost, K and V fused or apart, heads before tokens, kernel blocks, padding) ends up as more or fewer regions. This is the
only place of lmc that multiplies shapes. It never touches the bytes and imports neither torch nor an engine: it reads tensors through
their own methods, so tensors on the meta device do as well.

A chunk slot holds region after region; inside a region, block after block. With the regions merged as far as they go, no other order lets
a copy of consecutive blocks merge further: a block-outermost cache has one region, a layer-outermost one has a region per layer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lmc.cache.transfer.layout_views import (
    Layer,
    Piece,
    Region,
    View,
    identity,
    is_tensor,
    merge_views,
    sglang_view,
    vllm_view,
)
from lmc.errors import LayoutError

if TYPE_CHECKING:
    import torch

__all__ = ["KVLayout", "Layer", "Piece", "PieceTable", "Region"]

LAYOUT_VERSION = 1


@dataclass(frozen=True, eq=False)
class PieceTable:
    """Pieces as arrays of equal length, for the planner."""

    base: npt.NDArray[np.uint64]  # address in block 0
    stride: npt.NDArray[np.uint64]  # bytes from a block to the next
    size: npt.NDArray[np.uint64]
    slot_start: npt.NDArray[np.uint64]  # where the region starts in a slot of one block
    slot_offset: npt.NDArray[np.uint64]  # where the piece starts in its region
    slot_stride: npt.NDArray[np.uint64]  # bytes from a block to the next inside the region of a slot


@dataclass(frozen=True, eq=False)
class KVLayout:
    engine: str
    device: str  # "cpu", "cuda:0"
    block_tokens: int
    num_blocks: int
    regions: tuple[Region, ...]
    layers: tuple[Layer, ...]
    description: str  # canonical JSON of all that decides the bytes of a chunk, equal on every rank and machine
    dtypes: frozenset[str] = frozenset()  # torch's names of the tensors' types

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(region.size for region in self.regions)

    @cached_property
    def fingerprint(self) -> str:
        """Two layouts with the same fingerprint store interchangeable chunks."""
        digest = hashlib.sha256(self.description.encode()).hexdigest()[:32]
        return f"{self.engine}-{self.block_tokens}t-{self.block_bytes}b-{digest}"

    @cached_property
    def layers_apart(self) -> bool:
        """Whether every region is one layer's, so that copies of one layer are no smaller than copies of all."""
        return all(piece.size == self.regions[piece.region].size for layer in self.layers for piece in layer.pieces)

    def ranges(self, block: int) -> list[tuple[int, int]]:
        """(address, bytes) of block, in slot order."""
        if not 0 <= block < self.num_blocks:
            raise LayoutError(f"block {block} does not exist; the KV cache has {self.num_blocks} blocks")
        return [(region.base + block * region.stride, region.size) for region in self.regions]

    def pieces(self, layers: range) -> PieceTable:
        """The pieces of these layers (indices into self.layers)."""
        if layers not in self._tables:
            self._tables[layers] = self._table(self._pieces_of(layers))
        return self._tables[layers]

    @cached_property
    def layer_pieces(self) -> PieceTable:
        """The pieces of one layer after the other."""
        return self._table(
            [piece for index in range(len(self.layers)) for piece in self._pieces_of(range(index, index + 1))]
        )

    def _pieces_of(self, layers: range) -> list[Piece]:
        owned = (piece for index in layers for piece in self.layers[index].pieces)
        joined: list[Piece] = []
        for piece in sorted(owned, key=lambda piece: (piece.region, piece.offset)):
            last = joined[-1] if joined else None
            if last is not None and last.region == piece.region and last.offset + last.size == piece.offset:
                joined[-1] = Piece(last.region, last.offset, last.size + piece.size)
            else:
                joined.append(piece)
        return joined

    @cached_property
    def _tables(self) -> dict[range, PieceTable]:
        """Made once: a load layer by layer asks for each layer's every time."""
        return {}

    @cached_property
    def whole(self) -> PieceTable:
        """Whole regions, for all layers together."""
        return self._table([Piece(index, 0, region.size) for index, region in enumerate(self.regions)])

    def _table(self, pieces: Sequence[Piece]) -> PieceTable:
        starts = [0, *itertools.accumulate(region.size for region in self.regions)]
        regions = [self.regions[piece.region] for piece in pieces]
        return PieceTable(
            base=_column(region.base + piece.offset for region, piece in zip(regions, pieces, strict=True)),
            stride=_column(region.stride for region in regions),
            size=_column(piece.size for piece in pieces),
            slot_start=_column(starts[piece.region] for piece in pieces),
            slot_offset=_column(piece.offset for piece in pieces),
            slot_stride=_column(region.size for region in regions),
        )

    @classmethod
    def from_vllm(
        cls,
        kv_caches: Mapping[str, torch.Tensor],
        kv_cache_config: Any,  # vllm.v1.kv_cache_interface.KVCacheConfig, which only connectors may import
        *,
        isa: str,
        group: int | None = None,
    ) -> KVLayout:
        """The layout of one KV cache group of vLLM 0.32: views [B, H, N, C] into one allocation, any stride order.

        isa is `layer.isa` of the attention layers on CPU and the attention backend's name elsewhere: it decides the order of the bytes
        inside a page, which the strides don't show. group may be left out when there is one. Raises LayoutError.
        """
        groups = kv_cache_config.kv_cache_groups
        if group is None:
            if len(groups) != 1:
                raise LayoutError(f"the model has {len(groups)} KV cache groups; ask for the layout of one of them")
            group = 0
        spec = groups[group].kv_cache_spec
        if not isa:
            raise LayoutError("the attention ISA or backend is unknown; it decides the bytes inside a KV page")
        if getattr(groups[group], "host_resident", False):
            raise LayoutError(f"KV cache group {group} lives in host memory; only device groups are supported")
        known = {name for one in groups for name in one.layer_names}
        memory = {identity(kv_caches[name]) for name in known if is_tensor(kv_caches.get(name))}
        for name, tensor in kv_caches.items():
            if name not in known and not (is_tensor(tensor) and identity(tensor) in memory):
                raise LayoutError(f"layer {name} has KV memory of its own but belongs to no KV cache group")
        wanted = set(groups[group].layer_names)
        if missing := sorted(wanted - kv_caches.keys()):
            raise LayoutError(f"layer {missing[0]} of KV cache group {group} has no KV cache")
        shared = {identity(kv_caches[name]) for name in wanted if is_tensor(kv_caches.get(name))}
        views: list[View] = []
        for name, tensor in kv_caches.items():
            if not is_tensor(tensor):
                raise LayoutError(
                    f"layer {name}: the KV cache is a {type(tensor).__name__}, not one tensor [B, H, N, C]"
                )
            if name in wanted or (name not in known and identity(tensor) in shared):
                views.append(vllm_view(name, tensor, kv_cache_config.num_blocks))
        return cls._from_views("vllm", isa, int(spec.block_size), int(kv_cache_config.num_blocks), views)

    @classmethod
    def from_sglang(
        cls,
        k_buffers: Sequence[torch.Tensor],
        v_buffers: Sequence[torch.Tensor] | None,
        page_size: int,
        *,
        packing: str = "nhd",
    ) -> KVLayout:
        """The layout of SGLang's pools: one (tokens + page_size, heads, dim) tensor per layer for K and V; v_buffers is None for MLA.

        A block is a page; page 0 is the engine's own. packing names an attention backend that orders a page's bytes in its own way.
        Raises LayoutError.
        """
        if v_buffers is not None and len(k_buffers) != len(v_buffers):
            raise LayoutError(f"{len(k_buffers)} K buffers but {len(v_buffers)} V buffers")
        if not k_buffers or page_size <= 0:
            raise LayoutError(
                f"an SGLang KV pool of {len(k_buffers)} layers and page size {page_size} cannot be described"
            )
        views: list[View] = []
        for index, k_buffer in enumerate(k_buffers):
            parts = [k_buffer] if v_buffers is None else [k_buffer, v_buffers[index]]
            views += [sglang_view(f"layer{index}", part, page_size) for part in parts]
        num_blocks = {view.num_blocks for view in views}
        if len(num_blocks) != 1:
            raise LayoutError(f"the layers hold different numbers of pages: {sorted(num_blocks)}")
        return cls._from_views("sglang", packing, page_size, num_blocks.pop(), views)

    @classmethod
    def _from_views(
        cls, engine: str, packing: str, block_tokens: int, num_blocks: int, views: Sequence[View]
    ) -> KVLayout:
        if not views:
            raise LayoutError(f"{engine}: no layer has a KV cache")
        devices = {view.device for view in views}
        if len(devices) != 1:
            where = ", ".join(sorted(devices))
            raise LayoutError(f"{engine}: the KV cache is spread over {where}; one device is supported")
        regions, layers, forms = merge_views(engine, views, num_blocks)
        description = json.dumps(
            {
                "version": LAYOUT_VERSION,
                "engine": engine,
                "packing": packing,
                "block_tokens": block_tokens,
                "slot_order": "region,block",
                "regions": [region.size for region in regions],
                "layers": [
                    {"form": form, "pieces": [[piece.region, piece.offset, piece.size] for piece in layer.pieces]}
                    for form, layer in zip(forms, layers, strict=True)
                ],
            },
            separators=(",", ":"),
        )
        dtypes = frozenset(view.dtype for view in views)
        return cls(engine, devices.pop(), block_tokens, num_blocks, tuple(regions), tuple(layers), description, dtypes)


def _column(values: Iterable[int]) -> npt.NDArray[np.uint64]:
    return np.fromiter(values, dtype=np.uint64)
