"""What vLLM was told that lmc does, and waits for: kept apart from the cache, so that it can be taken back when the cache has failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmc.cache.plan import SKIP, Plan, RequestCopies


@dataclass
class Promises:
    """In the scheduler's process: loads that vLLM has admitted and that no plan says yet."""

    block_tokens: int
    is_hybrid: bool = False  # several KV groups: vLLM takes requests back, not blocks
    offers: dict[str, tuple[int, bool]] = field(default_factory=dict)  # request -> (computed tokens, in the background)
    blocks: list[int] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # those that wait for a load in the background

    def offer(self, request_id: str, computed: int, found: int | None, background: bool) -> None:
        """The answer to a request's last lookup."""
        if found:
            self.offers[request_id] = computed, background
        else:
            self.offers.pop(request_id, None)

    def keep(self, request_id: str, tables: Sequence[Sequence[int]], num_external: int) -> None:
        """vLLM took the offer. Called again, it changes nothing. tables: the request's blocks in each KV group."""
        offer = self.offers.pop(request_id, None)
        if offer is None or not num_external:
            return
        computed, background = offer
        if not self.is_hybrid:
            first = computed // self.block_tokens
            self.blocks += tables[0][first : first + num_external // self.block_tokens]
        if background:
            self.requests.append(request_id)

    def broken(self) -> Plan:
        """A plan that takes them back."""
        return Plan(failed_blocks=list(self.blocks), failed_requests=list(self.requests))

    def planned(self) -> None:
        self.blocks.clear()
        self.requests.clear()


@dataclass
class Owed:
    """In a worker: loads that a plan has begun and whose end vLLM has not been told of."""

    blocks: set[int] = field(default_factory=set)  # of this forward pass, and those whose request was told of already
    background: dict[str, tuple[int, ...]] = field(default_factory=dict)  # request -> blocks

    def begin(self, plan: Plan) -> None:
        self.blocks.update(plan.failed_blocks)
        for copies in plan.loads:
            self.blocks.update(_filled(copies))
        self.background.update((request_id, ()) for request_id in plan.failed_requests)
        for copies in plan.background_loads:
            self.background[copies.request_id] = _filled(copies)

    def told_requests(self, ended: set[str]) -> None:
        for request_id in ended:
            self.blocks.update(self.background.pop(request_id, ()))

    def told_blocks(self) -> None:
        self.blocks.clear()


def _filled(copies: RequestCopies) -> tuple[int, ...]:
    return tuple(block for chunk in copies.chunks for block in chunk.blocks if block != SKIP)
