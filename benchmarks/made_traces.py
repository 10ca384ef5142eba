"""Traces that nobody recorded, for benchmarks.policies: windows of a recorded one, and chains drawn with fixed seeds.

They cover what the recorded ones lack: popularity without sessions, questions to documents, chats with heavy-tailed pauses, a batch job
that goes round in a loop, and two kinds of traffic at once. Blocks are of 512 tokens; a request ends in a block of its own, as prompts do.
"""

from __future__ import annotations

import numpy as np

from lmc.sim.build import TraceBuilder
from lmc.sim.trace import Trace, select_requests

BLOCK = 512
Arrival = tuple[float, list[int]]  # second, hashes
_APART = 1_000_000  # hashes of one chain


def window(trace: Trace, first: float, last: float) -> Trace:
    """The requests between two shares of the trace, on an empty cache."""
    chosen = np.zeros(trace.num_requests, dtype=bool)
    chosen[int(first * trace.num_requests) : int(last * trace.num_requests)] = True
    return select_requests(trace, chosen)


def trace_of(name: str, arrivals: list[Arrival]) -> Trace:
    builder = TraceBuilder(name, "made", BLOCK)
    for number, (second, hashes) in enumerate(sorted(arrivals)):
        own = -1 - number  # the end of the prompt, which nobody repeats
        builder.add(number + 1, [*hashes, own], second, (len(hashes) + 1) * BLOCK, 1)
    return builder.finish()


def chain(number: int, length: int) -> list[int]:
    return list(range(number * _APART, number * _APART + length))


def popular_prompts(seed: int) -> list[Arrival]:
    """8,000 requests for 2,000 prompts of 2 to 31 blocks, popularity by Zipf's law with exponent 0.9."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 2001) ** 0.9
    drawn = generator.choice(2000, size=8000, p=weights / weights.sum())
    lengths = generator.integers(2, 32, size=2000)
    return [(float(second), chain(int(prompt), int(lengths[prompt]))) for second, prompt in enumerate(drawn)]


def document_questions(seed: int) -> list[Arrival]:
    """1,500 documents, one a second, of some 20 blocks behind a common start; each gets some five questions, at its own pace."""
    generator = np.random.default_rng(seed)
    arrivals = []
    for document in range(1, 1501):
        length = int(np.clip(generator.lognormal(np.log(20), 0.8), 2, 400))
        pace = generator.lognormal(np.log(20), 1.0)
        second = float(document)
        for _ in range(1 + int(generator.geometric(0.2))):
            arrivals.append((second, [*chain(0, 1), *chain(document, length)]))
            second += generator.exponential(pace)
    return arrivals


def chat_sessions(seed: int) -> list[Arrival]:
    """2,500 chats, one a second, behind one of several system prompts; they grow by the turn, and their pauses are heavy-tailed."""
    generator = np.random.default_rng(seed)
    arrivals = []
    for chat in range(1, 2501):
        prompt = -1 - int(generator.zipf(1.6)) % 20
        start = [prompt * _APART - block for block in range(4 - prompt % 12)]
        length = 1 + int(generator.lognormal(np.log(8), 1.0))
        pause = 30 * (generator.pareto(1.5) + 0.2)
        second = float(chat)
        for _ in range(int(generator.geometric(0.25))):
            arrivals.append((second, [*start, *chain(chat, min(length, 300))]))
            length += 1 + int(generator.exponential(2))
            second += generator.exponential(pause)
    return arrivals


def loop(seed: int) -> list[Arrival]:
    """A batch job goes round 300 prompts of 8 to 12 blocks; one request in five is for any of them."""
    generator = np.random.default_rng(seed)
    arrivals = []
    for number in range(6000):
        prompt = number % 300 if generator.random() < 0.8 else int(generator.integers(0, 300))
        arrivals.append((float(number), chain(prompt, 8 + prompt % 5)))
    return arrivals


def together(first: list[Arrival], second: list[Arrival]) -> list[Arrival]:
    """Both at once, the second stretched to the time of the first."""
    stretch = max(arrival[0] for arrival in first) / max(arrival[0] for arrival in second)
    other = [(at * stretch, [hash_ + (1 << 50) for hash_ in hashes]) for at, hashes in second]
    return first + other
