"""The names of vLLM's and SGLang's counters. Which engine runs is seen from the names that it publishes.

SGLang publishes a counter only once it has grown, and counts the tokens that lmc loaded among its own cached ones; lmc's counter says how
many SGLang held itself.
"""

from __future__ import annotations

from typing import NamedTuple

from lmc.bench.counters import Counters, difference

VLLM_LOOKED_UP, VLLM_HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
VLLM_EXTERNAL_HITS = (
    "vllm:external_prefix_cache_hits_total"  # what vLLM loaded through its connector, whichever that is
)
SGLANG_PROMPTS, SGLANG_CACHED = "sglang:prompt_tokens_total", "sglang:cached_tokens_total"
LMC_DEVICE = "lmc_device_tokens_total"
OWN_WARM_UP_TOKENS = 64  # SGLang sends itself a short prompt when it starts
REPORTED = ("lmc_", "vllm:prefix_cache", "vllm:external_prefix_cache", SGLANG_PROMPTS, SGLANG_CACHED)


class Pool(NamedTuple):
    """An engine's own KV space, in blocks (SGLang: pages). `is_exact`: it evicts by LRU and whole blocks, as the simulator does."""

    block_tokens: int
    num_blocks: int
    is_exact: bool


def pool(counters: Counters) -> Pool | None:
    """The KV space that the counters describe; None if they do not describe it."""
    size = counters.label("vllm:cache_config_info", "block_size")
    blocks = counters.label("vllm:cache_config_info", "num_gpu_blocks")
    if size and blocks:
        return Pool(int(size), int(blocks), True)
    page, pages = counters.largest("sglang:page_size"), counters.largest("sglang:num_pages")
    return Pool(int(page), int(pages), False) if page and pages else None


def looked_up(now: Counters, before: Counters) -> float | None:
    """Prompt tokens for which the engine asked its own cache."""
    grown = difference(now, before, VLLM_LOOKED_UP)
    return difference(now, before, SGLANG_PROMPTS) if grown is None else grown


def looked_up_at_start(counters: Counters) -> float:
    """The same since the engine started, without the prompt that SGLang sends itself."""
    tokens = counters.total(SGLANG_PROMPTS) or 0.0
    return (counters.total(VLLM_LOOKED_UP) or 0.0) + (tokens if tokens > OWN_WARM_UP_TOKENS else 0.0)


def device_hits(now: Counters, before: Counters) -> float | None:
    """Prompt tokens that the engine's own cache held; None if they were not counted."""
    hits = difference(now, before, VLLM_HITS)
    if hits is None and now.total(SGLANG_PROMPTS) is not None:
        hits = difference(now, before, LMC_DEVICE)
        if hits is None:
            hits = difference(now, before, SGLANG_CACHED) or 0.0
    return hits
