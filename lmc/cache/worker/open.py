"""Opens one rank's cache: memory and tiers as configured, without those tiers that cannot be opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from lmc.cache.config import CacheConfig
from lmc.cache.keys import Namespace
from lmc.cache.tiers.breaker import Breaker
from lmc.cache.tiers.codec import element_of
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.lent import LentMemory
from lmc.cache.tiers.open import open_tiers
from lmc.cache.transfer.backends import Backend, choose_backend
from lmc.cache.transfer.common_slots import CommonSlots, offer_slots
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.pinned import open_slab
from lmc.cache.transfer.planner import slot_bytes
from lmc.cache.transfer.streams import TransferStreams
from lmc.cache.worker.block_copies import BlockCopier
from lmc.cache.worker.worker import CacheWorker, read_copying
from lmc.errors import ConfigError
from lmc.memory import available_memory
from lmc.units import format_size

logger = logging.getLogger(__name__)


def open_worker(
    config: CacheConfig,
    namespace: Namespace,
    layout: KVLayout,
    *,
    rank: int,
    num_ranks: int,
    common: CommonSlots | None = None,
    others: Sequence[tuple[KVLayout, int]] = (),
) -> CacheWorker:
    """A worker with a host slab and the tiers below, less what cannot be opened; see open_tiers.

    num_ranks: those of this engine that share a node and store. common: None if this rank alone has its KV. others: of a model with
    several kinds of KV, the further groups' layouts and the blocks of a part; the namespace names all. Raises ConfigError when not a
    single chunk fits into host memory, and TierError when the configuration is strict.
    """
    if others:
        _require_plain(config, common)
    blocks_per_chunk = namespace.chunk_tokens // layout.block_tokens
    part_bytes = tuple(slot_bytes(one, blocks) for one, blocks in [(layout, blocks_per_chunk), *others])
    chunk_bytes = max(part_bytes)
    if not others:
        part_bytes = ()
    num_slots = count_slots(config, chunk_bytes, rank, num_ranks) if common is None else common.num_slots
    part = common.part if common is not None else rank
    stores = common is None or common.stores
    with ExitStack() as opened:  # what a refusal closes again
        tiers: dict[str, Breaker] = {}
        warnings: list[str] = []
        if stores:
            element = element_of(layout.dtypes, namespace.kv_dtype)
            scope = TierScope(
                namespace.label(), part, namespace.layout, chunk_bytes, element=element, part_bytes=part_bytes
            )
            tiers, warnings = open_tiers(config, scope, num_ranks)
        for tier in tiers.values():
            opened.callback(tier.close)
        # Calibrated first: while memory is being touched and pinned, rates are not those of later.
        backend = choose_backend(
            layout, name=config.transfer_backend, is_pinned=lambda addresses: slab.is_pinned(addresses)
        )
        descriptor = common.descriptor if common is not None else None
        with ExitStack() as until_mapped:
            if descriptor is None and any(tier.borrows for tier in tiers.values()):
                descriptor = offer_slots(num_slots, chunk_bytes).descriptor
                until_mapped.callback(os.close, descriptor)
            slab = open_slab(layout.device, num_slots, chunk_bytes, descriptor)
            opened.callback(slab.close)
            if descriptor is not None:
                for tier in tiers.values():
                    tier.lend(LentMemory(descriptor, *slab.extent, slab))
        worker = CacheWorker(
            namespace,
            rank,
            slab,
            BlockCopier(
                layout,
                slab,
                backend,
                open_streams(layout.device, backend),
                others=[other for other, _ in others],
                on_thread_bytes=-(-config.background_load_tokens // layout.block_tokens) * layout.block_bytes,
            ),
            tiers,
            partial(read_copying, backend, slab),
            part=part if stores else None,
            io_threads={name: config.redis.connections if name == "redis" else config.io_threads for name in tiers},
            close_timeout=config.close_timeout,
            warnings=[*warnings, *([slab.problem] if slab.problem else [])],
            part_bytes=part_bytes,
        )
        opened.pop_all()
    return worker


def _require_plain(config: CacheConfig, common: CommonSlots | None) -> None:
    """Raises ConfigError for what does not go together yet with a model that has several kinds of KV."""
    codes = {
        "disk": config.disk.compress,
        "redis": config.redis.compress,
        "s3": config.s3.compress,
        "mooncake": config.mooncake.compress,
    }
    asked = [f"{tier}.compress" for tier, code in codes.items() if code != "none"]
    if asked:
        raise ConfigError(f"a model with several KV groups is not compressed yet; set {' and '.join(asked)} to none")
    if common is not None:
        raise ConfigError("ranks have no common slots yet for a model with several KV groups; give each rank its own")


def count_slots(config: CacheConfig, chunk_bytes: int, rank: int, num_ranks: int) -> int:
    """Slots of one of num_ranks ranks. Raises ConfigError when there is no room for one."""
    share = host_bytes(config, rank, num_ranks)
    if share < chunk_bytes:
        raise ConfigError(
            f"host.capacity gives {format_size(share)} per rank, less than one chunk of {format_size(chunk_bytes)}; "
            "raise it or lower chunk_tokens"
        )
    return share // chunk_bytes


def open_streams(device: str, backend: Backend) -> TransferStreams | None:
    """The store and load streams beside a device's compute stream, or None on a CPU."""
    if not device.startswith("cuda"):
        return None
    from lmc.cache.transfer.runtimes import CudaRuntime

    return TransferStreams(CudaRuntime(device), backend)


def host_bytes(config: CacheConfig, rank: int, num_ranks: int) -> int:
    """Bytes of host memory for one of the ranks that share host.capacity; a share is of what is free now."""
    capacity = config.host.capacity
    memory = available_memory()
    if isinstance(capacity, str):
        total = int(memory.free * float(capacity.rstrip("%")) / 100)
        asked = f"{float(capacity.rstrip('%')):g}%"
    else:
        total = capacity
        asked = format_size(capacity)
    share = total // num_ranks
    if rank == 0:
        free = f"{format_size(memory.free)} are free here, as {memory.by} says"
        ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks, {format_size(share)} each"
        logger.info(
            "lmc: host memory: %s of this engine for %s (asked for %s; %s)", format_size(total), ranks, asked, free
        )
        if total > memory.free:
            logger.warning(
                "lmc: host memory: %s is more than the %s that are free; the kernel may end the engine: lower host.capacity",
                format_size(total),
                format_size(memory.free),
            )
    return share
