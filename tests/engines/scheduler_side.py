"""The connector's scheduler half under vLLM's own Request and SchedulerOutput objects, without an engine. Its worker does all at once."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from vllm import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.request import Request

from lmc.cache.config import chunk_tokens_for
from lmc.cache.connectors.vllm.adapters import Loaded
from lmc.cache.connectors.vllm.groups import KVGroups
from lmc.cache.connectors.vllm.messages import Introduction, StepPlan, StepReport
from lmc.cache.connectors.vllm.scheduler import SchedulerSide
from lmc.cache.keys import Namespace
from lmc.cache.plan import CopyReading, Plan, Report, WorkerReady
from lmc.cache.settings import load_settings

NUM_BLOCKS = 1_000


class DrivenSide:
    """Calls the hooks in vLLM's order."""

    def __init__(
        self,
        block_tokens: int,
        *,
        slots: int,
        announces: bool = False,
        stored: dict[str, list[bytes]] | None = None,
        mapping: str = "",
        groups: KVGroups | None = None,
        **settings: Any,
    ) -> None:
        """mapping: the number under which a node knows the worker, where the setting node is given."""
        config = load_settings(flags={"metrics.enabled": False, **settings}).config
        self.namespace = Namespace("vllm", "model", "", "bf16", "layout", chunk_tokens_for(config, block_tokens))
        self.side = SchedulerSide(config, block_tokens, announces, groups=groups)
        part_bytes = (4096,) * len(groups.order) if groups is not None else ()
        copying = CopyReading({}, {}, threads=1, pinned_slots=0, problem="")
        ready = WorkerReady(
            self.namespace, 0, 4096, slots, stored or {}, copying, mapping=mapping, part_bytes=part_bytes
        )
        self.side.meet([Introduction(ready)])
        assert self.side.scheduler is not None
        self.scheduler = self.side.scheduler
        self.blocks = list(range(1, NUM_BLOCKS))
        others = [
            list(range(number * NUM_BLOCKS + 1, (number + 1) * NUM_BLOCKS)) for number in range(1, len(part_bytes))
        ]
        self.tables = (self.blocks, *others)  # in each of vLLM's groups
        self.plans: list[Plan] = []  # all that were made
        self.adapters: Loaded = {}  # that the engine holds
        self.model = self.namespace.model  # what the workers say that it holds
        self._numbers = itertools.count()
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(block_tokens, hash_function) if announces else None

    def request(self, tokens: list[int], **values: Any) -> Request:
        sampling = SamplingParams(max_tokens=16, extra_args=values.pop("extra_args", None))
        return Request(f"request-{next(self._numbers)}", tokens, sampling, None, block_hasher=self._hasher, **values)

    def output(self, scheduled: dict[str, int]) -> SchedulerOutput:
        """A step that computes so many tokens of each request."""
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = scheduled
        output.kv_connector_block_state = KVConnectorBlockState(set(scheduled), lambda _: self.tables, {})
        return output

    def admit(self, request: Request, computed: int = 0) -> int:
        """Lookup, admission, and the step that computes the rest of the prompt. Returns what was loaded."""
        found, _ = self.side.lookup(request, computed)
        while found is None:
            self.step({})
            found, _ = self.side.lookup(request, computed)
        self.side.admit(request, self.tables, found)
        self.side.sources(request, found)
        request.num_computed_tokens = computed + found
        self.step({request.request_id: request.num_tokens - computed - found})
        request.num_computed_tokens = request.num_tokens
        return found

    def step(self, scheduled: dict[str, int]) -> None:
        step = self.side.step(self.output(scheduled))
        self.plans.append(step.plan)
        self.side.learn(self.answer(step))

    def answer(self, step: StepPlan) -> StepReport:
        """Everything in it went well."""
        model = self.model if step.asks_model else ""
        report = self.report_of(step.plan)
        return StepReport(report, dict(self.adapters), step.asks_adapters, step.asks_model, model)

    def drain(self) -> None:
        """Steps without requests, until no copy is under way."""
        while self.scheduler.busy:
            self.step({})

    def report(self, plan: Plan) -> None:
        self.plans.append(plan)
        report = self.report_of(plan)
        if report:
            self.side.apply(report)

    def report_of(self, plan: Plan) -> Report:
        """Everything in it went well."""
        done = [chunk.operation for one in (*plan.loads, *plan.background_loads, *plan.stores) for chunk in one.chunks]
        done += [copy.ticket.operation for copy in plan.tier_copies if copy.ticket.operation]
        return Report(Counter(done))

    def serve(self, request: Request) -> int:
        """A request from its first lookup to its end. Returns the tokens that were loaded."""
        found = self.admit(request)
        self.side.finish(request)
        return found
