"""Async scheduling on a CPU: a step is planned before the tokens of the step before it are known, as on a device by default.

vLLM switches it off on a CPU, where it gains nothing; its scheduler and its model runner can do it there nevertheless.
"""

from __future__ import annotations

import contextlib
from typing import Any


class _Nothing:
    """In the place of a CUDA event or stream: all has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    synchronize = wait_stream = record


def schedule_ahead() -> None:
    """For the engine that this process will start with async_scheduling."""
    import torch
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    check = platform.check_and_update_config

    def keep(vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked

    platform.check_and_update_config = staticmethod(keep)
    cuda: Any = torch.cuda
    cuda.Event = cuda.Stream = cuda.current_stream = _Nothing
    cuda.stream = lambda _: contextlib.nullcontext()
