"""Builds prompts from a trace of any format that lmc.sim reads, lmc's own record among them.

Every id of the trace becomes tokens that depend on nothing but the id and the seed, so prompts share exactly the prefixes that the recorded
ones shared. Tokens of a prompt that no id stands for are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lmc.bench.tokenizer import Tokens
from lmc.bench.workload import TraceSource
from lmc.sim.formats import read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.trace import require_blocks

Draw = Callable[[int, str, int], Tokens]  # that many tokens, which depend on the words


def trace_prompts(path: Path, source: TraceSource, draw: Draw) -> Iterator[tuple[Tokens, int | None, float]]:
    """(prompt, output tokens if the trace names them, arrival in s) of each request, in order of arrival. Raises TraceError."""
    trace = read_trace(path, ReadOptions(block_tokens=source.block_tokens, sort=True))
    require_blocks(trace)
    block_tokens = source.tokens_per_block or trace.block_tokens
    scale = block_tokens / trace.block_tokens
    known: dict[int, Tokens] = {}
    for request in range(trace.num_requests):
        ids = trace.ids[trace.starts[request] : trace.starts[request + 1]].tolist()
        for block_id in ids:
            if block_id not in known:
                known[block_id] = draw(block_tokens, "block", block_id)
        length = max(1, round(int(trace.input_tokens[request]) * scale))
        prompt = np.concatenate([np.empty(0, dtype=np.int32), *(known[block_id] for block_id in ids)])[:length]
        if len(prompt) < length:
            prompt = np.concatenate([prompt, draw(length - len(prompt), "own", request)])
        output = int(trace.output_tokens[request])
        yield prompt, max(1, round(output * scale)) if output else None, float(trace.timestamps_s[request])
