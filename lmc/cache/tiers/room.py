"""Keeps disk.capacity within what the file system of the disk folder has room for."""

from __future__ import annotations

import os
from pathlib import Path

from lmc.cache.config import CacheConfig
from lmc.cache.tiers.namespaces import list_namespaces
from lmc.units import format_size

LEFT_FREE = 0.05  # of what is free now: a file system that is full to the last byte harms others


def within_room(config: CacheConfig) -> tuple[CacheConfig, str]:
    """The settings with a disk.capacity that the folder's file system has room for, and a sentence where that is less than the setting.

    Chunks that lie there already count as room, because others take their place. The folder must exist. Raises OSError.
    """
    folder, wanted = config.disk.path, config.disk.capacity
    if folder is None:
        return config, ""
    free = _free(folder)
    room = int(free * (1 - LEFT_FREE))
    if wanted <= room:
        return config, ""
    room += sum(namespace.num_bytes for namespace in list_namespaces(folder))
    if wanted <= room:
        return config, ""
    disk = config.disk.model_copy(update={"capacity": max(room, 1)})
    lowered = (
        f"disk.capacity {format_size(wanted)} is more than {folder} has room for ({format_size(free)} are free); "
        f"it is {format_size(room)} now"
    )
    return config.model_copy(update={"disk": disk}), lowered


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
