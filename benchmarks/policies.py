"""How much of the room between LRU and Belady each policy takes: python -m benchmarks.policies [--out reports/policies].

Needs LMC_DATA_DIR; text sets need --tokenizer, a tokenizer.json. Every trace is replayed at 1, 3 and 10 % of its unique blocks. The share
closed is (hits - LRU's) / (Belady's - LRU's), in block hits over the whole trace, cold start included. A trace where LRU is already within
0.1 points of Belady says nothing about policies and is marked. Arrivals that a trace does not have are invented with fixed seeds; the note
of each trace says how. --made takes the traces of made_traces.py instead. The first table is about robustness: for each policy the mean of
the shares closed over all places (a trace at a size) that say something, and the most that it loses against LRU anywhere. Exit code 1 when
another policy closes more than `predictive` in the mean, or `predictive` hits more than 0.5 points less than LRU somewhere.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import made_traces
from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.policy import POLICIES
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, write_file
from lmc.sim.belady import belady_hits
from lmc.sim.build import TraceBuilder
from lmc.sim.formats import read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.formats.tokens import hash_tokens
from lmc.sim.policy_replay import replay_policy
from lmc.sim.trace import Trace, coarsen

SHARES = (0.01, 0.03, 0.10)
RIVALS = ("lru", "arc", "s3fifo", "lirs", "gdsf")
OTHERS = ("sieve", "2q", "lfu")
TEXT_BLOCK = 16
TELLING = 0.001  # of all blocks
MOST_LOST = 0.005  # of all blocks, against LRU

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Source:
    note: str
    read: Callable[[Path, Path | None], Trace]
    text: bool = False


def conversation(data: Path, tokenizer: Path | None) -> Trace:
    return read_trace(data / "mooncake_conversation_trace.jsonl.gz")


def synthetic(data: Path, tokenizer: Path | None) -> Trace:
    return read_trace(data / "mooncake_synthetic_trace.jsonl.gz")


def agents(data: Path, tokenizer: Path | None) -> Trace:
    trace = read_trace(data / "kv-cache-tester_692distinct_runs.jsonl.gz", ReadOptions(session_gap_s=60.0))
    return coarsen(trace, 512)


def rag(data: Path, tokenizer: Path | None) -> Trace:
    return read_trace(data / "ragpulse" / "0_trace.jsonl.gz")


def mini_swe(data: Path, tokenizer: Path | None) -> Trace:
    return read_trace(data / "lmcache_agent_miniswe.jsonl.gz", ReadOptions(tokenizer=tokenizer))


def magentic(data: Path, tokenizer: Path | None) -> Trace:
    return read_trace(data / "lmcache_agent_magagent.jsonl.gz", ReadOptions(tokenizer=tokenizer))


def encoder(tokenizer: Path | None) -> Encode:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.encode(text).ids
        return ids

    return encode


def trace_from(name: str, arrivals: list[tuple[float, int, list[int]]]) -> Trace:
    """Requests as (second, session, tokens); those that fill no block are left out."""
    builder = TraceBuilder(name, "text", TEXT_BLOCK)
    for number, (second, session, tokens) in enumerate(sorted(arrivals, key=lambda arrival: arrival[:2])):
        if len(tokens) >= TEXT_BLOCK:
            builder.add(number, hash_tokens(tokens, TEXT_BLOCK), second, len(tokens), 1, session=str(session))
    return builder.finish()


def interleaved(name: str, sessions: list[list[list[int]]], gap_s: float, think_s: float, seed: int) -> Trace:
    """Sessions start at random, one every gap_s on average; their requests follow each other after a random think time."""
    generator = random.Random(seed)
    arrivals = []
    start = 0.0
    for number, requests in enumerate(sessions):
        start += generator.expovariate(1 / gap_s)
        second = start
        for tokens in requests:
            arrivals.append((second, number, tokens))
            second += generator.expovariate(1 / think_s)
    return trace_from(name, arrivals)


def chats(data: Path, tokenizer: Path | None) -> Trace:
    encode = encoder(tokenizer)
    sessions = []
    with gzip.open(data / "mtbench101.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            tokens: list[int] = []
            requests = []
            for turn in json.loads(line)["history"]:
                tokens = tokens + encode(f"<|im_start|>user\n{turn['user']}<|im_end|>\n<|im_start|>assistant\n")
                requests.append(tokens)
                tokens = tokens + encode(f"{turn['bot']}<|im_end|>\n")
            sessions.append(requests)
    random.Random(7).shuffle(sessions)
    return interleaved("mtbench101", sessions, 5.0, 30.0, 1)


def documents(data: Path, tokenizer: Path | None) -> Trace:
    encode = encoder(tokenizer)
    generator = random.Random(3)
    arrivals = []
    with gzip.open(data / "xquad.en.json.gz", "rt", encoding="utf-8") as text:
        articles = json.load(text)["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    for number, paragraph in enumerate(paragraphs):
        context = encode(paragraph["context"])
        for question in paragraph["qas"]:
            second = 10.0 * number + generator.expovariate(1 / 200)
            arrivals.append((second, number, context + encode("\n" + question["question"])))
    return trace_from("xquad", arrivals)


def mini_swe_shuffled(data: Path, tokenizer: Path | None) -> Trace:
    encode = encoder(tokenizer)
    sessions: dict[str, list[list[int]]] = {}
    with gzip.open(data / "lmcache_agent_miniswe.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            sessions.setdefault(record["session_id"], []).append(encode(record["input"]))
    return interleaved("mini-swe-agent", list(sessions.values()), 20.0, 15.0, 2)


SOURCES = {
    "conversation": Source("Mooncake conversation, 512-token blocks, its own arrivals", conversation),
    "synthetic": Source("Mooncake synthetic, 512-token blocks, its own arrivals", synthetic),
    "agents": Source("kv-cache-tester sessions, one started every 60 s, chunks of 512 tokens", agents),
    "rag": Source("RAGPulse, its own arrivals, components cut into chained 16-token blocks", rag),
    "mini-swe": Source("mini-swe-agent, its own arrivals, 16-token blocks", mini_swe, text=True),
    "mini-swe-interleaved": Source(
        "the same sessions started every 20 s, 15 s between requests", mini_swe_shuffled, text=True
    ),
    "magentic": Source("magentic agents, their own arrivals, 16-token blocks", magentic, text=True),
    "chats": Source("MT-Bench-101, a dialogue every 5 s, 30 s between turns, 16-token blocks", chats, text=True),
    "documents": Source(
        "XQuAD, a paragraph every 10 s, its questions spread over 200 s, 16-token blocks", documents, text=True
    ),
}


def conversation_window(first: float, last: float) -> Source:
    return Source(
        f"the conversation trace's requests from {first:.0%} to {last:.0%}",
        lambda data, tokenizer: made_traces.window(conversation(data, tokenizer), first, last),
    )


def made(name: str, make: Callable[[], list[made_traces.Arrival]], note: str) -> Source:
    return Source(note, lambda data, tokenizer: made_traces.trace_of(name, make()))


MADE = {
    "conversation-half-1": conversation_window(0, 0.5),
    "conversation-half-2": conversation_window(0.5, 1),
    "conversation-quarter-2": conversation_window(0.25, 0.5),
    "popular": made("popular", lambda: made_traces.popular_prompts(1), "popular prompts, Zipf"),
    "questions": made("questions", lambda: made_traces.document_questions(2), "questions to documents"),
    "made-chats": made("made-chats", lambda: made_traces.chat_sessions(3), "chats with heavy-tailed pauses"),
    "loop": made("loop", lambda: made_traces.loop(4), "a batch job in a loop"),
    "chats-and-questions": made(
        "chats-and-questions",
        lambda: made_traces.together(made_traces.chat_sessions(5), made_traces.document_questions(6)),
        "both at once",
    ),
}
ALL = {**SOURCES, **MADE}


@dataclass(frozen=True)
class Judged:
    """One trace at one capacity."""

    name: str
    share: float
    capacity: int
    num_blocks: int
    hits: dict[str, int]

    @property
    def room(self) -> int:
        return self.hits["belady"] - self.hits["lru"]

    @property
    def best_rival(self) -> str:
        return max(RIVALS, key=lambda policy: self.hits[policy])

    @property
    def telling(self) -> bool:
        return self.room >= TELLING * self.num_blocks

    def against_lru(self, policy: str) -> float:
        """The share of all blocks that it hits more than LRU."""
        return (self.hits[policy] - self.hits["lru"]) / self.num_blocks

    def closed(self, policy: str) -> float | None:
        return (self.hits[policy] - self.hits["lru"]) / self.room if self.room else None


def judge(name: str, trace: Trace) -> list[Judged]:
    sizes = [max(1, int(share * trace.num_unique)) for share in SHARES]
    runs = {policy: replay_policy(trace, POLICIES[policy], sizes) for policy in (*RIVALS, *OTHERS, "predictive")}
    runs["belady"] = belady_hits(trace, sizes)
    return [
        Judged(
            name, share, size, trace.num_blocks, {policy: run[index].hit_blocks(trace) for policy, run in runs.items()}
        )
        for index, (share, size) in enumerate(zip(SHARES, sizes, strict=True))
    ]


@dataclass(frozen=True)
class Robustness:
    """One policy over all places that say something."""

    policy: str
    mean_closed: float
    worst: float  # against LRU, share of all blocks
    worst_at: str


def robustness(judged: list[Judged]) -> list[Robustness]:
    telling = [case for case in judged if case.telling]
    found = []
    for policy in (*RIVALS, *OTHERS, "predictive"):
        worst = min(telling, key=lambda case: case.against_lru(policy))
        mean = sum(case.closed(policy) or 0.0 for case in telling) / len(telling)
        found.append(Robustness(policy, mean, worst.against_lru(policy), f"{worst.name} at {worst.share:.0%}"))
    return found


def is_robust(found: list[Robustness]) -> bool:
    own = next(one for one in found if one.policy == "predictive")
    return own.worst >= -MOST_LOST and all(own.mean_closed >= one.mean_closed for one in found)


def robustness_table(judged: list[Judged]) -> Table:
    telling = [case for case in judged if case.telling]
    rows: list[list[Any]] = [
        [one.policy, 100 * one.mean_closed, 100 * one.worst, one.worst_at] for one in robustness(judged)
    ]
    best = sum(case.closed(case.best_rival) or 0.0 for case in telling) / len(telling)
    rows.append(["the best rival, chosen afterwards", 100 * best, 0.0, "–"])
    return Table(
        f"Robustness over {len(telling)} places with room",
        [
            Column("policy"),
            Column("room closed, mean", "%", decimals=1),
            Column("worst against lru", "points", decimals=2),
            Column("worst at"),
        ],
        rows,
        "A place is a trace at a size. Those where LRU is within 0.1 points of Belady say nothing and are left out.",
    )


def tables(judged: list[Judged]) -> list[Table]:
    order = (*RIVALS, *OTHERS, "predictive", "belady")
    rates = Table(
        "Prefix hit rate: hit blocks of all blocks, whole trace, %",
        [
            Column("trace"),
            Column("size"),
            Column("blocks", decimals=0),
            *(Column(policy, decimals=2) for policy in order),
        ],
        [
            [
                case.name,
                f"{case.share:.0%}",
                case.capacity,
                *(100 * case.hits[policy] / case.num_blocks for policy in order),
            ]
            for case in judged
        ],
        "Size in shares of the trace's unique blocks.",
    )
    gaps = Table(
        "Share of the room between LRU and Belady that is closed, %",
        [
            Column("trace"),
            Column("size"),
            Column("room, points", decimals=2),
            Column("predictive", decimals=1),
            Column("best rival", decimals=1),
            Column("which"),
            Column("verdict"),
        ],
        [
            [
                case.name,
                f"{case.share:.0%}",
                100 * case.room / case.num_blocks,
                None if case.room == 0 else 100 * (case.closed("predictive") or 0.0),
                None if case.room == 0 else 100 * (case.closed(case.best_rival) or 0.0),
                case.best_rival,
                (
                    "no room"
                    if case.room == 0
                    else "below"
                    if case.hits["predictive"] < case.hits[case.best_rival]
                    else "equal"
                    if case.hits["predictive"] == case.hits[case.best_rival]
                    else "above"
                )
                + ("" if case.telling or case.room == 0 else ", hardly any room"),
            ]
            for case in judged
        ],
        "The best rival is the best of LRU, ARC, S3-FIFO, LIRS and GDSF at that size, so it differs from row to row.",
    )
    return [robustness_table(judged), gaps, rates]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--made", action="store_true", help="the traces of made_traces.py instead of the recorded ones")
    which.add_argument("--traces", nargs="+", choices=list(ALL), default=list(SOURCES))
    arguments = parser.parse_args()
    names = list(MADE) if arguments.made else arguments.traces
    data = Path(os.environ.get("LMC_DATA_DIR", "../shared/data"))
    judged = []
    for name in names:
        source = ALL[name]
        if source.text and arguments.tokenizer is None:
            print(f"{name}: left out, it needs --tokenizer", file=sys.stderr)
            continue
        judged += judge(name, source.read(data, arguments.tokenizer))
    shown = tables(judged)
    for table in shown:
        print_table(table)
    if arguments.out is not None:
        notes = "; ".join(f"{name}: {ALL[name].note}" for name in names)
        metadata = {
            **describe_hardware(),
            **describe_software(),
            "command": "python -m benchmarks.policies " + ("--made" if arguments.made else "--tokenizer TOKENIZER"),
            "traces": notes,
        }
        page = Report(
            f"Eviction policies on {'made' if arguments.made else 'recorded'} traces",
            "",
            [Section("Results", "", shown)],
            metadata,
        )
        write_file(arguments.out / "README.md", report_markdown(page))
    return 0 if is_robust(robustness(judged)) else 1


if __name__ == "__main__":
    sys.exit(main())
