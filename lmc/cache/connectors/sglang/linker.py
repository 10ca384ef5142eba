"""The linker itself: SGLang's calls, in SGLang's terms, on the thread of its scheduler. Each is guarded: see guard.py."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker
from sglang.srt.runtime_context import get_parallel
from torch import distributed

from lmc.cache.config import CacheConfig
from lmc.cache.connectors.base import LocalCache
from lmc.cache.connectors.edge import Edge
from lmc.cache.connectors.guard import complain, contain, guarded
from lmc.cache.connectors.sglang.copies import Copies
from lmc.cache.connectors.sglang.parallel import share_of
from lmc.cache.connectors.sglang.prompts import PageKeys, Prompt, unsupported
from lmc.cache.connectors.sglang.waiting import agree, watch_queue
from lmc.cache.connectors.sglang.weights import EngineWeights
from lmc.cache.keys import Namespace, hashed_name
from lmc.cache.observe.stats import describe_tiers
from lmc.cache.plan import COPY, SKIP, Plan, Report, operations_of, request_name
from lmc.cache.settings import load_settings
from lmc.cache.share import of_engine, part_of
from lmc.cache.transfer.layout import KVLayout
from lmc.errors import ConfigError, LayoutError, LmcError

logger = logging.getLogger(__name__)

_PROMISE_SECONDS = (
    10.0  # SGLang asks again before each load, so a promise needs to hold for one round of its scheduler only
)
_YIELD_SECONDS = 0.0002  # SGLang's loop spins; where all requests wait for our threads, these need the interpreter more
_NO_TENANTS = "on SGLang a tenant is a cache_salt, which SGLang's own cache keeps apart too"
_PAGES_REMEMBERED = 4  # times the pages that the engine and the host tier hold


class LmcLinker(UnifiedCacheLinker):  # type: ignore[misc]  # SGLang ships no types that mypy follows here
    """Settings come from linker_extra_config: "settings" (dotted keys) over LMC_* variables over the file "config"."""

    def __init__(
        self,
        server_args: Any,  # ServerArgs
        params: Any,  # CacheInitParams
        *,
        components: set[Any],  # ComponentType
        extra_config: dict[str, Any] | None,
        forward_stream: Any,  # torch.cuda.Stream or None
    ) -> None:
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        self.forward_stream = forward_stream
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerWiseLoadCounter(pool.layer_num)
        self._page = int(params.page_size)
        self._cache: LocalCache | None = None
        self._prompts: dict[str, Prompt | None] = {}  # of waiting and loading requests; None: not for the cache
        self._queued: dict[
            str, Plan
        ] = {}  # each kept by the worker (see CacheWorker.keep), with the loads of one request
        self._weights_unsure = False  # SGLang may have changed them since they were read
        self._refused = False  # a load was accepted on this rank that it cannot do
        self._loading: dict[int, list[str]] = {}  # batch -> requests
        self._batch: int | None = None  # that is being started
        self._copies: Copies | None = None
        self._rank, self._ranks = _rank(params)
        asked = _settings(extra_config or {})
        self.strict = asked.strict
        self._tenant = hashed_name(asked.tenant)
        self._weights = EngineWeights(server_args, pool)
        self._edge = Edge(asked, "custom_params", _NO_TENANTS)
        try:
            self._weights.start()
            share, here = share_of(get_parallel(), server_args.nnodes, self._ranks, asked.engines_on_node)
            config = of_engine(asked, share)
            _check(server_args, params, components)
            layout = _layout(pool, self._page)
            namespace = Namespace(
                engine="sglang",
                model=self._weights.model,
                revision=str(server_args.revision or ""),
                kv_dtype=f"{server_args.dtype}/{pool.dtype}",
                layout=layout.fingerprint,
                chunk_tokens=_chunk_tokens(config, self._page),
                tp_size=self._ranks,
            )
            watch_queue(self._hold)
            self._cache = cache = LocalCache(
                config, namespace, layout, rank=self._rank, num_ranks=here, share=share, part=part_of(asked, share)
            )
            host_slots = cache.scheduler.directory.usage()["host"][1]
            self._pages_remembered = _PAGES_REMEMBERED * (layout.num_blocks + host_slots)
            self._pages = PageKeys(self._pages_remembered)
            self._copies = Copies(cache.worker, self.layer_done_counter)
            tiers = describe_tiers(cache.scheduler.stats())
            url = cache.scheduler.metrics_url
            logger.info("lmc: cache on, %d tokens per chunk, %s, metrics at %s", self._page, tiers, url)
        except Exception as error:  # see guard.py
            if self.strict:
                raise
            if isinstance(error, LmcError | OSError):
                logger.error("lmc: running WITHOUT the cache: %s", error)
            else:
                complain("fault at the start; the engine runs WITHOUT the cache", error)
            contain(self.end_cache)

    def end_cache(self) -> None:
        """No page is read or written any more when this returns; SGLang is told of every store as of one that failed."""
        cache, self._cache = self._cache, None
        self._prompts.clear()
        if self._copies is not None:
            contain(self._copies.give_up)
        if cache is not None:
            cache.close(0.0)  # the engine waits

    # Waiting requests (see waiting.py)

    def _hold(self, waiting: list[Any], tree_cache: Any) -> set[str]:
        """Meet new requests, let go of those that left the queue, and name those that wait for a lower tier."""
        if self._weights_unsure and waiting:
            self._read_weights()
        asking = self._asking(waiting, tree_cache)
        if self._ranks > 1 and waiting:
            ready = agree(tree_cache, [request.rid not in asking for request in waiting])
            return {request.rid for request, go in zip(waiting, ready, strict=True) if not go}
        return asking

    @guarded(lambda self: None)
    def _read_weights(self) -> None:
        """On all ranks, also one without a cache: they read their weights together."""
        self._weights_unsure = False
        if self._weights.changed() and self._cache is not None:
            self._rename(self._cache, self._weights.model)

    @guarded(lambda self, waiting, tree_cache: set())
    def _asking(self, waiting: list[Any], tree_cache: Any) -> set[str]:
        if self._cache is None:
            return set()
        asking = self._ask(self._cache, waiting, tree_cache)
        if asking and len(asking) == len(waiting):
            time.sleep(_YIELD_SECONDS)
        return asking

    def _ask(self, cache: LocalCache, waiting: list[Any], tree_cache: Any) -> set[str]:
        if any(prompt is not None and prompt.waiting for prompt in self._prompts.values()):
            self._pump(cache)
        present = {request.rid for request in waiting}
        for rid in [rid for rid in self._prompts if rid not in present]:
            self._leave(cache, rid)
        for request in waiting:
            if request.rid not in self._prompts:
                self._prompts[request.rid] = prompt = self._meet(cache, request)
                if prompt is not None:
                    request.init_next_round_input(tree_cache, cow_mamba=False)  # calls lookup()
            elif (prompt := self._prompts[request.rid]) is not None and prompt.waiting:
                gain = cache.scheduler.lookup(request.rid, prompt.tokens, prompt.computed, prompt.identity)
                prompt.waiting = gain is None
        return {rid for rid, prompt in self._prompts.items() if prompt is not None and prompt.waiting}

    def _meet(self, cache: LocalCache, request: Any) -> Prompt | None:
        if unsupported(request):
            return None
        names = (request.cache_salt, request.extra_key)
        wishes = self._edge.read(request.sampling_params.custom_params, request.rid, *names)
        if wishes.bypass:
            return None
        prompt = Prompt(request, wishes, cache.scheduler.namespace, self._tenant)
        if wishes.store:
            self._pages.learn(prompt)
        return prompt

    def _leave(self, cache: LocalCache, rid: str) -> None:
        """The request is in a batch, or gone."""
        prompt = self._prompts[rid]
        if prompt is not None and prompt.loading:
            return  # finish_layer_wise_loading comes
        if prompt is not None and prompt.looked_up and not prompt.waiting:
            cache.scheduler.admit(rid, 0, [])
        self._end(cache, rid)

    # UnifiedCacheLinker

    @guarded(lambda self, rid, transfers: [])
    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Page counts that can be restored: any prefix, or nothing yet."""
        prompt = self._prompts.get(rid)
        if self._cache is None or prompt is None or len(transfers) != 1:
            return []
        hashes: list[str] = transfers[0].keys
        start = prompt.position(hashes)
        if start is None:
            return []
        gain = self._lookup(self._cache, rid, prompt, start)
        return list(range(1, min(gain // self._page, len(hashes)) + 1))

    def _refuse_load(self, rid: str, transfers: list[Any]) -> bool:
        self._drop_queued(rid)
        self._refused = self._ranks > 1
        return self._refused

    def _drop_queued(self, rid: str) -> bool:
        """The load of this request is not made. False if none was queued."""
        plan = self._queued.pop(rid, None)
        if plan is not None and self._cache is not None:
            self._cache.worker.release()
            self._cache.worker.give_up(operations_of(plan.loads))
        return plan is not None

    @guarded(_refuse_load)
    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Returning False makes SGLang recompute, but all ranks must return the same value. With several ranks, accept the load and let it
        fail."""
        prompt = self._prompts.get(rid)
        if self._cache is not None and prompt is not None and self._queue(self._cache, rid, prompt, transfers[0]):
            return True
        return self._refuse_load(rid, transfers)

    def _next_batch(self) -> int:
        """Its number, or -1 if nothing waits to be loaded."""
        if self._batch is None:
            if not self._queued and not self._refused:
                return -1
            self._batch = int(self.layer_done_counter.update_producer())
            self._loading[self._batch] = list(self._queued)
        return self._batch

    def _batch_started(self) -> None:
        self._queued, self._refused, self._batch = {}, False, None

    def _fail_loading(self) -> int:
        index = self._next_batch()
        if index >= 0:
            self.layer_done_counter.fail(index, ConfigError("this rank runs without the cache"))
            for rid in list(self._queued):
                self._drop_queued(rid)
            self._batch_started()
        return index

    @guarded(_fail_loading)
    def start_layer_wise_loading(self) -> int:
        if self._refused or self._copies is None or self._cache is None:
            return self._fail_loading()
        index = self._next_batch()
        if index >= 0:
            self._copies.start_load(index, list(self._queued.values()), self.record_offload_ready()[:1])
            self._batch_started()
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        landed = self._finish_load(counter_index)
        self._end_loading(counter_index)
        return landed

    def _finish_failed(self, counter_index: int) -> bool:
        """Where the counter knows the batch no more, so does nobody whether it landed."""
        return counter_index in self.layer_done_counter.futures and bool(self.layer_done_counter.finish(counter_index))

    @guarded(_finish_failed)
    def _finish_load(self, counter_index: int) -> bool:
        if self._copies is None:
            return bool(self.layer_done_counter.finish(counter_index))
        return self._copies.finish_load(counter_index)

    @guarded(lambda self, counter_index: None)
    def _end_loading(self, counter_index: int) -> None:
        rids = self._loading.pop(counter_index, [])
        if self._cache is not None:
            self._pump(self._cache)
            for rid in rids:
                self._end(self._cache, rid)

    @guarded(lambda self, rid: self._queued.pop(rid, None) is not None)
    def cancel_queued_load(self, rid: str) -> bool:
        plan = self._queued.get(rid)
        if plan is None:
            return False
        if self._cache is not None:
            self._cache.scheduler.apply(Report(Counter(operations_of(plan.loads))))
            self._end(self._cache, rid)
            self._cache.worker.release()
        del self._queued[rid]
        return True

    @guarded(lambda self, transfers, session_id=None: False)
    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """SGLang keeps the pages until the result is popped. It offers them again as long as the result is False."""
        if self._cache is None or self._weights_unsure or len(transfers) != 1:
            return False
        return self._offload(self._cache, transfers[0])

    def _num_ended(self) -> int:
        return self._copies.num_stores_ended if self._copies is not None else 0

    @guarded(_num_ended)
    def num_completed_offloads(self) -> int:
        """Called in every round of the scheduler, also without work: the place to keep the background going."""
        if self._cache is not None:
            self._pump(self._cache)
        return self._num_ended()

    @guarded(lambda self: False)
    def pop_completed_offload(self) -> bool:
        assert self._copies is not None
        return self._copies.pop_store()

    def _forget_copies(self) -> None:
        """Of a cache that has ended."""
        self._queued.clear()
        self.layer_done_counter.reset()

    @guarded(_forget_copies)
    def reset(self) -> None:
        """SGLang flushed its own cache, for its own sake or because its weights were updated.

        lmc keeps what it stored, because its tiers are there to outlive the engine's memory. But what other weights have computed is
        never found again: their chunks have another name. SGLang may flush before it changes the weights, so these are read when the next
        request waits.
        """
        self._weights_unsure = True
        self._settle()

    def _settle(self) -> None:
        """End every copy of pages."""
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        if self._copies is not None:
            self._copies.quiesce()
        if self._cache is not None:
            self._pump(self._cache)
        self.layer_done_counter.reset()

    @guarded(_forget_copies)
    def close(self) -> None:
        self._settle()
        copies, self._copies = self._copies, None
        if copies is not None:
            copies.close()
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    # Inside

    def _rename(self, cache: LocalCache, model: str) -> None:
        """Forget every name that was made for other weights; waiting requests are met anew."""
        for rid in list(self._prompts):
            del self._prompts[rid]
            cache.scheduler.finish(rid)
        self._loading = {index: [] for index in self._loading}
        cache.scheduler.rename(model)
        self._pages = PageKeys(self._pages_remembered)

    def _lookup(self, cache: LocalCache, rid: str, prompt: Prompt, start: int) -> int:
        """Tokens that can be loaded from page `start` on; they stay in host memory for a moment."""
        prompt.computed = start * self._page
        prompt.looked_up = True
        gain = cache.scheduler.lookup(rid, prompt.tokens, prompt.computed, prompt.identity)
        prompt.waiting = gain is None
        prompt.explain(cache.scheduler.explain(rid))
        if not gain:
            return 0
        cache.scheduler.promise(rid, gain, _PROMISE_SECONDS)
        return gain

    def _queue(self, cache: LocalCache, rid: str, prompt: Prompt, transfer: Any) -> bool:
        start = prompt.position(transfer.keys)
        tokens = len(transfer.keys) * self._page
        if start is None or self._lookup(cache, rid, prompt, start) < tokens:
            return False
        pages = self._page_ids(transfer)
        cache.scheduler.admit(rid, tokens, [SKIP] * start + pages)
        prompt.explain(cache.scheduler.explain(rid))
        plan = cache.scheduler.take_plan()
        loads = Plan(loads=plan.loads, memory=plan.memory)
        plan.loads = []
        plan.failed_blocks.clear()  # of a load that the node does not order: SGLang hears of it at once, and computes
        cache.worker.begin(plan)
        if not loads.loads:
            return False
        if not cache.worker.keep(loads):
            cache.worker.give_up(operations_of(loads.loads), COPY)
            return False
        prompt.loading = True
        self._queued[rid] = loads
        return True

    def _end(self, cache: LocalCache, rid: str) -> None:
        """lmc's part in the request is over. Its prefix counts as used, also where SGLang held it itself."""
        prompt = self._prompts.pop(rid, None)
        if prompt is not None:
            cache.scheduler.use(prompt.keys, prompt.identity.tenant, request_name(rid), prompt.wishes.pin_seconds)
        cache.scheduler.finish(rid)

    def _offload(self, cache: LocalCache, transfer: Any) -> bool:
        """Store pages that SGLang offers. They come without a request, so they are no part of a request's life."""
        keys = self._pages.leading(transfer.keys)
        if not keys:
            return False  # generated tokens; they become known when a prompt repeats them
        before = self._pages.before(transfer.keys[0])
        pages = self._page_ids(transfer)[: len(keys)]
        offer = cache.scheduler.offer([*before, *keys], len(before), pages, self._pages.tenant(transfer.keys[0]))
        if offer is None:
            return False
        plan, kept = offer
        assert self._copies is not None
        ready = self.record_offload_ready() if plan.stores else []
        self._copies.start_store(plan, kept and len(keys) == len(transfer.keys), ready)
        return True

    def _page_ids(self, transfer: Any) -> list[int]:
        return [int(slot) // self._page for slot in transfer.device_indices[:: self._page].tolist()]

    def _pump(self, cache: LocalCache) -> None:
        report = cache.pump()
        if self._copies is not None:
            self._copies.learn(report)


def _settings(extra: dict[str, Any]) -> CacheConfig:
    if unknown := sorted(set(extra) - {"settings", "config"}):
        raise ConfigError(f"unknown key {unknown[0]!r} in linker_extra_config; there are settings and config")
    file = Path(extra["config"]) if extra.get("config") else None
    return load_settings(file, os.environ, extra.get("settings")).config


def _check(server_args: Any, params: Any, components: set[Any]) -> None:
    if components != {ComponentType.FULL}:
        raise ConfigError("models with sliding-window or state-space layers are not supported on SGLang")
    if params.page_size == 1:
        raise ConfigError(
            "on SGLang a chunk is a page, so its default of one token to a page makes a chunk of every token; "
            "start it with --page-size 64"
        )
    if params.pp_size > 1 or params.attn_cp_size > 1 or server_args.dcp_size > 1:
        raise ConfigError("pipeline and context parallelism are not supported")
    if params.is_eagle or params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        raise ConfigError("speculative decoding with a draft model's KV is not supported on SGLang")
    if server_args.disaggregation_mode != "null":
        raise ConfigError("prefill-decode disaggregation is not supported on SGLang")


def _chunk_tokens(config: CacheConfig, page: int) -> int:
    if config.chunk_tokens not in (None, page):
        raise ConfigError(
            f"on SGLang a chunk is a page: chunk_tokens {config.chunk_tokens} needs --page-size {config.chunk_tokens}, not {page}"
        )
    return page


def _layout(pool: Any, page: int) -> KVLayout:
    """Only the two plain pools: others keep scales, index keys or packed rows beside the KV."""
    if type(pool) is MHATokenToKVPool and pool.k_scale_buffer is None and pool.kv_cache_layout == "nhd":
        return KVLayout.from_sglang(pool.k_buffer, pool.v_buffer, page)
    if type(pool) is MLATokenToKVPool:
        return KVLayout.from_sglang(pool.kv_buffer, None, page)
    raise LayoutError(f"SGLang's {type(pool).__name__} is not supported, only plain MHA and MLA pools")


def _rank(params: Any) -> tuple[int, int]:
    """Rank and number of ranks that share out the KV heads."""
    group = params.attn_tp_cache_group or params.tp_cache_group
    if group is None or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(group=group), distributed.get_world_size(group=group)
