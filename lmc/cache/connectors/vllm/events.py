"""vLLM's KV events for lmc's own tiers: routers learn which blocks this instance can load instead of computing them.

An event names vLLM's block hashes, so a router sees a block move from the device to the host and to disk. Chunks of tenants, images and
embeddings are not announced: an event says tokens and adapter only. Neither are tiers with an eviction of their own.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from lmc.cache.directory import HOST

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.v1.core.kv_cache_utils import ExternalBlockHash
    from vllm.v1.request import Request

    from lmc.cache.keys import ChunkKey
    from lmc.cache.node.open import AnyScheduler


@dataclass(slots=True)
class _Chunk:
    """What an event says of a chunk; hashes has one entry per block, after the hash of the block before the first."""

    parent: ExternalBlockHash | None
    hashes: list[ExternalBlockHash]
    tokens: array[int]
    lora_id: int | None
    lora_name: str | None
    tiers: set[str] = field(default_factory=set)  # where it was announced


class TierEvents:
    """Chunks that a scan found at start are announced when a request first brings their tokens."""

    def __init__(self, scheduler: AnyScheduler, block_tokens: int) -> None:
        self._scheduler = scheduler
        self._block_tokens = block_tokens
        self._chunk_tokens = scheduler.chunk_tokens
        self._chunks: dict[ChunkKey, _Chunk] = {}
        self._events: list[KVCacheEvent] = []

    def note(self, held: Iterable[tuple[Request, Sequence[ChunkKey]]]) -> None:
        """Requests hold the chunks of these keys, which are stored or being stored."""
        per_chunk = self._chunk_tokens // self._block_tokens
        new: dict[ChunkKey, tuple[Request, int]] = {}
        for request, keys in held:
            for index, key in enumerate(keys[: len(request.block_hashes) // per_chunk]):
                if key not in self._chunks:
                    new.setdefault(key, (request, index))
        if not new:
            return
        places = self._scheduler.where(list(new))  # once, since a node is asked over its socket
        for (key, (request, index)), (tiers, arriving) in zip(new.items(), places, strict=True):
            if not tiers and not arriving:
                continue  # it found no room
            hashes, lora = request.block_hashes, request.lora_request
            first, end = index * self._chunk_tokens, (index + 1) * per_chunk
            chunk = self._chunks[key] = _Chunk(
                maybe_convert_block_hash(hashes[end - per_chunk - 1]) if index else None,
                [maybe_convert_block_hash(one) for one in hashes[end - per_chunk : end]],
                array("I", request.all_token_ids[first : first + self._chunk_tokens]),
                lora.lora_int_id if lora else None,
                lora.lora_name if lora else None,
            )
            for tier in tiers:
                self._announce(chunk, tier)

    def take(self) -> list[KVCacheEvent]:
        """Events since the last call."""
        forget, changes = self._scheduler.take_changes()
        if forget:
            self._forget()
        gone = []
        for change in changes:
            chunk = self._chunks.get(change.key)
            if chunk is None:
                continue
            if change.readable:
                self._announce(chunk, change.tier)
                continue
            self._withdraw(chunk, change.tier)
            if not chunk.tiers:
                gone.append(change.key)
        gone = [key for key in dict.fromkeys(gone) if not self._chunks[key].tiers]
        if gone:
            for key, (_, arriving) in zip(gone, self._scheduler.where(gone), strict=True):
                if not arriving:
                    del self._chunks[key]
        events, self._events = self._events, []
        return events

    def _forget(self) -> None:
        """Nothing is known of any chunk any more. What is still there is announced when a request brings its tokens again."""
        for chunk in self._chunks.values():
            for tier in tuple(chunk.tiers):
                self._withdraw(chunk, tier)
        self._chunks.clear()

    def _withdraw(self, chunk: _Chunk, tier: str) -> None:
        if tier in chunk.tiers:
            chunk.tiers.remove(tier)
            self._events.append(BlockRemoved(block_hashes=chunk.hashes, **_place(tier)))

    def _announce(self, chunk: _Chunk, tier: str) -> None:
        if tier in chunk.tiers:
            return
        chunk.tiers.add(tier)
        self._events.append(
            BlockStored(
                block_hashes=chunk.hashes,
                parent_block_hash=chunk.parent,
                token_ids=chunk.tokens.tolist(),
                block_size=self._block_tokens,
                lora_id=chunk.lora_id,
                lora_name=chunk.lora_name,
                **_place(tier),
            )
        )


def _place(tier: str) -> dict[str, str | None]:
    """The fields that say where a block is."""
    if tier == HOST:
        return {"medium": MEDIUM_CPU, "locality": "LOCAL", "ownership": None}
    return {"medium": MEDIUM_STORAGE, "locality": "LOCAL", "ownership": tier}
