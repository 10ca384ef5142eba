"""The KV cache groups of a model as vLLM has made them: which of them lmc can store, and as what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmc.cache import config as cache_config
from lmc.cache import parts
from lmc.cache.connectors.vllm.versions import REPORTS_FAILED_REQUESTS
from lmc.cache.parts import Group, Kind, Parts
from lmc.cache.plan import SKIP
from lmc.errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from lmc.cache.config import CacheConfig
    from lmc.cache.transfer.layout import KVLayout

_NULL_BLOCK = 0  # stands for blocks that a request does not hold
_KEEP_ALL = "run it with --disable-hybrid-kv-cache-manager, so that vLLM keeps the KV of all tokens, or with --no-cache"
_NO_CACHE = "run it with --no-cache"
_PROVEN_STATES = ("GDN_ATTN", "MAMBA2")  # by vLLM's names: Mamba 2 and the gated delta rule


@dataclass(frozen=True)
class KVGroups:
    """vLLM's groups in lmc's order: the spine, then the others."""

    order: tuple[int, ...]  # their numbers in vLLM
    groups: tuple[Group, ...]
    layers: tuple[tuple[str, ...], ...]
    details: tuple[str, ...] = ()  # of states, whose shapes no layout shows
    window: int = 0  # tokens that the spine's layers look back, if no group keeps the KV of all tokens

    @property
    def is_hybrid(self) -> bool:
        """Several groups, or one that forgets: a failed load costs a request all that it has loaded."""
        return self.has_leaves or self.window > 0

    @property
    def has_leaves(self) -> bool:
        return len(self.order) > 1

    @property
    def has_states(self) -> bool:
        return any(group.kind == "state" for group in self.groups)

    def chunk_tokens(self, config: CacheConfig) -> int:
        """Raises ConfigError when the configured chunk does not fit."""
        block = self.groups[0].block_tokens
        if self.window:  # a chunk ends before its first block leaves the window
            longest = self.window // block * block
            chunk = cache_config.chunk_tokens_for(config, block)
            if config.chunk_tokens is not None and chunk > longest:
                raise ConfigError(f"chunk_tokens {chunk} is longer than the model's window; use {longest} or less")
            return min(chunk, longest)
        if not self.has_leaves:
            return cache_config.chunk_tokens_for(config, block)
        if config.chunk_tokens is None:
            return parts.chunk_tokens_for(self.groups, cache_config.DEFAULT_CHUNK_TOKENS)
        return Parts(config.chunk_tokens, self.groups).chunk_tokens

    def fingerprint(self, layouts: Sequence[KVLayout]) -> str:
        """What Namespace.layout says: the bytes of every part, and whose they are."""
        if not self.is_hybrid:
            return layouts[0].fingerprint
        described = [
            [group.kind, group.block_tokens, group.span, layout.fingerprint, layers]
            for group, layout, layers in zip(self.groups, layouts, self.layers, strict=True)
        ]
        digest = hashlib.sha256(json.dumps([*described, *self.details, self.window]).encode()).hexdigest()[:32]
        return f"vllm-{len(layouts)}groups-{self.groups[0].block_tokens}t-{digest}"

    def tables(self, of_vllm: Sequence[Sequence[int]]) -> list[list[int]]:
        """A request's blocks in lmc's order of groups; in those that forget tokens, SKIP where it has none."""
        return [
            [SKIP if block == _NULL_BLOCK else block for block in of_vllm[number]]
            if self.window or place > 0
            else list(of_vllm[number])
            for place, number in enumerate(self.order)
        ]

    def states_at(
        self,
        of_vllm: Sequence[Sequence[int]],
        ends: Iterable[int],
        offered: Iterable[tuple[int, int, int]],
    ) -> list[int]:
        """Lengths in blocks at which all groups of states hold the state of these tokens during a step.

        ends: tokens at which the step begins and ends. While vLLM drafts nothing, a state that was left at the end of a block stays in the
        table's block before it, until the table forgets the block. offered: (group, block, tokens) of states that vLLM makes inside a step.
        """
        numbers = [number for number, group in zip(self.order, self.groups, strict=True) if group.kind == "state"]
        size = next(group.block_tokens for group in self.groups if group.kind == "state")
        offers = set(offered)

        def held(number: int, tokens: int, *, at_end: bool) -> bool:
            index = tokens // size - 1
            block = of_vllm[number][index] if index < len(of_vllm[number]) else _NULL_BLOCK
            return block != _NULL_BLOCK and (at_end or (number, block, tokens) in offers)

        at_ends = set(ends)
        lengths = at_ends | {tokens for _, _, tokens in offers}
        return [
            tokens // size
            for tokens in sorted(lengths)
            if tokens > 0
            and tokens % size == 0
            and all(held(number, tokens, at_end=tokens in at_ends) for number in numbers)
        ]


def read_groups(kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> KVGroups:
    """Raises LayoutError when some group keeps what lmc can't store."""
    if not kv_cache_config.kv_cache_groups:
        raise LayoutError(f"the model keeps no KV, so there is nothing to cache; {_NO_CACHE}")
    found = [_group(one) for one in kv_cache_config.kv_cache_groups]
    full = [number for number, group in enumerate(found) if group.kind == "full"]
    if not full and (len(found) > 1 or found[0].kind != "window"):
        raise LayoutError(
            f"a model of which no layer keeps all tokens is cached only if all its layers have the same window; {_NO_CACHE}"
        )
    if not full or len(found) > 1:
        _require_proven(found, kv_cache_config, vllm_config)
    if not full:
        return _of_one_window(found[0], tuple(kv_cache_config.kv_cache_groups[0].layer_names))
    order = (full[0], *(number for number in range(len(found)) if number != full[0]))
    specs = [kv_cache_config.kv_cache_groups[number] for number in order]
    layers = tuple(tuple(one.layer_names) for one in specs)
    details = tuple(_details(one.kv_cache_spec) for one in specs) if "state" in [group.kind for group in found] else ()
    return KVGroups(order, tuple(found[number] for number in order), layers, details)


