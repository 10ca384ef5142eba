"""How ranks of a node that hold the same KV (one latent, or one head, for several ranks) agree on common slots.

The first of such neighbours stores for all of them, in memory and below; each loads from its slots.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Protocol, TypeVar

from lmc.cache.config import CacheConfig
from lmc.cache.keys import Namespace
from lmc.cache.transfer.common_slots import CommonSlots, SlotsOffer, offer_slots, take_slots
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.planner import slot_bytes
from lmc.cache.worker.open import count_slots

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Gather(Protocol):
    """Gives what each rank of the engine gave it, in the order of ranks; every rank must call it."""

    def __call__(self, one: T) -> list[T]: ...


def share_slots(
    config: CacheConfig,
    describe: Callable[[], tuple[Namespace, KVLayout]],
    *,
    rank: int,
    alike: int,
    num_ranks: int,
    gather: Gather,
) -> tuple[tuple[Namespace, KVLayout], CommonSlots | None]:
    """What describe() says of this rank, and the slots of `alike` neighbouring ranks.

    The slots are None on every rank if any of them cannot have its slots in common. num_ranks: on this node. Every rank must call this,
    since all wait for each other. What describe() raises leaves this when nobody waits for this rank any more.
    """
    if alike == 1:
        return describe(), None
    first = rank - rank % alike
    described: tuple[Namespace, KVLayout] | None = None
    failure: Exception | None = None
    offer: SlotsOffer | None = None
    descriptor: int | None = None
    problem = ""
    try:
        described = describe()
    except Exception as error:  # noqa: BLE001  the other ranks wait, whatever it is
        failure, problem = error, f"rank {rank} has no cache"
    try:
        if described is not None and rank == first:
            namespace, layout = described
            chunk_bytes = slot_bytes(layout, namespace.chunk_tokens // layout.block_tokens)
            offer = offer_slots(count_slots(config, chunk_bytes, rank // alike, num_ranks // alike), chunk_bytes)
            descriptor = offer.descriptor
    except Exception as error:  # noqa: BLE001  as above
        problem = str(error) or type(error).__name__
    offer = gather(offer)[first]
    try:
        if described is not None and offer is not None and rank != first:
            descriptor = take_slots(offer)
    except Exception as error:  # noqa: BLE001  as above
        problem = str(error) or type(error).__name__
    problems = [text for text in gather(problem) if text]
    if offer is not None and descriptor is not None and described is not None and not problems:
        return described, CommonSlots(rank // alike, rank == first, offer.num_slots, descriptor)
    if descriptor is not None:
        os.close(descriptor)
    if failure is not None:
        raise failure
    assert described is not None
    if rank == 0:
        logger.warning("lmc: ranks that hold the same KV store a copy each: %s", "; ".join(problems))
    return described, None
