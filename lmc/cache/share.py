"""What one engine gets of settings that are meant for all engines of a node: data-parallel engines share its memory and its disk.

Each has a directory and tiers of its own. In a disk folder they see each other's chunks; each looks after those that it has written
and, after a start, after its part of what is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from lmc.cache.config import CacheConfig
from lmc.errors import ConfigError

_MOST_PORT = 65_535


@dataclass(frozen=True)
class Share:
    """One engine among `engines` of its node; `rank` tells all data-parallel engines apart, on other nodes too."""

    rank: int = 0
    engines: int = 1


ALONE = Share()


def part_of(config: CacheConfig, share: Share) -> tuple[int, int]:
    """(which, of how many): the part of the disk folder that the engine takes over at its start.

    Where instances of other nodes use the folder too, nobody divides it: each takes over what it finds, up to its capacity.
    """
    return (0, 1) if config.disk.shared else (share.rank % share.engines, share.engines)


def of_engine(config: CacheConfig, share: Share) -> CacheConfig:
    """The settings of this engine: its share of sizes, a port and a record of its own. Raises ConfigError when there is no such port."""
    metrics, record = config.metrics, config.record
    if share.rank and metrics.port:
        port = metrics.port + share.rank
        if port > _MOST_PORT:
            raise ConfigError(
                f"metrics.port {metrics.port} leaves no port for engine {share.rank}; choose at most {_MOST_PORT - share.rank}"
            )
        metrics = metrics.model_copy(update={"port": port})
    if share.rank and record is not None:
        record = record_of(record, share.rank)
    host, disk = config.host, config.disk
    if share.engines > 1:
        host = host.model_copy(update={"capacity": _divided(host.capacity, share.engines)})
        disk = disk.model_copy(update={"shared": True})
    return config.model_copy(update={"metrics": metrics, "record": record, "host": host, "disk": disk})


def of_directory(config: CacheConfig, share: Share) -> CacheConfig:
    """The same for the engine's directory, which keeps its own chunks within its share; what the folder holds is the tier's to bound."""
    disk = config.disk.model_copy(update={"capacity": config.disk.capacity // share.engines})
    return config.model_copy(update={"disk": disk})


def record_of(record: Path, rank: int) -> Path:
    """trace.jsonl is engine 0's, trace.dp1.jsonl engine 1's."""
    return record.with_name(f"{record.stem}.dp{rank}{record.suffix}") if rank else record


def _divided(capacity: int | str, engines: int) -> int | str:
    if isinstance(capacity, str):
        return f"{math.floor(float(capacity.rstrip('%')) / engines * 1e6) / 1e6:.6f}%"  # never rounded up
    return capacity // engines
