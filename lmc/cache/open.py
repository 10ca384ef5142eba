"""Open one rank's cache: memory and tiers as configured, less what cannot be opened."""

from __future__ import annotations

import logging

import psutil

from lmc.cache.config import CacheConfig
from lmc.cache.keys import Namespace
from lmc.cache.layout import KVLayout
from lmc.cache.tiers.base import Tier
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.host import HostSlab
from lmc.cache.transfer.backends import choose_backend
from lmc.cache.transfer.planner import slot_bytes
from lmc.cache.worker import CacheWorker
from lmc.errors import ConfigError, TierError
from lmc.units import format_size

logger = logging.getLogger(__name__)


def open_worker(
    config: CacheConfig, namespace: Namespace, layout: KVLayout, *, rank: int, num_ranks: int
) -> CacheWorker:
    """A worker with a host slab and the tiers below. A tier that cannot be opened is left out with a warning, or, if the configuration is
    strict, a TierError. Raises ConfigError when not a single chunk fits into host memory."""
    blocks_per_chunk = namespace.chunk_tokens // layout.block_tokens
    chunk_bytes = slot_bytes(layout, blocks_per_chunk)
    share = host_bytes(config) // num_ranks
    num_slots = share // chunk_bytes
    if num_slots < 1:
        raise ConfigError(
            f"host.capacity gives {format_size(share)} per rank, less than one chunk of {format_size(chunk_bytes)}; "
            "raise it or lower chunk_tokens"
        )
    scope = TierScope(namespace.label(), rank, layout.fingerprint, chunk_bytes)
    warnings: list[str] = []
    tiers: dict[str, Tier] = {}
    if config.disk.path is not None:
        try:
            tiers["disk"] = DiskTier(config.disk.path, scope, fsync=config.disk.fsync)
        except TierError as error:
            if config.strict:
                raise
            warnings.append(f"{error}; running without it")
            logger.warning("lmc: %s", warnings[-1])
    return CacheWorker(
        namespace,
        rank,
        layout,
        HostSlab(num_slots, chunk_bytes),
        tiers,
        choose_backend(layout),
        io_threads=config.io_threads,
        warnings=warnings,
    )


def host_bytes(config: CacheConfig) -> int:
    """Bytes of host memory for all ranks; a share is of what is free now."""
    capacity = config.host.capacity
    if isinstance(capacity, str):
        return int(psutil.virtual_memory().available * float(capacity.rstrip("%")) / 100)
    return capacity
