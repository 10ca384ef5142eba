"""Everything at once on a real engine: python -m benchmarks.chaos --minutes 20 [--seed N] [--out FOLDER].

64 streams of a tiny model share a KV space for a few of them and a cache with all tiers: host, disk and a real redis-server. Streams are
aborted and caches reset, copies fail, Redis is killed and started again or does not answer, the disk does not answer, chunks are forged
although they are authenticated. Every answer is compared with the one of the engine without the cache. Exits with 1 when one is wrong,
or when something is not as it was at the start.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos_faults import tormented
from benchmarks.chaos_report import Chaos, Sample, write_chaos
from lmc.cache.tiers.format import stored_bytes
from tests.engines.equality import BATCHED_TOKENS, CHANCES, CHUNK, Comparison
from tests.engines.scenario import kv_bytes_per_token
from tests.engines.tiny_model import VOCABULARY, make_tiny_llama
from tests.engines.traffic import Chances
from tests.engines.vllm_driver import VllmDriver

STREAMS = 64
CONTEXT = 640
BLOCKS = 120  # of 32 tokens: a dozen streams
HOST_CHUNKS, DISK_CHUNKS = 48, 160
PROMPTS = 120
CALM = Chances()
EVERY_S = 1.5  # from one fault of a tier to the next


def make_prompts(seed: int) -> list[dict[str, Any]]:
    """Conversations: each prompt continues one of a few heads, or another prompt."""
    choose = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(PROMPTS):
        before = choose.choice(prompts)[: choose.randrange(64, 400)] if prompts and choose.random() < 0.7 else []
        length = choose.randrange(80, CONTEXT - 60)
        fresh = [choose.randrange(2, VOCABULARY) for _ in range(max(20, length - len(before)))]
        prompts.append([*before, *fresh][: CONTEXT - 60])
    return [
        {"id": str(number), "prompt": prompt, "output": 4 + number % 5 * 8} for number, prompt in enumerate(prompts)
    ]


class Run:
    """One engine with the cache; requests are sent in rounds."""

    def __init__(self, engine: VllmDriver, requests: list[dict[str, Any]], seed: int) -> None:
        self.engine = engine
        self.comparison = Comparison()
        self.tally: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self._requests = requests
        self._wanted: dict[str, dict[str, Any]] = {}
        self._choose = random.Random(seed)
        self._seed = seed
        self._rounds = 0
        self._started = time.monotonic()
        self._process = psutil.Process(engine.pid)

    def learn(self, wanted: dict[str, dict[str, Any]]) -> None:
        self._wanted = wanted

    def round(self, count: int, chances: Chances) -> None:
        self._rounds += 1
        sent = [
            {**one, "id": f"{self._rounds}/{number}/{one['id']}"}
            for number, one in enumerate(self._choose.choices(self._requests, k=count))
        ]
        seed = self._seed * 100_003 + self._rounds
        tally = self.engine.call(
            "traffic", requests=sent, seed=seed, concurrency=STREAMS, chances=asdict(chances), most=True
        )
        for name, got in sorted(tally.pop("outcomes").items()):
            self.comparison.add(name, got, self._wanted[name.rpartition("/")[2]])
        for name in ("steps", "aborted", "resets", "failed_loads", "failed_stores"):
            self.tally[name] += tally[name]
        self.tally["requests"] += count

    def sample(self) -> None:
        self.samples.append(
            Sample(
                time.monotonic() - self._started,
                self.tally["requests"],
                self._process.memory_info().rss,
                self._process.num_fds(),
                self._process.num_threads(),
            )
        )

    def loaded(self) -> dict[str, int]:
        found: dict[str, int] = self.engine.call("by_label", name="lmc_hit_tokens_total", label="tier")
        return found


def run_chaos(model: Path, folder: Path, minutes: float, seed: int, round_size: int) -> Chaos:
    requests = make_prompts(seed)
    options: dict[str, Any] = {
        "max_model_len": CONTEXT,
        "max_num_seqs": STREAMS,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "enable_prefix_caching": True,
    }
    with VllmDriver(model, settings=None, **options) as plain:
        wanted = plain.call("traffic", requests=requests, seed=seed, concurrency=12, chances={})["outcomes"]
    chunk_bytes = CHUNK * kv_bytes_per_token(model)
    with tormented(folder, seed, EVERY_S) as tormentor:
        settings = {
            "chunk_tokens": CHUNK,
            "host.capacity": HOST_CHUNKS * chunk_bytes,
            "disk.path": str(tormentor.disk),
            "disk.capacity": DISK_CHUNKS * stored_bytes(chunk_bytes),
            "disk.fsync": False,
            "redis.url": tormentor.redis_url,
            "redis.timeout": 1,
            "load_deadline": 0.5,
            "lookup_deadline": 0.5,
            "auth_key": f"a key of this run only, {random.SystemRandom().random()}",
            "metrics.enabled": False,
            "strict": True,
        }
        with VllmDriver(model, settings=settings, num_gpu_blocks_override=BLOCKS, **options) as engine:
            engine.call("hang_disk_while", marker=str(tormentor.hung))
            run = Run(engine, requests, seed)
            run.learn(wanted)
            for chances in (CALM, CHANCES):  # every thread and connection that there will be
                run.round(2 * round_size, chances)
            run.sample()
            tormentor.begin()
            until = time.monotonic() + 60 * minutes
            while time.monotonic() < until:
                run.round(round_size, CHANCES)
                run.sample()
            tormentor.stop()
            engine.call("until_nothing_hangs")
            before = run.loaded()
            run.round(2 * round_size, CALM)
            loaded = run.loaded()
            leftovers = engine.call("leftovers")
            run.sample()
            engine.call("reset")
            state = engine.call("slots")
            return Chaos(
                minutes,
                seed,
                run.comparison,
                dict(run.tally),
                dict(tormentor.done),
                loaded,
                {tier: tokens - before.get(tier, 0) for tier, tokens in loaded.items()},
                engine.call("by_label", name="lmc_misses_total", label="reason"),
                engine.call("by_label", name="lmc_failures_total", label="operation"),
                int(engine.call("engine_metric", name="num_preemptions")),
                run.samples,
                leftovers,
                {tier: used for tier, (used, _) in state["usage"].items()},
                (state["free_host_slots"], state["usage"]["host"][1]),
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, default=192, help="requests between two looks at the process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_llama(folder / "tiny")
        chaos = run_chaos(model, folder, options.minutes, options.seed, options.round)
    command = f"python -m benchmarks.chaos --minutes {options.minutes:g} --seed {options.seed}"
    return int(not write_chaos(chaos, options.out, command))


if __name__ == "__main__":
    sys.exit(main())
