"""Makes descriptors, the (source, destination, size) of every copy, from blocks and chunk slots, merged as far as both sides allow.

Pure numpy over blocks, never over tokens; nothing is copied here. Any thread may plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from lmc.cache.plan import SKIP
from lmc.cache.transfer.layout import KVLayout
from lmc.errors import TransferError

Addresses = npt.NDArray[np.uint64]


class Direction(StrEnum):
    STORE = "store"  # engine blocks -> chunk slots
    LOAD = "load"  # chunk slots -> engine blocks


@dataclass(frozen=True, eq=False)
class Descriptors:
    """Copies that may run in any order: no destination byte is written twice."""

    src: Addresses
    dst: Addresses
    size: Addresses  # bytes, never 0
    direction: Direction

    def __len__(self) -> int:
        return len(self.size)

    @property
    def num_bytes(self) -> int:
        return int(self.size.sum())

    @property
    def slots(self) -> Addresses:
        """The side in chunk slots."""
        return self.dst if self.direction is Direction.STORE else self.src

    @property
    def blocks(self) -> Addresses:
        """The side in the engine's blocks."""
        return self.src if self.direction is Direction.STORE else self.dst


def slot_bytes(layout: KVLayout, blocks_per_chunk: int) -> int:
    """Bytes of the slot of one chunk."""
    return layout.block_bytes * blocks_per_chunk


def plan(
    layout: KVLayout,
    block_ids: npt.NDArray[np.int64],
    slot_addresses: Addresses,
    direction: Direction,
    *,
    layers: range | None = None,
    boundaries: Addresses | None = None,
) -> Descriptors:
    """Descriptors that move whole blocks between the engine and chunk slots.

    block_ids: (num_chunks * blocks_per_chunk,), the chunks' blocks in token order; SKIP entries are left alone on both sides.
    slot_addresses: (num_chunks,), where each chunk's slot starts.
    layers: only these layers of the layout, for layer-wise loads.
    boundaries: sorted addresses in slot memory that no descriptor may cross, such as the edges of pinned pieces.
    Raises TransferError when an id is out of range, or a destination would be written twice.
    """
    num_chunks = len(slot_addresses)
    if num_chunks == 0 or len(block_ids) % num_chunks:
        if num_chunks == 0 and len(block_ids) == 0:
            return Descriptors(_empty(), _empty(), _empty(), direction)
        raise TransferError(f"{len(block_ids)} blocks do not fill {num_chunks} chunks evenly")
    blocks_per_chunk = len(block_ids) // num_chunks
    _check(layout, block_ids, slot_addresses, direction, blocks_per_chunk)

    table = layout.whole if layers is None else layout.pieces(layers)
    blocks = block_ids.astype(np.uint64).reshape(num_chunks, 1, blocks_per_chunk)
    position = np.arange(blocks_per_chunk, dtype=np.uint64)
    starts = table.slot_start * np.uint64(blocks_per_chunk) + table.slot_offset
    in_slot = starts[:, None] + table.slot_stride[:, None] * position  # (pieces, blocks_per_chunk)
    engine = (table.base[:, None] + blocks * table.stride[:, None]).ravel()  # (chunks, pieces, blocks_per_chunk)
    slot = (slot_addresses.reshape(num_chunks, 1, 1) + in_slot).ravel()
    size = np.broadcast_to(table.size[:, None], (num_chunks, len(table.size), blocks_per_chunk)).flatten()
    skipped = block_ids < 0
    if skipped.any():
        kept = ~np.broadcast_to(
            skipped.reshape(num_chunks, 1, blocks_per_chunk), (num_chunks, len(table.size), blocks_per_chunk)
        ).ravel()
        engine, slot, size = engine[kept], slot[kept], size[kept]
    engine, slot, size = merge(engine, slot, size)
    if boundaries is not None and len(boundaries):
        engine, slot, size = _split(engine, slot, size, boundaries)
    if direction is Direction.STORE:
        return Descriptors(engine, slot, size, direction)
    return Descriptors(slot, engine, size, direction)


def join(parts: Sequence[Descriptors], direction: Direction) -> Descriptors:
    """Copies of one direction as one batch."""
    sources, destinations, sizes = ([getattr(part, name) for part in parts] for name in ("src", "dst", "size"))
    return Descriptors(
        np.concatenate([_empty(), *sources]),
        np.concatenate([_empty(), *destinations]),
        np.concatenate([_empty(), *sizes]),
        direction,
    )


