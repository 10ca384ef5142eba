"""Writes the trace of `lmc sim --example`: python -m benchmarks.example_trace > workloads/example-trace.jsonl

An invented hour of a chat service, in Mooncake's format: a few system prompts of unequal popularity, conversations that grow turn by turn,
and some prompts that come once.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator

BLOCK = 512
CONVERSATIONS = 220
SYSTEM_PROMPTS = 12


def lines() -> Iterator[str]:
    chance = random.Random(1)
    fresh = itertools.count()
    systems = [[next(fresh) for _ in range(chance.randint(2, 8))] for _ in range(SYSTEM_PROMPTS)]
    requests: list[tuple[int, int, int, list[int]]] = []
    for _ in range(CONVERSATIONS):
        at_ms = chance.randrange(3_600_000)
        rank = min(int(chance.paretovariate(1.0)) - 1, SYSTEM_PROMPTS)
        ids = list(systems[rank]) if rank < SYSTEM_PROMPTS else []
        for _ in range(chance.choice([1, 1, 2, 3, 4, 6, 9])):
            ids = ids + [next(fresh) for _ in range(chance.randint(1, 4))]
            tail = chance.randrange(1, BLOCK)  # the last id names a partial block, which no later turn shares
            requests.append((at_ms, len(ids) * BLOCK + tail, chance.randrange(20, 600), [*ids, next(fresh)]))
            at_ms += chance.randrange(5_000, 180_000)
    for at_ms, prompt, output, ids in sorted(requests):
        yield json.dumps({"timestamp": at_ms, "input_length": prompt, "output_length": output, "hash_ids": ids})


if __name__ == "__main__":
    for line in lines():
        print(line)
