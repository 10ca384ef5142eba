"""Builds a directory from settings, for the live cache and for the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lmc.cache.directory.below import WriteMode
from lmc.cache.directory.directory import Directory
from lmc.cache.directory.marks import TtlMode
from lmc.cache.directory.nodes import Capacity
from lmc.cache.policy.registry import get_policy
from lmc.errors import ConfigError


class DirectorySettings(Protocol):
    """The settings that decide what is stored where; CacheConfig has them and explains them."""

    @property
    def policy(self) -> str: ...
    @property
    def write(self) -> WriteMode: ...
    @property
    def write_touches(self) -> int: ...
    @property
    def ttl(self) -> float | None: ...
    @property
    def ttl_mode(self) -> TtlMode: ...
    @property
    def tenant_quota(self) -> int | str | None: ...
    @property
    def queue_depth(self) -> int: ...


# The share of its size to which a chunk is shortened at most, as far as places are concerned: a few more bytes than the exponents' entropy.
# So a tier has places for so many chunks more, and one whose chunks are shorter still stays a little below its capacity in bytes.
_SHORTEST = {"none": 1.0, "lossless": 0.7, "lossless-max": 0.65}


def capacity_of(num_bytes: int, chunk_bytes: int, compress: str) -> Capacity:
    """Of a bounded tier below the host. chunk_bytes: that a chunk takes there, over all ranks, when it is not compressed."""
    return Capacity(num_bytes, chunk_bytes, int(num_bytes // chunk_bytes / _SHORTEST[compress]))


def build_directory(
    settings: DirectorySettings,
    host_slots: int,
    chunk_bytes: int,
    *,
    below: Mapping[str, Capacity],
    remote: Sequence[str],
) -> Directory:
    """below: bounded tiers, fastest first. remote: tiers that others write to. chunk_bytes: over all ranks.

    Raises ConfigError when tenant_quota is less than one chunk.
    """
    return Directory(
        host_slots,
        below,
        get_policy(settings.policy),
        remote=remote,
        write=settings.write,
        write_touches=settings.write_touches,
        ttl=settings.ttl,
        ttl_mode=settings.ttl_mode,
        tenant_quota=_quota_slots(settings.tenant_quota, host_slots, chunk_bytes),
        queue_depth=settings.queue_depth,
    )


def _quota_slots(quota: int | str | None, host_slots: int, chunk_bytes: int) -> int | None:
    """tenant_quota in host slots."""
    if quota is None:
        return None
    slots = slots_of(quota, host_slots, chunk_bytes)
    if slots < 1:
        raise ConfigError(
            f"tenant_quota {quota} is less than one chunk of {chunk_bytes} bytes; the host has {host_slots}"
        )
    return slots


def slots_of(limit: int | str, host_slots: int, chunk_bytes: int) -> int:
    """A limit in bytes, or a share of the host such as "25%", in host slots. chunk_bytes: over all ranks."""
    return int(host_slots * float(limit.rstrip("%")) / 100) if isinstance(limit, str) else limit // chunk_bytes
