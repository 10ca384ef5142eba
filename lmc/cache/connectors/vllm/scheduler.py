"""The connector in the scheduler's process: turns vLLM's requests and steps into calls of the CacheScheduler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from lmc.cache.config import CacheConfig
from lmc.cache.connectors.edge import Edge, Wishes
from lmc.cache.connectors.vllm.adapters import AdapterNames
from lmc.cache.connectors.vllm.events import TierEvents
from lmc.cache.connectors.vllm.groups import KVGroups
from lmc.cache.connectors.vllm.identity import request_identity
from lmc.cache.connectors.vllm.messages import Introduction, StepPlan, StepReport
from lmc.cache.connectors.vllm.passes import Passes, parts_of
from lmc.cache.connectors.vllm.promises import Promises
from lmc.cache.connectors.vllm.stats import CounterGrowth, LmcStats
from lmc.cache.connectors.vllm.versions import CacheHitSource
from lmc.cache.directory import HOST
from lmc.cache.keys import hashed_name
from lmc.cache.node.open import AnyScheduler, open_scheduler
from lmc.cache.observe.stats import describe_tiers
from lmc.cache.parts import Step
from lmc.cache.plan import Plan, Report, WorkerReady
from lmc.cache.scheduler.cache import CacheScheduler, Identity
from lmc.errors import LmcError

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_NULL_BLOCK = 0  # stands for blocks that a request does not hold


def blocks_overwritten(output: SchedulerOutput) -> frozenset[int]:
    """The blocks that a step may write although they were another request's before: those that it hands out, zeroes or copies to.

    A request's own blocks are full when they are stored, and are not written again.
    """
    blocks: set[int] = set()
    for new in output.scheduled_new_reqs:
        blocks.update(*new.block_ids)
    for added in output.scheduled_cached_reqs.new_block_ids:
        if added is not None:
            blocks.update(*added)
    blocks.update(getattr(output, "new_block_ids_to_zero", None) or ())  # these two are not in every tested version
    blocks.update(copy.dst_block_id for copy in getattr(output, "kv_cache_block_copies", None) or ())
    blocks.discard(_NULL_BLOCK)
    return frozenset(blocks)


@dataclass
class _Tracked:
    """A request between its first lookup and its end."""

    request: Request
    num_prompt: int
    identity: Identity
    wishes: Wishes
    digests: tuple[str, ...] = ()  # of its adapter, by rank


@dataclass
class SchedulerSide:
    """The scheduler's half. What it raises ends the cache (see guard.py): promises not yet planned are then recomputed."""

    config: CacheConfig
    block_tokens: int
    announces: bool = False  # vLLM publishes KV events
    refused: bool = False  # there is no cache: it could not be opened, or has ended
    part: tuple[int, int] = (0, 1)  # of a disk folder that data-parallel engines have in common
    groups: KVGroups | None = None  # of a model that may have several
    scheduler: AnyScheduler | None = None
    events: TierEvents | None = None
    stored: list[Request] = field(default_factory=list)  # of this step, to be announced
    tracked: dict[str, _Tracked] = field(default_factory=dict)
    growth: CounterGrowth | None = None
    adapters: AdapterNames = field(default_factory=lambda: AdapterNames(1))
    edge: Edge = field(init=False)
    tenant: str = field(init=False)  # the instance's, by its hashed name
    resets: int = 0
    settled: int = 0  # the last reset of which it is known whether the weights had changed by then
    asks_model: bool = False  # in this step
    passes: Passes | None = None  # measured where `load: auto` weighs them
    asked_model: int = 0  # the last reset about which the workers were asked
    promises: Promises = field(init=False)

    def __post_init__(self) -> None:
        self.promises = Promises(self.block_tokens, self.is_hybrid)
        if self.config.load == "auto" and self.config.node is None and not self.is_hybrid:
            self.passes = Passes()
        self.edge = Edge(self.config, "kv_transfer_params")
        self.tenant = hashed_name(self.config.tenant)

    def meet(self, introductions: list[KVConnectorHandshakeMetadata]) -> None:
        """Open the cache with what the workers hold, unless it has been given up already."""
        if self.refused:
            return
        ready: list[WorkerReady] = []
        failures: list[str] = []
        for introduction in introductions:
            assert isinstance(introduction, Introduction)
            if introduction.ready is not None:
                ready.append(introduction.ready)
                failures += introduction.ready.warnings
            else:
                failures.append(introduction.failure)
        self.refused = True
        if len(ready) < len(introductions):
            logger.error("lmc: running WITHOUT the cache: %s", "; ".join(failures))
            return
        try:
            groups = self.groups.groups if self.groups is not None and self.groups.has_leaves else ()
            announces = self.announces and not self.is_hybrid
            self.scheduler = open_scheduler(
                self.config, ready, self.block_tokens, part=self.part, groups=groups, announces=announces
            )
        except LmcError as error:
            if self.config.strict:
                raise
            logger.error("lmc: running WITHOUT the cache: %s", error)
            return
        self.adapters = AdapterNames(len(introductions))
        self.refused = False
        if self.announces and self.is_hybrid:
            logger.warning("lmc: no KV events: there are none for models whose layers do not all keep all tokens")
        elif self.announces:
            self.events = TierEvents(self.scheduler, self.block_tokens)
        self.growth = CounterGrowth(self.scheduler.metrics.registry)
        logger.info(
            "lmc: cache on, %d tokens per chunk, %s, metrics at %s",
            self.scheduler.chunk_tokens,
            describe_tiers(self.scheduler.stats()),
            self.scheduler.metrics_url,
        )

    def lookup(self, request: Request, computed: int) -> tuple[int | None, bool]:
        if self.scheduler is None or request.skip_reading_prefix_cache:
            return 0, False
        if self.model_unsure:
            self.asks_model = True  # not before the engine takes in requests again: the weights may change until then
            return None, False
        adapter = request.lora_request
        if adapter is not None and request.request_id not in self.tracked:
            known = self.adapters.known(adapter)
            if not known:
                return (0 if known is False else None), False
        tracked = self._track(request)
        if tracked.wishes.bypass:
            return 0, False
        found = self.scheduler.lookup(request.request_id, request.all_token_ids, computed, tracked.identity)
        return found, bool(found and self.scheduler.loads_in_background(found))

    @property
    def is_hybrid(self) -> bool:
        return self.groups is not None and self.groups.is_hybrid

    def admit(self, request: Request, tables: Sequence[list[int]], num_external: int) -> None:
        """tables: the request's blocks in each of vLLM's KV groups."""
        tracked = self.tracked.get(request.request_id)
        if self.scheduler is not None and tracked is not None and not tracked.wishes.bypass:
            blocks, others = self._in_order(tables)
            self.scheduler.admit(request.request_id, num_external, blocks, others)

    def sources(self, request: Request, num_external: int) -> dict[CacheHitSource, int]:
        names = {HOST: CacheHitSource.HOST, "disk": CacheHitSource.DISK}
        sources: dict[CacheHitSource, int] = {}
        if self.scheduler is not None and num_external:
            for tier, tokens in self.scheduler.loaded_from(request.request_id).items():
                source = names.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
                sources[source] = sources.get(source, 0) + tokens
        return sources

    def step(self, output: SchedulerOutput) -> StepPlan:
        if self.scheduler is None:
            return self.refusal()
        asks = self.model_unsure and (self.asks_model or bool(output.num_scheduled_tokens))
        asked = self.resets if asks and self.asked_model != self.resets else 0
        self.asked_model = asked or self.asked_model
        plan = self.plan(output)
        if self.passes is not None:
            self.passes.plan(() if plan.loads else parts_of(output, self._num_prompt))  # loads make a pass longer
        adapters = {}
        for copies in (*plan.loads, *plan.background_loads, *plan.stores):
            tracked = self.tracked.get(copies.request_id)
            if tracked is not None and tracked.digests:
                adapters[copies.request_id] = (tracked.request.lora_request.lora_int_id, tracked.digests)
        moves = self.groups is not None and self.groups.has_states  # from block to block, which no list says
        overwritten = None if moves else blocks_overwritten(output)
        step = StepPlan(plan, adapters, self.adapters.asking, asked, overwritten, self.refused)
        self.adapters.asking = self.asks_model = False
        return step

    def refusal(self) -> StepPlan:
        """The plan of a step without a cache: what was promised is not loaded."""
        return StepPlan(self.promises.broken(), refused=self.refused)

    def learn(self, report: StepReport) -> None:
        if report.gone and self.scheduler is not None:
            logger.error("lmc: the cache has ended on another rank; the engine goes on WITHOUT it")
            self.give_up()
        self.adapters.learn(report.adapters, report.answers_adapters)
        if report.model and self.scheduler is not None:
            self.settled = report.answers_model
            if report.model != self.scheduler.namespace.model:
                self.scheduler.rename(report.model)
        self.apply(report.report)

    def plan(self, output: SchedulerOutput) -> Plan:
        if self.scheduler is None:
            return self.promises.broken()
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            self._plan_store(output, request_id, num_scheduled)
        plan = self.scheduler.take_plan()
        if self.events is not None:
            stored, self.stored = self.stored, []
            self.events.note([(request, self.scheduler.keys_of(request.request_id)) for request in stored])
        return plan

    def _num_prompt(self, request_id: str) -> int:
        tracked = self.tracked.get(request_id)
        return tracked.num_prompt if tracked is not None else 0

    def _plan_store(self, output: SchedulerOutput, request_id: str, num_scheduled: int) -> None:
        tracked = self.tracked.get(request_id)
        if tracked is None or self.scheduler is None or not tracked.wishes.store or self.model_unsure:
            return
        request = tracked.request
        num_valid = min(request.num_computed_tokens + num_scheduled, request.num_tokens)
        if self.scheduler.wants_store(request_id, num_valid, request.num_prompt_tokens):
            tables = output.kv_connector_block_state.get_block_ids(request_id)
            if tables is not None:
                blocks, others = self._in_order(tables)
                used = blocks[: -(-num_valid // self.block_tokens)]
                if _NULL_BLOCK in used:  # not this request's bytes: dropped by the engine, or never filled
                    num_valid = min(num_valid, used.index(_NULL_BLOCK) * self.block_tokens)
                self.scheduler.store(
                    request_id,
                    request.all_token_ids,
                    num_valid,
                    request.num_prompt_tokens,
                    blocks,
                    others,
                    Step(request.num_computed_tokens, self._states(output, request, num_scheduled, tables)),
                )
                identity = tracked.identity
                if (
                    self.events is not None
                    and identity.extra is None
                    and (identity.tenant, identity.salt) == (self.tenant, "")
                ):
                    self.stored.append(request)

    def _states(
        self, output: SchedulerOutput, request: Request, num_scheduled: int, tables: Sequence[list[int]]
    ) -> list[int]:
        """Lengths in chunks at which the request's blocks hold its states in this step."""
        if self.groups is None or not self.groups.has_states:
            return []
        before = request.num_computed_tokens
        offers = getattr(output.kv_connector_block_state, "boundary_state_offloads", None) or {}
        return self.groups.states_at(tables, (before, before + num_scheduled), offers.get(request.request_id, ()))

    def _in_order(self, tables: Sequence[list[int]]) -> tuple[list[int], Sequence[list[int]]]:
        """The blocks in the spine's group, and those in the others."""
        if self.groups is None or (len(tables) == 1 and not self.groups.window):
            return tables[0], ()
        spine, *others = self.groups.tables(tables)
        return spine, others

    def _track(self, request: Request) -> _Tracked:
        """The request's record; a session whose prompt was replaced by a continuation starts anew."""
        tracked = self.tracked.get(request.request_id)
        if tracked is not None and tracked.num_prompt != request.num_prompt_tokens:
            assert self.scheduler is not None
            self.scheduler.finish(request.request_id)
            tracked = None
        if tracked is None:
            wishes = self.edge.read(request.kv_transfer_params, request.request_id, request.cache_salt)
            lora = request.lora_request
            digests = self.adapters.digests(lora.lora_int_id) if lora is not None else ()
            name = self.adapters.name(lora) if lora is not None else ""
            identity = Identity()
            if not wishes.bypass:
                identity = replace(
                    request_identity(request, wishes.tenant or self.tenant, name),
                    request_class=wishes.request_class,
                    session=wishes.session,
                )
            tracked = _Tracked(request, request.num_prompt_tokens, identity, wishes, digests)
            self.tracked[request.request_id] = tracked
        return tracked

    def apply(self, report: Report) -> None:
        if self.scheduler is not None:
            self.scheduler.apply(report)

    def finish(self, request: Request) -> dict[str, Any] | None:
        """What the client gets as kv_transfer_params, if it asked for an explanation."""
        self.promises.offers.pop(request.request_id, None)
        tracked = self.tracked.pop(request.request_id, None)
        answer = None
        if self.scheduler is not None:
            if tracked is not None and tracked.wishes.explain:
                answer = {"lmc": self.scheduler.explain(request.request_id)}
            self.scheduler.finish(request.request_id, tracked.wishes.pin_seconds if tracked is not None else 0.0)
        return answer

    def stats(self) -> LmcStats | None:
        if self.growth is not None and self.scheduler is not None:
            return self.growth.take()
        return None

    def take_events(self) -> list[KVCacheEvent]:
        """vLLM asks for them after each pass."""
        parts, seconds = self.passes.end() if self.passes is not None else ((), 0.0)
        if parts and isinstance(self.scheduler, CacheScheduler):
            self.scheduler.computed(parts, seconds)
        if self.events is not None and self.scheduler is not None:
            return self.events.take()
        return []

    @property
    def busy(self) -> bool:
        return self.scheduler is not None and self.scheduler.busy

    @property
    def model_unsure(self) -> bool:
        """A reset may come with a change of weights; nothing is loaded or stored until the workers have said whether it did."""
        return self.settled != self.resets

    def reset(self) -> bool:
        if self.scheduler is not None:
            self.resets += 1
            self.scheduler.reset()
        return True

    def give_up(self) -> None:
        """Go on without the cache, on all ranks: the next step tells them."""
        self.refused = True
        self.tracked.clear()
        self._close(0.0)  # the engine waits

    def close(self) -> None:
        self._close(self.config.close_timeout)

    def _close(self, timeout: float) -> None:
        if self.scheduler is not None:
            scheduler, self.scheduler = self.scheduler, None
            scheduler.close(timeout)
