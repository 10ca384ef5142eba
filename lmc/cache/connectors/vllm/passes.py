"""How long vLLM's passes take, as its scheduler sees it: from the step that plans a pass, or the end of the pass before, to its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_MOST = 16  # steps that a version of vLLM plans ahead; with more, it does not tell of the ends of its passes

Parts = Sequence[tuple[int, int]]


def parts_of(output: SchedulerOutput, num_prompt: Callable[[str], int]) -> Parts:
    """For each request of a pass the position of its first token, and the number of its tokens; empty if all of them decode."""
    scheduled, cached = output.num_scheduled_tokens, output.scheduled_cached_reqs
    at = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
    at += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    if all(position >= num_prompt(request_id) for request_id, position in at):
        return ()
    return [(position, scheduled[request_id]) for request_id, position in at if request_id in scheduled]


@dataclass
class Passes:
    clock: Callable[[], float] = time.monotonic
    _planned: deque[tuple[float, Parts]] = field(default_factory=deque)
    _last: float = float("-inf")  # when the last pass ended

    def plan(self, parts: Parts) -> None:
        """A step is planned. parts are empty for a pass that shall not be measured."""
        if len(self._planned) >= _MOST:
            self._planned.clear()
        self._planned.append((self.clock(), parts))

    def end(self) -> tuple[Parts, float]:
        """The first of the planned passes has ended: its parts and its seconds."""
        if not self._planned:
            return (), 0.0
        planned, parts = self._planned.popleft()
        began, self._last = max(planned, self._last), self.clock()
        return parts, self._last - began