def plan_layers(
    layout: KVLayout,
    block_ids: npt.NDArray[np.int64],
    slot_addresses: Addresses,
    direction: Direction,
    *,
    boundaries: Addresses | None = None,
) -> list[Descriptors]:
    """The result of plan() for each layer alone. If all layers have equally many pieces, it costs about as much as one plan()."""
    num_layers = len(layout.layers)
    tables = [layout.pieces(range(index, index + 1)) for index in range(num_layers)]
    num_chunks, num_pieces = len(slot_addresses), len(tables[0].size)
    if num_chunks == 0 or len(block_ids) % num_chunks or any(len(table.size) != num_pieces for table in tables):
        return [
            plan(layout, block_ids, slot_addresses, direction, layers=range(index, index + 1), boundaries=boundaries)
            for index in range(num_layers)
        ]
    blocks_per_chunk = len(block_ids) // num_chunks
    _check(layout, block_ids, slot_addresses, direction, blocks_per_chunk)

    table = layout.layer_pieces
    shape = (num_layers, num_chunks, num_pieces, blocks_per_chunk)
    blocks = block_ids.astype(np.uint64).reshape(1, num_chunks, 1, blocks_per_chunk)
    position = np.arange(blocks_per_chunk, dtype=np.uint64)
    starts = table.slot_start * np.uint64(blocks_per_chunk) + table.slot_offset
    in_slot = starts[:, None] + table.slot_stride[:, None] * position
    by_piece = (num_layers, 1, num_pieces, 1)
    kept = np.flatnonzero(np.broadcast_to((block_ids >= 0).reshape(1, num_chunks, 1, blocks_per_chunk), shape).ravel())
    engine = (table.base.reshape(by_piece) + blocks * table.stride.reshape(by_piece)).ravel()[kept]
    slot = slot_addresses.reshape(1, num_chunks, 1, 1) + in_slot.reshape(num_layers, 1, num_pieces, blocks_per_chunk)
    slot = slot.ravel()[kept]
    size = np.broadcast_to(table.size.reshape(by_piece), shape).ravel()[kept]
    share = len(kept) // num_layers
    parts = []
    for index in range(num_layers):
        own = slice(index * share, (index + 1) * share)
        merged = merge(engine[own], slot[own], size[own])
        if boundaries is not None and len(boundaries):
            merged = _split(*merged, boundaries)
        engine_side, slot_side, sizes = merged
        pair = (engine_side, slot_side) if direction is Direction.STORE else (slot_side, engine_side)
        parts.append(Descriptors(*pair, sizes, direction))
    return parts


def _check(
    layout: KVLayout,
    block_ids: npt.NDArray[np.int64],
    slot_addresses: Addresses,
    direction: Direction,
    blocks_per_chunk: int,
) -> None:
    if len(block_ids) == 0:
        raise TransferError("a chunk has no blocks")
    lowest, highest = int(block_ids.min()), int(block_ids.max())
    if lowest < SKIP or highest >= layout.num_blocks:
        wrong = lowest if lowest < SKIP else highest
        raise TransferError(f"block {wrong} does not exist; the KV cache has {layout.num_blocks} blocks")
    if direction is Direction.LOAD:
        ordered = np.sort(block_ids[block_ids >= 0])
        if (ordered[1:] == ordered[:-1]).any():
            raise TransferError("a block is the destination of two loads")
        return
    slots = np.sort(slot_addresses)
    if len(slots) > 1 and int((slots[1:] - slots[:-1]).min()) < slot_bytes(layout, blocks_per_chunk):
        raise TransferError("two chunks would be stored into one slot")


def merge(engine: Addresses, slot: Addresses, size: Addresses) -> tuple[Addresses, Addresses, Addresses]:
    """Join neighbouring descriptors that are adjacent on both sides."""
    if len(size) < 2:
        return engine, slot, size
    broken = (engine[1:] != engine[:-1] + size[:-1]) | (slot[1:] != slot[:-1] + size[:-1])
    first = np.concatenate(([0], np.flatnonzero(broken) + 1))
    if len(first) == len(size):
        return engine, slot, size
    return engine[first], slot[first], np.add.reduceat(size, first)


def fragment(descriptors: Descriptors, max_bytes: int) -> Descriptors:
    """The same copies in pieces of at most max_bytes."""
    size = descriptors.size
    if len(size) == 0 or int(size.max()) <= max_bytes:
        return descriptors
    limit = np.uint64(max_bytes)
    pieces = ((size + limit - np.uint64(1)) // limit).astype(np.int64)
    row = np.repeat(np.arange(len(size)), pieces)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = nth.astype(np.uint64) * limit
    return Descriptors(
        descriptors.src[row] + offset,
        descriptors.dst[row] + offset,
        np.minimum(size[row] - offset, limit),
        descriptors.direction,
    )


def _split(
    engine: Addresses, slot: Addresses, size: Addresses, boundaries: Addresses
) -> tuple[Addresses, Addresses, Addresses]:
    """Cut every descriptor at the boundaries strictly inside its slot range."""
    first = np.searchsorted(boundaries, slot, side="right")
    cuts = np.searchsorted(boundaries, slot + size, side="left") - first
    if not cuts.any():
        return engine, slot, size
    row = np.repeat(np.arange(len(size)), cuts + 1)
    heads = np.cumsum(cuts + 1) - (cuts + 1)  # where each descriptor's first part is
    start = slot[row]
    later = np.ones(len(row), dtype=bool)
    later[heads] = False
    nth = np.arange(len(row)) - heads[row]  # 0 for a descriptor's first part
    start[later] = boundaries[(first[row] + nth - 1)[later]]
    end = np.empty_like(start)
    end[:-1] = start[1:]
    end[heads + cuts] = slot + size
    parts: Addresses = end - start
    return engine[row] + (start - slot[row]), start, parts


def _empty() -> Addresses:
    return np.empty(0, dtype=np.uint64)
