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

from lmc.errors import LayoutError

if TYPE_CHECKING:
    import torch

LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Region:
    """Block b has size bytes at base + b * stride."""

    base: int  # address
    stride: int
    size: int


@dataclass(frozen=True)
class Piece:
    """A part of a region that belongs to one layer: size bytes from offset."""

    region: int
    offset: int
    size: int


@dataclass(frozen=True)
class Layer:
    """The layers of these names (several when they share memory) own these pieces of every block."""

    names: tuple[str, ...]
    pieces: tuple[Piece, ...]


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

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(region.size for region in self.regions)

    @cached_property
    def fingerprint(self) -> str:
        """Two layouts with the same fingerprint store interchangeable chunks."""
        digest = hashlib.sha256(self.description.encode()).hexdigest()[:32]
        return f"{self.engine}-{self.block_tokens}t-{self.block_bytes}b-{digest}"

    def ranges(self, block: int) -> list[tuple[int, int]]:
        """(address, bytes) of block, in slot order."""
        if not 0 <= block < self.num_blocks:
            raise LayoutError(f"block {block} does not exist; the KV cache has {self.num_blocks} blocks")
        return [(region.base + block * region.stride, region.size) for region in self.regions]

    def extents(self) -> list[tuple[int, int]]:
        """(first address, bytes) that the blocks of each region span, gaps included."""
        return [(region.base, (self.num_blocks - 1) * region.stride + region.size) for region in self.regions]

    def pieces(self, layers: range | None = None) -> PieceTable:
        """The pieces of these layers (indices into self.layers), or whole regions for all of them."""
        if layers is None:
            return self._whole
        return self._table(
            sorted(
                (piece for index in layers for piece in self.layers[index].pieces),
                key=lambda piece: (piece.region, piece.offset),
            )
        )

    @cached_property
    def _whole(self) -> PieceTable:
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
        memory = {_identity(kv_caches[name]) for name in known if _is_tensor(kv_caches.get(name))}
        for name, tensor in kv_caches.items():
            if name not in known and not (_is_tensor(tensor) and _identity(tensor) in memory):
                raise LayoutError(f"layer {name} has KV memory of its own but belongs to no KV cache group")
        wanted = set(groups[group].layer_names)
        if missing := sorted(wanted - kv_caches.keys()):
            raise LayoutError(f"layer {missing[0]} of KV cache group {group} has no KV cache")
        shared = {_identity(kv_caches[name]) for name in wanted if _is_tensor(kv_caches.get(name))}
        views: list[_View] = []
        for name, tensor in kv_caches.items():
            if not _is_tensor(tensor):
                raise LayoutError(
                    f"layer {name}: the KV cache is a {type(tensor).__name__}, not one tensor [B, H, N, C]"
                )
            if name in wanted or (name not in known and _identity(tensor) in shared):
                views.append(_vllm_view(name, tensor, kv_cache_config.num_blocks))
        return _build("vllm", isa, int(spec.block_size), int(kv_cache_config.num_blocks), views)

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
        views: list[_View] = []
        for index, k_buffer in enumerate(k_buffers):
            parts = [k_buffer] if v_buffers is None else [k_buffer, v_buffers[index]]
            views += [_sglang_view(f"layer{index}", part, page_size) for part in parts]
        num_blocks = {view.num_blocks for view in views}
        if len(num_blocks) != 1:
            raise LayoutError(f"the layers hold different numbers of pages: {sorted(num_blocks)}")
        return _build("sglang", packing, page_size, num_blocks.pop(), views)


@dataclass(frozen=True)
class _View:
    """One tensor of the engine: where its first block is, and how a block is laid out inside."""

    layer: str
    device: str
    storage: int  # identifies the allocation in this process
    base: int
    block_stride: int
    num_blocks: int
    runs: tuple[int, ...]  # byte offset of each contiguous run of a block
    run_bytes: int
    form: str  # shape, dtype and order inside a block


def _vllm_view(name: str, tensor: torch.Tensor, num_blocks: int) -> _View:
    if tensor.dim() != 4:
        raise LayoutError(f"layer {name}: KV shape {tuple(tensor.shape)} is not [blocks, heads, tokens, content]")
    if num_blocks <= 0 or tensor.shape[0] % num_blocks:
        raise LayoutError(f"layer {name}: {tensor.shape[0]} kernel blocks do not divide into {num_blocks} blocks")
    ratio = tensor.shape[0] // num_blocks
    shape = [ratio, *tensor.shape[1:]]
    return _view(name, tensor, num_blocks, "KHNC", shape, [int(stride) for stride in tensor.stride()], ratio)


def _sglang_view(name: str, tensor: torch.Tensor, page_size: int) -> _View:
    if tensor.dim() != 3:
        raise LayoutError(f"{name}: KV shape {tuple(tensor.shape)} is not (tokens, heads, dim)")
    num_blocks = tensor.shape[0] // page_size
    if num_blocks == 0:
        raise LayoutError(f"{name}: {tensor.shape[0]} tokens are less than one page of {page_size}")
    shape = [page_size, *tensor.shape[1:]]
    return _view(name, tensor, num_blocks, "NHC", shape, [int(stride) for stride in tensor.stride()], page_size)


