"""Parts: what a model with several kinds of KV keeps of each chunk, and what a hit of so many chunks needs of it.

An engine splits such a model's layers into *groups*, each with blocks of its own. A *part* is a chunk of one group. The first group, in
which every token counts, is the *spine*: its parts are the chunks of a plain model, under the same keys. Parts of the other groups are
*leaves*: each hangs on the spine's part of the same chunk. A *checkpoint* is all the leaves that a hit ending at one chunk needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from lmc.cache.keys import ChunkKey
from lmc.errors import ConfigError

Kind = Literal["full", "window", "local", "state"]

SPINE = 0
_CHECKPOINT_SHARE = 0.25  # of the spine's bytes that checkpoints inside a prompt may add


@dataclass(frozen=True)
class Group:
    """How one group's layers look back.

    full     at every token before them
    window   at the last `span` tokens, their own included
    local    at the tokens since the last multiple of `span`
    state    at one state of fixed size, made of all tokens before it; it exists only where the engine keeps one, at the end of a block
    """

    kind: Kind
    block_tokens: int
    span: int = 0

    def first_needed(self, num_tokens: int) -> int:
        """The first token, at the start of a block, of what a request needs that goes on behind num_tokens tokens, whole blocks of them.

        num_tokens itself if it needs nothing.
        """
        if self.kind == "full":
            start = 0
        elif self.kind == "window":
            start = max(0, num_tokens - self.span + 1)
        elif self.kind == "state":
            start = max(0, num_tokens - self.block_tokens)
        else:
            start = num_tokens // self.span * self.span
        return min(start // self.block_tokens * self.block_tokens, num_tokens)


class Leaf(NamedTuple):
    """A part of another group than the spine's."""

    key: ChunkKey
    parent: ChunkKey  # the spine's part of the same chunk
    group: int
    chunk: int  # the index of its chunk


class Step(NamedTuple):
    """What a step of the engine begins with, for a request."""

    num_before: int = 0  # tokens that had valid KV before it
    states: Collection[
        int
    ] = ()  # lengths in chunks at which the blocks hold the states of a model that has some, behind the step


ANY_STEP = Step()


