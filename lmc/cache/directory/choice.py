"""How much of a hit is loaded and how much is computed, whichever is quicker for this request. The simulator runs the same function.

A prompt is computed from the end of what was loaded, so what is loaded is a front of the hit: what lies in host memory, say, without what
lies on a slow disk behind it. No engine can compute the front while the back is loaded: it takes a request in with one number of tokens
that it need not compute, and they are the first. Within chunks of one tier it is best to load all or none, since each further token
costs as much to load and more to compute than the one before. What is computed although it is stored below is kept in host memory from
then on, so nothing needs to be staged for the requests that follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from lmc.cache.directory.directory import Directory
from lmc.cache.directory.holds import Ticket
from lmc.cache.directory.places import HOST
from lmc.cache.directory.speeds import Speeds
from lmc.cache.keys import ChunkKey

_TRIED_CHUNKS = 8  # enough for a tier to show its bandwidth beside its latency


class Choice(NamedTuple):
    """Of the chunks found, those before `load_end` are loaded. Those from there to `try_end` are staged as well, and nobody waits for them:
    they show how fast a tier is that was left alone."""

    load_end: int
    try_end: int


def choose(
    tiers: Sequence[str], computed: int, num_tokens: int, chunk_tokens: int, speeds: Speeds, now: float
) -> Choice:
    """tiers: of each chunk found, from the start of the prompt. computed: tokens that the engine has itself.

    Before a pass of the engine was measured, everything is loaded.
    """
    first = min(computed // chunk_tokens, len(tiers))
    quickest = speeds.computing(computed, num_tokens - computed)
    if quickest is None:
        return Choice(len(tiers), len(tiers))
    load_end = end = first
    loads: Counter[str] = Counter()
    for tier, run in groupby(tiers[first:]):
        length = sum(1 for _ in run)
        end += length
        loads[tier] += length
        position = max(end * chunk_tokens, computed)
        wait = max((speeds.loading(name, chunks, now) for name, chunks in loads.items() if name != HOST), default=0.0)
        rest = speeds.computing(position, num_tokens - position) or 0.0
        seconds = wait + speeds.loading(HOST, end - first, now) + rest
        if seconds <= quickest:
            load_end, quickest = end, seconds
    left = next((index for index in range(load_end, len(tiers)) if tiers[index] != HOST), None)
    if left is None or not speeds.to_be_tried(tiers[left], now):
        return Choice(load_end, load_end)
    return Choice(load_end, min(left + _TRIED_CHUNKS, len(tiers)))


def leave_slow_chunks(
    directory: Directory,
    keys: Sequence[ChunkKey],
    tiers: Sequence[str],
    sizes: tuple[int, int, int],
    tenant: str,
    now: float,
) -> tuple[int, list[Ticket]]:
    """Choose for a request with these keys. sizes: tokens that the engine has itself, of the prompt, of a chunk.

    Returns the end of the chunks to load, and the tickets of those that are staged to try a tier.
    """
    choice = choose(tiers, *sizes, directory.speeds, now)
    tried: list[Ticket] = []
    if choice.try_end > choice.load_end:
        tried = directory.stage(keys[: choice.try_end], now, first=choice.load_end, tenant=tenant)
    directory.pass_over(keys[choice.load_end : len(tiers)])
    return choice.load_end, tried
