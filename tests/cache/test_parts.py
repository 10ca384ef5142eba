"""Chunk sizes that fit a model's groups, intervals between checkpoints, and names of parts."""

from __future__ import annotations

import pytest

from lmc.cache.keys import ChunkKey
from lmc.cache.parts import Group, Parts, chunk_tokens_for, fits, interval, leaf_key
from lmc.errors import ConfigError

FULL = Group("full", 16)


@pytest.mark.parametrize(
    ("groups", "chunk"),
    [
        ((FULL, Group("window", 16, 128)), 128),  # gpt-oss
        ((FULL, Group("window", 16, 1024)), 128),  # Gemma 3
        ((Group("full", 32), Group("window", 512, 512)), 512),  # Gemma 4: blocks of unequal size
        ((FULL, Group("window", 16, 2047)), 128),  # Phi-3 counts the token itself
        ((FULL, Group("window", 16, 1000)), 144),  # 1,008 tokens in whole blocks
        ((FULL, Group("local", 16, 8192)), 128),  # Llama 4
        ((Group("full", 1056), Group("window", 48, 96)), 1056),
        ((Group("full", 288), Group("state", 288), Group("state", 288)), 288),
    ],
)
def test_the_chunk_is_the_smallest_of_at_least_128_tokens_that_fits(groups: tuple[Group, ...], chunk: int) -> None:
    assert chunk_tokens_for(groups, 128) == chunk
    assert not any(fits(groups, size) for size in range(128, chunk))
    assert Parts(chunk, groups).chunk_tokens == chunk


def test_a_chunk_that_does_not_fit_is_refused_by_naming_those_that_do() -> None:
    groups = (FULL, Group("window", 16, 1024))
    with pytest.raises(ConfigError, match=r"chunk_tokens 384 does not fit .* use 256 or 512"):
        Parts(384, groups)
    with pytest.raises(ConfigError, match="use 32"):
        Parts(8, (FULL, Group("window", 32, 32)))
    for size in (32, 128):
        with pytest.raises(ConfigError, match=r"use 64$"):
            Parts(size, (Group("full", 64), Group("state", 64)))


def test_chunks_of_states_are_their_blocks() -> None:
    groups = (Group("full", 64), Group("state", 64))
    assert chunk_tokens_for(groups, 128) == 64
    parts = Parts(64, groups)
    assert parts.needed(1, 6) == range(5, 6)
    assert parts.blocks == (1, 1)
    assert interval(parts, (100, 700), None) == 28  # a state costs as much as seven chunks


def test_a_window_needs_its_last_chunks_and_a_local_chunk_what_has_begun() -> None:
    parts = Parts(128, (FULL, Group("window", 16, 256), Group("local", 16, 512), Group("window", 16, 40)))
    assert parts.needed(0, 6) == range(6)
    assert parts.needed(1, 6) == range(4, 6)
    assert parts.needed(1, 1) == range(1)
    assert parts.needed(2, 6) == range(4, 6)
    assert list(parts.needed(2, 4)) == []
    assert parts.needed(3, 6) == range(5, 6)
    assert parts.blocks == (8, 8, 8, 3)


def test_leaves_hang_on_the_spine_and_have_names_of_their_own() -> None:
    keys = [ChunkKey(bytes([number]) * 32) for number in range(6)]
    parts = Parts(128, (FULL, Group("window", 16, 256), Group("window", 16, 128)))
    leaves = list(parts.leaves(keys, 6))
    assert [(leaf.group, leaf.chunk) for leaf in leaves] == [(1, 5), (1, 4), (2, 5)]
    assert all(leaf.parent == keys[leaf.chunk] and leaf.key == leaf_key(leaf.parent, leaf.group) for leaf in leaves)
    assert len({leaf.key for leaf in leaves} | set(keys)) == 9
    assert [(leaf.group, leaf.chunk) for leaf in parts.leaves(keys, 6, computed=5 * 128)] == [(1, 5), (2, 5)]
    assert [(leaf.group, leaf.chunk) for leaf in parts.leaves(keys, 6, computed=5 * 128 - 1)] == [
        (1, 5),
        (1, 4),
        (2, 5),
    ]


def test_checkpoints_inside_a_prompt_add_a_quarter_to_the_spine() -> None:
    """gpt-oss-120b: a window costs as much as 128 tokens of the spine. Gemma 3 27B: five windows of 1,024 tokens and a fifth of one."""
    gpt = Parts(128, (FULL, Group("window", 16, 128)))
    assert interval(gpt, (100, 100), None) == 4
    gemma = Parts(128, (FULL, *[Group("window", 16, 1024)] * 6))
    assert interval(gemma, (100, 100, 100, 100, 100, 100, 20), None) == 167
    assert interval(gemma, (100,) * 7, 1000) == 8
    assert interval(gemma, (100,) * 7, 1) == 1
