"""Which of vLLM's data-parallel engines this one is, and how many there are on its node."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmc.arguments import count
from lmc.cache.share import Share

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def share_of(vllm_config: VllmConfig, asked: int | None, arguments: Sequence[str] | None = None) -> Share:
    """asked: the setting engines_on_node. arguments: vLLM's command line, by default this process's; its children inherit it."""
    parallel = vllm_config.parallel_config
    rank = int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
    if asked is not None:
        return Share(rank, asked)
    if parallel.data_parallel_size > 1:
        return Share(rank, max(1, parallel.data_parallel_size_local))
    # Engines of a model without experts are told that they are alone; only the name of the transfer gives them away.
    if not str(vllm_config.kv_transfer_config.engine_id).endswith(f"_dp{rank}"):
        return Share(rank)
    found = _local_engines(sys.argv if arguments is None else arguments)
    if found is None:
        logger.warning(
            "lmc: engine %d is one of several, and it is unknown how many of them run on this node; each takes the whole of host.capacity "
            "and disk.capacity; set engines_on_node",
            rank,
        )
    return Share(rank, found or 1)


def _local_engines(arguments: Sequence[str]) -> int | None:
    if count(("--data-parallel-rank", "-dpn"), arguments) is not None:
        return None  # each engine is started by itself
    local = count(("--data-parallel-size-local", "-dpl"), arguments)
    return local or count(("--data-parallel-size", "-dp"), arguments)