def _view(
    name: str, tensor: torch.Tensor, num_blocks: int, axes: str, shape: list[int], strides: list[int], steps: int
) -> _View:
    """steps: how far a block is along dimension 0, whose elements shape[0] of them make one block."""
    item = tensor.element_size()
    inside = sorted(
        (stride * item, size, axis) for stride, size, axis in zip(strides, shape, axes, strict=True) if size > 1
    )
    run = extent = item
    outer: list[tuple[int, int]] = []
    for stride, size, axis in inside:
        if stride < extent:
            raise LayoutError(f"layer {name}: dimension {axis} overlaps itself (stride {stride} of {extent} bytes)")
        if stride == run and not outer:
            run *= size
        else:
            outer.append((stride, size))
        extent += (size - 1) * stride
    if run == item and inside:
        raise LayoutError(f"layer {name}: no dimension of the KV view {tuple(tensor.shape)} is contiguous")
    offsets = [0]
    for stride, size in reversed(outer):
        offsets = [offset + step * stride for offset in offsets for step in range(size)]
    block_stride = strides[0] * item * steps
    order = "".join(axis for _, _, axis in reversed(inside))
    dtype = str(tensor.dtype).removeprefix("torch.")
    storage = tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else 0
    return _View(
        layer=name,
        device=str(tensor.device),
        storage=storage,
        base=storage + int(tensor.storage_offset()) * item,
        block_stride=block_stride,
        num_blocks=num_blocks,
        runs=tuple(offsets),
        run_bytes=run,
        form=f"{axes}={','.join(map(str, shape))} {dtype} {order}",
    )


@dataclass
class _Part:
    """A contiguous run of one layer's block, before merging."""

    storage: int
    base: int
    stride: int
    size: int
    layer: int


def _build(engine: str, packing: str, block_tokens: int, num_blocks: int, views: Sequence[_View]) -> KVLayout:
    if not views:
        raise LayoutError(f"{engine}: no layer has a KV cache")
    devices = {view.device for view in views}
    if len(devices) != 1:
        raise LayoutError(
            f"{engine}: the KV cache is spread over {', '.join(sorted(devices))}; one device is supported"
        )
    names: list[list[str]] = []
    forms: list[list[str]] = []
    parts: list[_Part] = []
    index_of: dict[str, int] = {}
    seen: dict[tuple[int, int, tuple[int, ...], int], int] = {}
    for view in views:
        where = (view.base, view.block_stride, view.runs, view.run_bytes)
        if where in seen:
            names[seen[where]].append(view.layer)
            continue
        layer = index_of.setdefault(view.layer, len(names))
        if layer == len(names):
            names.append([view.layer])
            forms.append([])
        seen[where] = layer
        forms[layer].append(view.form)
        parts += [
            _Part(view.storage, view.base + offset, view.block_stride, view.run_bytes, layer) for offset in view.runs
        ]
    regions, pieces = _merge(parts, len(names))
    _check_disjoint(engine, regions, num_blocks)
    description = json.dumps(
        {
            "version": LAYOUT_VERSION,
            "engine": engine,
            "packing": packing,
            "block_tokens": block_tokens,
            "slot_order": "region,block",
            "regions": [region.size for region in regions],
            "layers": [
                {"form": form, "pieces": [[piece.region, piece.offset, piece.size] for piece in own]}
                for form, own in zip(forms, pieces, strict=True)
            ],
        },
        separators=(",", ":"),
    )
    layers = tuple(Layer(tuple(own_names), tuple(own)) for own_names, own in zip(names, pieces, strict=True))
    return KVLayout(engine, devices.pop(), block_tokens, num_blocks, tuple(regions), layers, description)


def _merge(parts: list[_Part], num_layers: int) -> tuple[list[Region], list[list[Piece]]]:
    """Join runs that are adjacent in every block.

    Inside one allocation the order of addresses is the engine's configuration; between allocations it is chance, so there the order of the
    layers decides. Runs may only be joined while the whole stays within one block's stride, else it would reach into the next block.
    """
    storage_order = {storage: index for index, storage in enumerate(dict.fromkeys(part.storage for part in parts))}
    regions: list[Region] = []
    pieces: list[list[Piece]] = [[] for _ in range(num_layers)]
    for part in sorted(parts, key=lambda part: (storage_order[part.storage], part.base)):
        last = regions[-1] if regions else None
        if (
            last is not None
            and last.stride == part.stride
            and last.base + last.size == part.base
            and last.size + part.size <= part.stride
        ):
            offset = last.size
            regions[-1] = Region(last.base, last.stride, last.size + part.size)
        else:
            offset = 0
            regions.append(Region(part.base, part.stride, part.size))
        pieces[part.layer].append(Piece(len(regions) - 1, offset, part.size))
    return regions, pieces


def _check_disjoint(engine: str, regions: Sequence[Region], num_blocks: int) -> None:
    """No byte may belong to two regions or two blocks: a copy into one would write the other.

    Regions either interleave with one stride (their offsets within the stride are disjoint) or lie apart as a whole.
    """
    for region in regions:
        if num_blocks > 1 and region.stride < region.size:
            raise LayoutError(f"{engine}: blocks overlap (stride {region.stride}, block run of {region.size} bytes)")
    ordered = sorted(regions, key=lambda region: region.base)
    ends = [region.base + (num_blocks - 1) * region.stride + region.size for region in ordered]
    for first, region in enumerate(ordered):
        for second in range(first + 1, len(ordered)):
            other = ordered[second]
            if other.base >= ends[first]:
                break
            phase = (other.base - region.base) % region.stride if region.stride else 0
            fits = region.size <= phase and phase + other.size <= region.stride
            if other.stride != region.stride or not fits:
                raise LayoutError(
                    f"{engine}: two layers' blocks share bytes at {other.base:#x}, which no known layout does"
                )


def _is_tensor(value: object) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "stride")


def _identity(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    storage = tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else 0
    return (storage, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _column(values: Iterable[int]) -> npt.NDArray[np.uint64]:
    return np.fromiter(values, dtype=np.uint64)
