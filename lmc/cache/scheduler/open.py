"""Opens the scheduler's half of a cache: a directory with what the workers found, clients that ask what other instances have stored, and
the endpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry

from lmc.cache.config import REMOTE_TIERS, CacheConfig
from lmc.cache.directory import Capacity, Directory, Ticket, build_directory, capacity_of
from lmc.cache.directory.holds import NO_OPERATION
from lmc.cache.keys import ChunkKey, Namespace
from lmc.cache.plan import TierCopy, WorkerReady
from lmc.cache.scheduler.admin import Commands, Mailbox, Result
from lmc.cache.scheduler.endpoint import Endpoint
from lmc.cache.scheduler.presence import Presence
from lmc.cache.tiers.breaker import Breaker
from lmc.cache.tiers.format import TierScope, stored_bytes
from lmc.cache.tiers.open import open_tiers
from lmc.errors import ConfigError
from lmc.units import format_count

logger = logging.getLogger(__name__)

DISK = "disk"
_MOST_CHUNKS = 16_000_000  # the directory would take 2 GB


def common_namespace(ready: Sequence[WorkerReady]) -> Namespace:
    """That of all ranks. Raises ConfigError when they disagree on it."""
    namespace = ready[0].namespace
    if any(worker.namespace != namespace for worker in ready):
        raise ConfigError("the ranks disagree on the namespace; start them with the same model and settings")
    return namespace


def open_directory(
    config: CacheConfig, ready: Sequence[WorkerReady], now: float, part: tuple[int, int] = (0, 1)
) -> tuple[Directory, list[TierCopy]]:
    """The directory, and deletions of chunks in the bounded tiers: of those beyond its capacity, and of those that some rank lacks.

    A tier that one rank could not open is left out. part (which, of how many): engines of a node that have a disk folder in common each
    take over their part of what is there. Raises ConfigError when a capacity is less than one chunk.
    """
    host_slots = min(worker.host_slots for worker in ready)
    ready = [worker for worker in ready if worker.part is not None]  # the others store nothing of their own
    chunk_bytes = ready[0].chunk_bytes * len(ready)
    file_bytes = stored_bytes(ready[0].chunk_bytes) * len(ready)
    below: dict[str, Capacity] = {}
    for name in ready[0].stored:
        if all(name in worker.stored for worker in ready):
            below[name] = capacity_of(config.disk.capacity, file_bytes, config.disk.compress)
            if below[name].chunks == 0:
                raise ConfigError(f"{name}.capacity is smaller than one chunk of {file_bytes} bytes")
            if below[name].chunks > _MOST_CHUNKS:
                raise ConfigError(
                    f"{name}.capacity is {format_count(below[name].chunks)} chunks of {file_bytes} bytes; at most "
                    f"{format_count(_MOST_CHUNKS)} can be kept track of; raise chunk_tokens or lower the capacity"
                )
    remote = [name for name in REMOTE_TIERS if all(name in worker.remote for worker in ready)]
    shared = [DISK] if config.disk.shared and DISK in below else []
    directory = build_directory(config, host_slots, chunk_bytes, below=below, remote=[*shared, *remote])
    deletions: list[TierCopy] = []
    for name in below:
        by_rank = [set(worker.stored[name]) for worker in ready]
        everywhere = set.intersection(*by_rank)
        stored = [key for key in ready[0].stored[name] if key in everywhere and key[-1] % part[1] == part[0]]
        sizes = {key: sum(worker.stored[name][key] for worker in ready) for key in stored}
        surplus = directory.restore(name, stored, now, ready[0].parents, sizes)
        superfluous: Sequence[ChunkKey] = ()
        if name not in shared:  # in a shared tier they may be another instance's, or about to become whole
            superfluous = [*surplus, *sorted(set.union(*by_rank) - everywhere)]
        elif part[1] > 1:  # the capacity is the folder's, so what no engine takes over must go
            superfluous = surplus
        deletions += [TierCopy(Ticket(NO_OPERATION, "delete", key, name, -1)) for key in superfluous]
    return directory, deletions


def open_presence(config: CacheConfig, ready: Sequence[WorkerReady], directory: Directory) -> Presence | None:
    """Clients for the tiers that others write to, one for each rank that stores; None when there is no such tier."""
    names = list(directory.known_remote())
    if not names:
        return None
    tiers: dict[str, list[Breaker]] = {name: [] for name in names}
    parts = [worker.part for worker in ready if worker.part is not None]
    first = ready[0]
    label, layout = first.namespace.label(), first.namespace.layout
    for part in parts:
        scope = TierScope(label, part, layout, first.chunk_bytes, part_bytes=first.part_bytes)
        opened, _ = open_tiers(config, scope)
        for name, tier in opened.items():
            if name in tiers:
                tiers[name].append(tier)
            else:
                tier.close()
    return Presence({name: ranks for name, ranks in tiers.items() if len(ranks) == len(parts)})


def open_endpoint(
    config: CacheConfig,
    commands: Commands,
    mailbox: Mailbox,
    registry: CollectorRegistry,
    stats: Callable[[], Result],
    spans: Callable[[int], Result],
) -> Endpoint | None:
    """None when the settings want none, or when its port is taken."""
    metrics = config.metrics
    if not metrics.enabled:
        return None
    try:
        return Endpoint(metrics, config.admin, registry, stats, spans, commands, mailbox)
    except OSError as error:
        where = f"{metrics.host}:{metrics.port}"
        logger.warning("lmc: no metrics endpoint: cannot listen on %s: %s", where, error.strerror)
        return None