def is_window(group: Any) -> bool:
    """Whether a group's layers look back over a window."""
    return any(type(one).__name__ == "SlidingWindowSpec" for one in _layer_specs(group.kv_cache_spec))


def _of_one_window(group: Group, layers: tuple[str, ...]) -> KVGroups:
    """All chunks of the model are kept, and a hit loads what its window needs of them."""
    if group.span < group.block_tokens:
        raise LayoutError(
            f"a window of {group.span} tokens is less than a block of {group.block_tokens}; use a smaller --block-size"
        )
    return KVGroups((0,), (Group("full", group.block_tokens),), (layers,), window=group.span)


def _details(spec: Any) -> str:
    states = [one for one in _layer_specs(spec) if type(one).__name__ == "MambaSpec"]
    if not states:
        return ""
    from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout  # not in every tested version

    return f"{[(one.shapes, one.dtypes, one.mamba_type) for one in states]} {get_conv_state_layout()}"


def _layer_specs(spec: Any) -> list[Any]:
    return list(getattr(spec, "kv_cache_specs", {"": spec}).values())


def _group(group: Any) -> Group:
    spec = group.kv_cache_spec
    groups = [_layer_group(one, int(spec.block_size)) for one in _layer_specs(spec)]
    if any(one != groups[0] for one in groups):
        raise LayoutError(f"a model whose layers look back differently within one group is not supported; {_NO_CACHE}")
    return groups[0]


def _layer_group(spec: Any, block_tokens: int) -> Group:
    name = type(spec).__name__
    if getattr(spec, "non_causal", False):
        raise LayoutError(f"a model whose KV depends on later tokens is not supported; {_NO_CACHE}")
    if name in ("FullAttentionSpec", "MLAAttentionSpec"):
        return Group("full", block_tokens)
    kind: Kind
    if name == "SlidingWindowSpec":
        kind, span = "window", int(spec.sliding_window)
    elif name == "ChunkedLocalAttentionSpec":
        kind, span = "local", int(spec.attention_chunk_size)
    elif name == "MambaSpec":
        kind, span = "state", 0
        if spec.mamba_type.name not in _PROVEN_STATES:
            raise LayoutError(f"a model with {spec.mamba_type.name} states is not supported; {_NO_CACHE}")
        if spec.mamba_cache_mode != "align":
            raise LayoutError(
                "a model with states needs vLLM's prefix cache, which is what keeps a state for later; start vLLM with "
                "--enable-prefix-caching, or run it with --no-cache"
            )
    else:
        raise LayoutError(f"a model with {name} KV is not supported; {_NO_CACHE}")
    if getattr(spec, "extra_retained_tokens", 0):
        raise LayoutError(f"a model whose drafts need more than its windows is not supported; {_NO_CACHE}")
    return Group(kind, block_tokens, span)


def _require_proven(groups: Sequence[Group], kv_cache_config: KVCacheConfig, vllm_config: VllmConfig) -> None:
    """Raises LayoutError for what no equality test on the real engine covers, of models with several groups."""
    kinds = [group.kind for group in groups]
    remedy = _NO_CACHE if "state" in kinds else _KEEP_ALL  # vLLM has no other way to keep states
    if len({group.block_tokens for group in groups}) > 1:
        raise LayoutError(f"a model whose groups have blocks of unequal size is not supported; {remedy}")
    if vllm_config.speculative_config is not None:
        kinds_of = "states" if "state" in kinds else "windows"
        raise LayoutError(f"speculative decoding with a model that has {kinds_of} is not supported; {remedy}")
    if not REPORTS_FAILED_REQUESTS:
        raise LayoutError(f"this vLLM cannot be told of a failed load of a model that has several KV groups; {remedy}")
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if not getattr(spec, "prefix_cacheable", True) or not getattr(group, "enable_kv_transfer", True):
            raise LayoutError(
                f"a model that keeps {type(spec).__name__} for one request only is not supported; {_NO_CACHE}"
            )
