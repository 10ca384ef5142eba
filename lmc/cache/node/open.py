"""Opens an engine's two halves: with a cache of its own, or attached to the node that the setting `node` names."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.config import CacheConfig
from lmc.cache.keys import Namespace
from lmc.cache.node.scheduler import NodeScheduler
from lmc.cache.node.worker import open_node_worker
from lmc.cache.parts import Group
from lmc.cache.plan import WorkerReady
from lmc.cache.scheduler.cache import CacheScheduler
from lmc.cache.transfer.common_slots import CommonSlots
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.worker import open as embedded
from lmc.cache.worker.worker import CacheWorker
from lmc.errors import ConfigError

AnyScheduler = CacheScheduler | NodeScheduler


def open_scheduler(
    config: CacheConfig,
    ready: Sequence[WorkerReady],
    block_tokens: int,
    *,
    part: tuple[int, int] = (0, 1),
    groups: Sequence[Group] = (),
    announces: bool = False,
) -> AnyScheduler:
    """part: of a common disk folder, for an engine with a cache of its own. groups: as CacheScheduler takes them.

    announces: take_changes() is called regularly.

    Raises ConfigError when the workers don't fit together, and for several groups through a node.
    """
    if config.node is not None:
        _require_one_group(groups)
        return NodeScheduler(config, ready, block_tokens, announces=announces)
    scheduler = CacheScheduler(config, ready, block_tokens, part=part, groups=groups)
    if announces:
        scheduler.announce()
    return scheduler


def open_worker(
    config: CacheConfig,
    namespace: Namespace,
    layout: KVLayout,
    *,
    rank: int,
    num_ranks: int,
    common: CommonSlots | None = None,
    others: Sequence[tuple[KVLayout, int]] = (),
    apart: bool = False,
) -> CacheWorker:
    """num_ranks: of one engine, on this machine. apart: each has a directory of its own. common, others: as the embedded worker takes them.

    Raises what the embedded worker raises, and ConfigError for several groups through a node.
    """
    if config.node is not None:
        _require_one_group(others)
        return open_node_worker(config, namespace, layout, rank=rank, ranks=[rank] if apart else range(num_ranks))
    return embedded.open_worker(config, namespace, layout, rank=rank, num_ranks=num_ranks, common=common, others=others)


def _require_one_group(several: Sequence[object]) -> None:
    if several:
        raise ConfigError(
            "a model with several KV groups is not supported through a node yet; leave the setting node out"
        )