@dataclass(frozen=True)
class Parts:
    """groups: the spine, then the others. A checkpoint is stored at least every `interval` chunks; None: only where a prompt ends or parts.

    Raises ConfigError when a hit of whole chunks would need some blocks of a part and not others.
    """

    chunk_tokens: int
    groups: tuple[Group, ...]
    interval: int | None = None

    def __post_init__(self) -> None:
        if not fits(self.groups, self.chunk_tokens):
            states = sorted({group.block_tokens for group in self.groups if group.kind == "state"})
            right = [str(size) for size in states or (self._neighbour(-1), self._neighbour(1)) if size]
            raise ConfigError(
                f"chunk_tokens {self.chunk_tokens} does not fit the blocks and windows of this model; use {' or '.join(right)}"
            )

    def _neighbour(self, step: int) -> int:
        size = self.chunk_tokens + step
        while size > 0 and not fits(self.groups, size):
            size += step
        return max(size, 0)

    @cached_property
    def has_leaves(self) -> bool:
        return len(self.groups) > 1

    @cached_property
    def has_states(self) -> bool:
        return any(group.kind == "state" for group in self.groups)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """By group: how many blocks a part has. They are the last ones of its chunk."""
        return tuple(
            min(self.chunk_tokens, _reach(group, self.chunk_tokens)) // group.block_tokens for group in self.groups
        )

    @cached_property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """By group: blocks of a part, blocks of a chunk, tokens of a block."""
        return tuple(
            (blocks, self.chunk_tokens // group.block_tokens, group.block_tokens)
            for blocks, group in zip(self.blocks, self.groups, strict=True)
        )

    def needed(self, group: int, num_chunks: int) -> range:
        """The chunks of whose parts a hit of num_chunks chunks needs this group's."""
        end = num_chunks * self.chunk_tokens
        first = self.groups[group].first_needed(end)
        return range(first // self.chunk_tokens if first < end else num_chunks, num_chunks)

    @cached_property
    def lasting(self) -> tuple[int, ...]:
        """The groups behind the spine in which every token counts, too."""
        return tuple(number for number, group in enumerate(self.groups) if number != SPINE and group.kind == "full")

    @cached_property
    def passing(self) -> tuple[int, ...]:
        """The other groups behind the spine."""
        return tuple(number for number, group in enumerate(self.groups) if group.kind != "full")

    def leaves(
        self, keys: Sequence[ChunkKey], num_chunks: int, computed: int = 0, groups: Sequence[int] | None = None
    ) -> Iterator[Leaf]:
        """What a hit of num_chunks chunks needs beside the spine, less what lies in `computed` tokens that the engine holds itself.

        groups: only these.
        """
        for group in range(1, len(self.groups)) if groups is None else groups:
            for index in reversed(self.needed(group, num_chunks)):
                if (index + 1) * self.chunk_tokens > computed:
                    yield Leaf(leaf_key(keys[index], group), keys[index], group, index)


def leaf_key(spine: ChunkKey, group: int) -> ChunkKey:
    """The name of a group's part of the chunk with this name: its last byte is another one, so that no two parts have one name."""
    return ChunkKey(spine[:-1] + bytes((spine[-1] ^ group,)))


def fits(groups: Sequence[Group], chunk_tokens: int) -> bool:
    """Whether chunks are whole blocks of every group, and what a hit of whole chunks needs of a part is the same wherever it ends."""
    for group in groups:
        reach = _reach(group, chunk_tokens)
        if chunk_tokens % group.block_tokens or (reach % chunk_tokens and reach > chunk_tokens):
            return False
        if group.kind == "local" and group.span % chunk_tokens and chunk_tokens % group.span:
            return False
        if group.kind == "state" and group.block_tokens != chunk_tokens:
            return False  # the engine keeps states at the ends of blocks: in a larger chunk most of them would be of no use
    return True


def chunk_tokens_for(groups: Sequence[Group], at_least: int) -> int:
    """The smallest chunk of at least so many tokens that fits; of states, their block."""
    for group in groups:
        if group.kind == "state":
            return group.block_tokens
    blocks = [group.block_tokens for group in groups]
    size = max(blocks)
    while any(size % block for block in blocks):
        size += max(blocks)
    chunk = size * -(-at_least // size)
    while not fits(groups, chunk):
        chunk += size
    return chunk


def parts_of(
    groups: Sequence[Group], chunk_tokens: int, part_bytes: Sequence[int], checkpoint_tokens: int | None
) -> Parts:
    """The parts of a model, with the interval that interval() says if there are several groups. Raises ConfigError as Parts does."""
    parts = Parts(chunk_tokens, tuple(groups))
    return replace(parts, interval=interval(parts, part_bytes, checkpoint_tokens)) if parts.has_leaves else parts


def interval(parts: Parts, part_bytes: Sequence[int], checkpoint_tokens: int | None) -> int | None:
    """Chunks from one checkpoint inside a prompt to the next. checkpoint_tokens None: they add a quarter to the spine's bytes."""
    if checkpoint_tokens is not None:
        return max(1, -(-checkpoint_tokens // parts.chunk_tokens))
    far = 1 + max((group.span for group in parts.groups), default=0) // parts.chunk_tokens * 2
    sizes = [
        part_bytes[number] * max(len(parts.needed(number, end)) for end in range(1, far + 1))
        for number, group in enumerate(parts.groups)
        if group.kind != "full"
    ]
    return max(1, -(-sum(sizes) // max(1, int(part_bytes[SPINE] * _CHECKPOINT_SHARE))))


def _reach(group: Group, chunk_tokens: int) -> int:
    """How many tokens before its end, in whole blocks, a hit of whole chunks may need."""
    if group.kind == "full":
        return chunk_tokens
    if group.kind == "state":
        return group.block_tokens
    if group.kind == "window":
        return -(-(group.span - 1) // group.block_tokens) * group.block_tokens
    return group.span if group.span > chunk_tokens else 0
