"""The adapter protocol: what an engine that keeps its scheduler and its KV cache in one process needs to use the cache.

An adapter describes its KV memory once (a KVLayout and a Namespace) and then, for each request, calls lookup, load, store and finish, in
this order, on one thread. docs/adding-an-engine.md walks through it; transformers.py is the shortest example. vLLM has its scheduler and
its workers in different processes, so its connector carries plans and reports between them itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from lmc.cache.config import CacheConfig
from lmc.cache.keys import Namespace
from lmc.cache.node.open import open_scheduler, open_worker
from lmc.cache.plan import Report
from lmc.cache.scheduler.cache import Identity
from lmc.cache.share import ALONE, Share, of_directory
from lmc.cache.transfer.layout import KVLayout

NOBODY = Identity()
_POLL_SECONDS = 0.001


class LocalCache:
    """The cache of one rank, or its part in a node's. Of several ranks on a machine, each has its own, with equal capacities."""

    def __init__(
        self,
        config: CacheConfig,
        namespace: Namespace,
        layout: KVLayout,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        share: Share = ALONE,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """share, part: see lmc.cache.share. Raises ConfigError, LayoutError or TierError when the cache cannot be opened."""
        self.worker = open_worker(config, namespace, layout, rank=rank, num_ranks=num_ranks, apart=True)
        with ExitStack() as opened:
            opened.callback(self.worker.close)
            own = _of_rank(of_directory(config, share), rank, num_ranks)
            self.scheduler = open_scheduler(own, [self.worker.ready()], layout.block_tokens, part=part)
            opened.pop_all()

    def lookup(self, request_id: str, tokens: Sequence[int], computed: int = 0, identity: Identity = NOBODY) -> int:
        """How many tokens beyond `computed`, which the engine has in its blocks, can be loaded now.

        Waits for lower tiers until the deadline; engines that have other work meanwhile call scheduler.lookup and pump instead.
        """
        while True:
            gain = self.scheduler.lookup(request_id, tokens, computed, identity)
            if gain is not None:
                return gain
            self.pump()
            time.sleep(_POLL_SECONDS)

    def load(self, request_id: str, num_tokens: int, blocks: Sequence[int]) -> bool:
        """Copy what the last lookup found into the request's blocks, or note that nothing was found (0 tokens).

        blocks: the id of the block of each block_tokens tokens, from the start of the prompt. False: compute them; the blocks hold garbage.
        They may be written from now on: stores of other requests have read them.
        """
        self.worker.fence(set(blocks))
        self.scheduler.admit(request_id, num_tokens, blocks)
        plan = self.scheduler.take_plan()
        self.worker.begin(plan)
        failed = self.worker.take_failed_blocks()
        self.pump()
        return not failed

    def store(self, request_id: str, tokens: Sequence[int], num_prompt: int, blocks: Sequence[int]) -> None:
        """The blocks hold valid KV of all tokens, the first num_prompt of which are the prompt: keep a copy of the full chunks."""
        self.scheduler.store(request_id, tokens, len(tokens), num_prompt, blocks)
        plan = self.scheduler.take_plan()
        self.worker.begin(plan)
        self.worker.end(plan)
        self.pump()

    def finish(self, request_id: str) -> None:
        """The request is over, in whatever way."""
        self.scheduler.finish(request_id)

    def pump(self) -> Report:
        """Learn what ended in the background and start what became due; call it now and then. Returns what ended."""
        report = self.worker.take_report()
        self.scheduler.apply(report)
        plan = self.scheduler.take_plan()
        assert not plan.loads and not plan.stores  # load() and store() take their plans themselves
        if plan.tier_copies:
            self.worker.begin(plan)
        return report

    def settle(self, timeout: float = 30.0) -> bool:
        """Wait until nothing is under way. False: there still is."""
        deadline = time.monotonic() + timeout
        while self.scheduler.busy:
            if time.monotonic() > deadline:
                return False
            self.pump()
            time.sleep(_POLL_SECONDS)
        return True

    def close(self, timeout: float | None = None) -> None:
        """timeout: for what is under way; default: as configured."""
        with ExitStack() as halves:
            halves.callback(self.worker.close, timeout)
            halves.callback(self.scheduler.close, timeout)


def _of_rank(config: CacheConfig, rank: int, num_ranks: int) -> CacheConfig:
    """One rank's directory: its share of the disk; and one metrics endpoint and one trace are enough.

    Loads are the adapter's to put in the background, so none is marked for it.
    """
    share = config.disk.capacity // num_ranks
    changes: dict[str, object] = {
        "disk": config.disk.model_copy(update={"capacity": share}),
        "background_load_tokens": 1 << 60,
    }
    if rank > 0:
        changes["metrics"] = config.metrics.model_copy(update={"enabled": False})
        changes["record"] = None
    return config.model_copy(update=changes)
