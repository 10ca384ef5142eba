"""Which of SGLang's data-parallel engines this one is, and how many there are on its node."""

from __future__ import annotations

from typing import Any

from lmc.cache.share import Share


def share_of(parallel: Any, nodes: int, num_ranks: int, asked: int | None) -> tuple[Share, int]:
    """This engine's share, and how many of its num_ranks ranks are on this node. parallel: SGLang's ParallelContext.

    With data-parallel attention the engines are groups of ranks inside one world, else they are worlds of their own. asked: the setting
    engines_on_node.
    """
    rank = parallel.attn_dp_rank if parallel.attn_dp_size > 1 else parallel.dp_rank
    engines = max(1, int(parallel.num_dp_ranks))
    here = max(1, engines // nodes)
    ranks_here = max(1, engines * num_ranks // nodes // here)
    return Share(int(rank or 0), here if asked is None else asked), ranks_here
