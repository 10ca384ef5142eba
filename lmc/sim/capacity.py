"""Capacities as users write them: 1000, 5k, 1% of the unique blocks, inf; in blocks, tokens or bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from lmc.errors import ConfigError
from lmc.sim.trace import Trace
from lmc.units import parse_count, parse_size


@dataclass(frozen=True)
class CapacityOptions:
    """What the user gave, as text; each list is parsed for every chunk size anew."""

    blocks: tuple[str, ...] = ()  # counts, shares of the unique blocks ("1%"), "inf"
    tokens: tuple[str, ...] = ()  # "3M"
    sizes: tuple[str, ...] = ()  # "64GiB"
    token_bytes: int = 0  # KV bytes of a token over all ranks, 0 = as the trace says


DEFAULT = CapacityOptions(blocks=("1%", "3%", "10%", "30%", "inf"))


def resolve(options: CapacityOptions, trace: Trace) -> list[float]:
    """Capacities in blocks of the trace, in the order given; infinity stays infinity. Raises ConfigError."""
    return [
        *(_blocks(text, trace) for text in options.blocks),
        *(_whole_blocks(text, parse_count(text), trace.block_tokens, trace) for text in options.tokens),
        *(_whole_blocks(text, parse_size(text), block_bytes(options, trace), trace) for text in options.sizes),
    ]


def warn_small(trace: Trace, capacities: Iterable[float]) -> list[str]:
    """A note when the smallest capacity, in blocks, does not hold the longest request."""
    small = min(capacities, default=math.inf)
    if small >= trace.longest:
        return []
    return [
        f"capacity {small:,.0f} is below the longest request of {trace.source} ({trace.longest:,} blocks): "
        "such a request keeps its first blocks only; raise the capacity to hold whole requests"
    ]


def parse_tier(text: str, trace: Trace, token_bytes: int) -> float:
    """Blocks from a size ("64GiB"), a share of the unique blocks ("5%"), a number of blocks, "inf", or "0" for no tier."""
    if text == "0":
        return 0
    if text[-1:] in "bB":
        size = block_bytes(CapacityOptions(token_bytes=token_bytes), trace)
        return _whole_blocks(text, parse_size(text), size, trace)
    return _blocks(text, trace)


def block_bytes(options: CapacityOptions, trace: Trace) -> int:
    """KV bytes of one block. Raises ConfigError when neither the trace nor the user says it."""
    size = options.token_bytes * trace.block_tokens or trace.block_bytes
    if size == 0:
        raise ConfigError(
            f"{trace.source} does not say how large a block is in bytes; give --token-bytes (KV bytes per token)"
        )
    return size


def _blocks(text: str, trace: Trace) -> float:
    text = text.strip()
    if text == "inf":
        return math.inf
    if text.endswith("%"):
        try:
            share = Fraction(text[:-1]) / 100
        except (ValueError, ZeroDivisionError):
            raise ConfigError(f"capacity {text!r} is not a share; write 1% or 0.5%") from None
        if not 0 < share <= 1:
            raise ConfigError(
                f"capacity {text!r} is no share of the unique blocks; write more than 0% and at most 100%"
            )
        return max(1, int(share * trace.num_unique))
    return _whole_blocks(text, parse_count(text), 1, trace)


def _whole_blocks(text: str, amount: int, per_block: int, trace: Trace) -> int:
    if amount < per_block:
        raise ConfigError(
            f"capacity {text!r} holds no block of {trace.source} ({trace.block_tokens} tokens each); choose a larger one"
        )
    return amount // per_block
