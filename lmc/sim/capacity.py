"""Parses capacities as users write them: 1000, 5k, 1% of the unique trace blocks, inf; in trace blocks, tokens or bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from lmc.errors import ConfigError
from lmc.sim.trace import Trace
from lmc.units import parse_count, parse_size


@dataclass(frozen=True)
class CapacityOptions:
    """Capacities as text. Their values depend on the trace and the chunk size."""

    blocks: tuple[str, ...] = ()  # counts, shares of the unique trace blocks ("1%"), "inf"
    tokens: tuple[str, ...] = ()  # "3M"
    sizes: tuple[str, ...] = ()  # "64GiB"
    token_bytes: int = 0  # KV bytes of a token over all ranks; 0: the trace says it

    @property
    def text(self) -> str:
        """All of them, as they were given; tokens have their unit."""
        return ",".join((*self.blocks, *(f"{tokens} tokens" for tokens in self.tokens), *self.sizes))


DEFAULT = CapacityOptions(blocks=("1%", "3%", "10%", "30%", "inf"))


def resolve(options: CapacityOptions, trace: Trace) -> list[float]:
    """Capacities in trace blocks, in the given order; "inf" becomes infinity. Raises ConfigError."""
    return [
        *several(options.blocks, lambda text: _blocks(text, trace)),
        *(_whole_blocks(text, parse_count(text), trace.block_tokens, trace) for text in options.tokens),
        *(_whole_blocks(text, parse_size(text), block_bytes(options, trace), trace) for text in options.sizes),
    ]


def each_capacity(options: CapacityOptions) -> list[CapacityOptions]:
    """Options of one capacity each, in the order of resolve(). Raises ConfigError for one that is none for any trace."""
    for text in options.blocks:
        _share(text)
    for text in options.tokens:
        parse_count(text)
    for text in options.sizes:
        parse_size(text)
    known = options.token_bytes
    return [
        *(CapacityOptions(blocks=(text,), token_bytes=known) for text in options.blocks),
        *(CapacityOptions(tokens=(text,), token_bytes=known) for text in options.tokens),
        *(CapacityOptions(sizes=(text,), token_bytes=known) for text in options.sizes),
    ]


def several(texts: Iterable[str], parse: Callable[[str], float]) -> list[float]:
    """The parsed sizes. Of shares that are the same number, as those of a short trace may be, only the first is taken."""
    found: list[float] = []
    shares: set[float] = set()
    for text in texts:
        size = parse(text)
        if text.strip().endswith("%"):
            if size in shares:
                continue
            shares.add(size)
        found.append(size)
    return found


def warn_small(trace: Trace, capacities: Iterable[float]) -> list[str]:
    """A note if the smallest capacity, in trace blocks, does not hold the longest request; else nothing."""
    small = min(capacities, default=math.inf)
    if small >= trace.longest:
        return []
    return [
        f"capacity {small:,.0f} is below the longest request of {trace.source} ({trace.longest:,} trace blocks); "
        "only the first trace blocks of such a request are kept; raise the capacity to hold whole requests"
    ]


def parse_tier(text: str, trace: Trace, token_bytes: int) -> float:
    """Trace blocks from a size ("64GiB"), a share of the unique ones ("5%"), a number, "inf", or "0" for no tier. Raises ConfigError."""
    if text == "0":
        return 0
    if text[-1:] in "bB":
        size = block_bytes(CapacityOptions(token_bytes=token_bytes), trace)
        return _whole_blocks(text, parse_size(text), size, trace)
    return _blocks(text, trace)


def block_bytes(options: CapacityOptions, trace: Trace) -> int:
    """KV bytes of one trace block. Raises ConfigError if neither the trace nor the user says how many."""
    size = options.token_bytes * trace.block_tokens or trace.block_bytes
    if size == 0:
        raise ConfigError(
            f"{trace.source} does not say how many bytes a trace block has; give --token-bytes (KV bytes per token)"
        )
    return size


def _blocks(text: str, trace: Trace) -> float:
    share = _share(text)
    if share is not None:
        return max(1, int(share * trace.num_unique))
    return math.inf if text.strip() == "inf" else _whole_blocks(text, parse_count(text), 1, trace)


def _share(text: str) -> Fraction | None:
    """The share of the unique trace blocks, or None for a number of them or inf. Raises ConfigError."""
    text = text.strip()
    if not text.endswith("%"):
        if text != "inf":
            parse_count(text)
        return None
    try:
        share = Fraction(text[:-1]) / 100
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"capacity {text!r} is not a share; write 1% or 0.5%") from None
    if not 0 < share <= 1:
        raise ConfigError(
            f"capacity {text!r} is no share of the unique trace blocks; write more than 0% and at most 100%"
        )
    return share


def _whole_blocks(text: str, amount: int, per_block: int, trace: Trace) -> int:
    if amount < per_block:
        raise ConfigError(
            f"capacity {text!r} holds no trace block of {trace.source} ({trace.block_tokens} tokens each); choose a larger one"
        )
    return amount // per_block
