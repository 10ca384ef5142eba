"""From an engine's KV tensors to regions: the byte runs of a block, merged where they are adjacent in every block.

Reads tensors through their own methods and imports no torch. Only lmc.cache.transfer.layout uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmc.errors import LayoutError

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True)
class View:
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
    dtype: str  # torch's name


def vllm_view(name: str, tensor: torch.Tensor, num_blocks: int) -> View:
    if tensor.dim() != 4:
        raise LayoutError(f"layer {name}: KV shape {tuple(tensor.shape)} is not [blocks, heads, tokens, content]")
    if num_blocks <= 0 or tensor.shape[0] % num_blocks:
        raise LayoutError(f"layer {name}: {tensor.shape[0]} kernel blocks do not divide into {num_blocks} blocks")
    ratio = tensor.shape[0] // num_blocks
    shape = [ratio, *tensor.shape[1:]]
    return _view(name, tensor, num_blocks, "KHNC", shape, [int(stride) for stride in tensor.stride()], ratio)


def sglang_view(name: str, tensor: torch.Tensor, page_size: int) -> View:
    if tensor.dim() != 3:
        raise LayoutError(f"{name}: KV shape {tuple(tensor.shape)} is not (tokens, heads, dim)")
    num_blocks = tensor.shape[0] // page_size
    if num_blocks == 0:
        raise LayoutError(f"{name}: {tensor.shape[0]} tokens are less than one page of {page_size}")
    shape = [page_size, *tensor.shape[1:]]
    return _view(name, tensor, num_blocks, "NHC", shape, [int(stride) for stride in tensor.stride()], page_size)


def _view(
    name: str, tensor: torch.Tensor, num_blocks: int, axes: str, shape: list[int], strides: list[int], steps: int
) -> View:
    """steps: number of entries of dimension 0 per block."""
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
    return View(
        layer=name,
        device=str(tensor.device),
        storage=storage,
        base=storage + int(tensor.storage_offset()) * item,
        block_stride=block_stride,
        num_blocks=num_blocks,
        runs=tuple(offsets),
        run_bytes=run,
        form=f"{axes}={','.join(map(str, shape))} {dtype} {order}",
        dtype=dtype,
    )


@dataclass
class _Part:
    """A contiguous run of one layer's block, before merging."""

    storage: int
    base: int
    stride: int
    size: int
    layer: int


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


def merge_views(
    engine: str, views: Sequence[View], num_blocks: int
) -> tuple[list[Region], list[Layer], list[list[str]]]:
    """Regions in slot order, layers in the order of the views, and each layer's forms. Views of the same bytes are one layer."""
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
    layers = [Layer(tuple(own_names), tuple(own)) for own_names, own in zip(names, pieces, strict=True)]
    return regions, layers, forms


def is_tensor(value: object) -> bool:
    """Engines register lists of state tensors too."""
    return hasattr(value, "data_ptr") and hasattr(value, "stride")


def identity(tensor: torch.Tensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Equal for views of the same bytes in the same form."""
    storage = tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else 0
    return (storage, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))
