"""Requests see the cache when they arrive, and join a batch when their chunks are in host memory.

SGLang decides about waiting requests in Scheduler.get_new_batch_prefill. Its plugin mechanism wraps this method: requests that wait for a
lower tier are taken out of the queue while the batch is put together, and put back after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from lmc.errors import ConfigError

_METHOD = "get_new_batch_prefill"

Hold = Callable[[list[Any], Any], set[str]]  # (waiting requests, tree cache) -> ids of those to keep back


def watch_queue(hold: Hold) -> None:
    """From now on ask hold before every prefill batch of this process. Raises ConfigError on an SGLang that works otherwise."""

    def build_batch(original: Callable[..., Any], scheduler: Any, *arguments: Any, **options: Any) -> Any:
        everyone = scheduler.waiting_queue
        held = hold(everyone, scheduler.tree_cache)
        if not held:
            return original(scheduler, *arguments, **options)
        scheduler.waiting_queue = [request for request in everyone if request.rid not in held]
        try:
            return original(scheduler, *arguments, **options)
        finally:
            scheduler.waiting_queue = _in_old_order(everyone, held, scheduler.waiting_queue)

    target = f"{Scheduler.__module__}.{Scheduler.__qualname__}.{_METHOD}"
    before = getattr(Scheduler, _METHOD, None)
    if before is None:
        raise ConfigError(f"this SGLang has no {target}; lmc is made for SGLang 0.5.23")
    HookRegistry.register(target, build_batch, HookType.AROUND)
    HookRegistry.apply_hooks()
    if getattr(Scheduler, _METHOD) is before:
        raise ConfigError(f"another plugin has changed {target} already; run SGLang without it")


def _in_old_order(everyone: Iterable[Any], held: set[str], remaining: list[Any]) -> list[Any]:
    left = {request.rid for request in remaining} | held
    known = {request.rid for request in everyone}
    return [request for request in everyone if request.rid in left] + [
        request for request in remaining if request.rid not in known
    ]


def agree(tree_cache: Any, ready: list[bool]) -> list[bool]:
    """What is true on all ranks. They must decide alike, because their batches must be equal."""
    mask = torch.tensor([int(flag) for flag in ready], dtype=torch.int)
    tree_cache._all_reduce_attn_groups(mask, torch.distributed.ReduceOp.MIN)  # SGLang offers the linker no public way
    return [bool(flag) for flag in mask.tolist()]
