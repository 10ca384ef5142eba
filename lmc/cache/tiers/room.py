"""Keeps disk.capacity within what the file system of the disk folder has room for."""

from __future__ import annotations

import logging
import shutil
import tempfile

from lmc.cache.config import CacheConfig
from lmc.cache.sections import LEAST_CAPACITY
from lmc.cache.tiers.late import wait_for
from lmc.cache.tiers.namespaces import list_namespaces
from lmc.errors import ConfigError, TierError
from lmc.units import format_size

logger = logging.getLogger(__name__)

LEFT_FREE = 0.05  # of what is free now: a file system that is full to the last byte harms others
_PATIENCE = 10.0  # seconds


def usable_disk(config: CacheConfig) -> CacheConfig:
    """The settings with a disk tier that can be used: its folder is made, and its capacity is one that fits. What is changed is logged.

    A disk that does not answer leaves them as they are, since its tier is opened when it answers. Raises ConfigError where the folder
    cannot be written, and with `strict` where there is no room for any chunk.
    """
    folder = config.disk.path
    if folder is None:
        return config

    def look() -> tuple[CacheConfig, str]:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        return within_room(config)

    try:
        fitting, changed = wait_for(look, _PATIENCE, f"disk.path {folder}")
    except TierError as error:
        logger.warning("lmc: %s, so disk.capacity was not compared with its room", error)
        return config
    except OSError as error:
        raise ConfigError(f"disk.path {folder} cannot be written: {error.strerror}") from None
    if changed and config.strict and fitting.disk.path is None:
        raise ConfigError(changed)
    if changed:
        logger.warning("lmc: %s", changed)
    return fitting


def within_room(config: CacheConfig) -> tuple[CacheConfig, str]:
    """The settings with a disk.capacity that the folder's file system has room for, and a sentence where they differ from the given ones.

    Chunks that lie there already count as room, because others take their place. Where no chunk fits, there is no disk tier. The folder
    must exist. Raises OSError.
    """
    folder, wanted = config.disk.path, config.disk.capacity
    if folder is None:
        return config, ""
    free = shutil.disk_usage(folder).free
    room = int(free * (1 - LEFT_FREE))
    if wanted <= room:
        return config, ""
    room += sum(namespace.num_bytes for namespace in list_namespaces(folder))
    if wanted <= room:
        return config, ""
    why = f"disk.capacity {format_size(wanted)} is more than {folder} has room for ({format_size(free)} are free)"
    if room < LEAST_CAPACITY:
        disk, now = config.disk.model_copy(update={"path": None}), "no chunk fits, so there is no disk tier"
    else:
        disk, now = config.disk.model_copy(update={"capacity": room}), f"it is {format_size(room)} now"
    return config.model_copy(update={"disk": disk}), f"{why}; {now}"
