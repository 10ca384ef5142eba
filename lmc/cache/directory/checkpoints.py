"""What a request of a model with several kinds of KV (lmc.cache.parts) needs and keeps beside its chunks."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.cache.directory.directory import Directory, Found
from lmc.cache.directory.misses import Miss
from lmc.cache.keys import ChunkKey
from lmc.cache.parts import Leaf, Parts, Step

_ASKED = 2  # checkpoints inside what was found of a prompt
_ASKED_STATES = 16  # lengths at which a state may be: it is where a step ended


class Checkpoints:
    """computed: tokens that the engine holds itself. Lengths are in chunks."""

    def __init__(self, parts: Parts, directory: Directory) -> None:
        self.hit = 0  # of the last lookup
        self._junction = 0  # what was found, if a hit could not use all of it
        self._parts = parts
        self._directory = directory

    def needed(self, keys: Sequence[ChunkKey], end: int, computed: int) -> list[Leaf]:
        """What a hit of `end` chunks needs beside them."""
        return list(self._parts.leaves(keys, end, computed))

    def longest(self, keys: Sequence[ChunkKey], end: int, computed: int, now: float, *, in_host: bool) -> int:
        """The longest hit of at most `end` chunks whose leaves can be read, or are in host memory; at least what the engine holds."""
        least = min(computed // self._parts.chunk_tokens, end)
        parts, readable = self._parts, self._directory.readable
        for leaf in reversed(list(parts.leaves(keys, end, computed, parts.lasting))):
            if leaf.chunk < end and not readable([leaf], now, in_host=in_host):
                end = leaf.chunk
        for length in range(end, least, -1):
            if readable(parts.leaves(keys, length, computed, parts.passing), now, in_host=in_host):
                return length
        return least

    def usable(self, found: Found, keys: Sequence[ChunkKey], computed: int, now: float) -> Found:
        """What of the chunks that were found a hit can use."""
        length = self.longest(keys, found.num_chunks, computed, now, in_host=False)
        self.hit = length
        self._junction = found.num_chunks if length < found.num_chunks else 0
        return found if length == found.num_chunks else Found(found.tiers[:length], Miss.NO_CHECKPOINT)

    def unknown(self, keys: Sequence[ChunkKey], end: int, computed: int, now: float) -> tuple[ChunkKey, ...]:
        """The leaves that others may have stored: of a hit of all chunks found, and of the last checkpoints inside them."""
        ends, interval = [end], self._parts.interval
        if interval is not None:
            last = (end - 1) // interval
            ends += [number * interval for number in range(last, max(last - _ASKED, 0), -1)]
        if self._parts.has_states:
            ends += range(end - 1, max(end - _ASKED_STATES, 0), -1)
        held, parts = computed // self._parts.chunk_tokens, self._parts
        if end <= held:
            return ()
        asked = {
            leaf.key: leaf for leaf in parts.leaves(keys, end, computed, parts.lasting)
        }  # shorter hits need some of them
        for length in ends:
            if length > held:
                asked.update((leaf.key, leaf) for leaf in parts.leaves(keys, length, computed, parts.passing))
        return tuple(key for key, leaf in asked.items() if not self._directory.readable([leaf], now))

    def kept(self, keys: Sequence[ChunkKey], end: int, num_prompt: int, step: Step) -> list[Leaf]:
        """The leaves to keep now: of the prompt's end, of its hit, of where it parted from what is stored, and of every so many chunks.

        What they are made of is in the engine's blocks during this step, which computes up to chunk `end`. Of a model with states each
        wanted end is served by the last state before it.
        """
        size, interval = self._parts.chunk_tokens, self._parts.interval
        prompt = num_prompt // size
        ends = (prompt, (num_prompt - 1) // size, self._junction, self.hit)

        def is_wanted(length: int) -> bool:
            return length in ends or length > prompt or (interval is not None and length % interval == 0)

        computed = range(end, max(-(-step.num_before // size), 1) - 1, -1)
        wanted: dict[ChunkKey, Leaf] = {}
        if not self._parts.has_states:
            chosen = [length for length in computed if is_wanted(length)]
        else:
            chosen = []
            after = end + 1
            for length in computed:
                if length in step.states:  # the last one before these
                    if any(map(is_wanted, range(length, after))):
                        chosen.append(length)
                    after = length
        for length in chosen:
            wanted.update((leaf.key, leaf) for leaf in self._parts.leaves(keys, length))
        return list(wanted.values())

    def pinned(self, keys: Sequence[ChunkKey], num_tokens: int) -> list[ChunkKey]:
        """The leaves to pin with a prompt of so many tokens."""
        ends = {self.hit, len(keys), (num_tokens - 1) // self._parts.chunk_tokens}
        leaves = [leaf.key for end in ends if 0 < end <= len(keys) for leaf in self._parts.leaves(keys, end)]
        return list(dict.fromkeys(leaves))
