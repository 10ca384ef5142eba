"""Which of SGLang's data-parallel engines one is. A stand-in holds what SGLang's ParallelContext holds in a start with several ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lmc.cache.share import Share

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # SGLang warns at its import of what CPUs lack
]


@pytest.mark.parametrize(
    ("found", "nodes", "ranks", "expected"),
    [
        ((1, 0, None, 1), 1, 2, (Share(0, 1), 2)),
        ((1, 0, 3, 4), 1, 2, (Share(3, 4), 2)),  # replicas
        ((4, 2, None, 4), 1, 2, (Share(2, 4), 2)),  # attention in groups
        ((8, 5, None, 8), 2, 2, (Share(5, 4), 2)),
        ((1, 0, None, 1), 2, 16, (Share(0, 1), 8)),  # one engine over two nodes
    ],
)
def test_sglangs_share(
    found: tuple[int, int, int | None, int], nodes: int, ranks: int, expected: tuple[Share, int]
) -> None:
    from lmc.cache.connectors.sglang.parallel import share_of

    names = ("attn_dp_size", "attn_dp_rank", "dp_rank", "num_dp_ranks")
    parallel = SimpleNamespace(**dict(zip(names, found, strict=True)))
    assert share_of(parallel, nodes, ranks, None) == expected
