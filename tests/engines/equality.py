"""The same requests with and without lmc, under everything that can go wrong; greedy tokens must not differ.

A scenario says how engine and cache are set up. Tiers fail for real: bytes of files and of Redis's answers flip, files vanish, connections
break; copies fail inside the engine's process (traffic.py).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lmc.bench.outputs import TIE_LOGPROB
from lmc.cache.tiers.format import stored_bytes
from tests import services
from tests.engines.scenario import kv_bytes_per_token, prompt
from tests.engines.traffic import Chances
from tests.engines.vllm_driver import VllmDriver

CHANCES = Chances(abort=0.15, reset=0.004, reset_running=0.5, failed_load=0.05, failed_store=0.05, slow_load=0.1)


CHUNK, BATCHED_TOKENS = 64, 256


@dataclass(frozen=True)
class Scenario:
    name: str
    about: str
    prefix_caching: bool
    background_load_tokens: int
    tiers: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    engines: int = 1  # data-parallel ones on one node; the requests are dealt out to them


SCENARIOS = (
    Scenario(
        "before the pass",
        "vLLM's prefix cache off; loads before the forward pass; a disk whose files rot",
        False,
        1_000_000,
        ("disk",),
    ),
    Scenario(
        "in the background",
        "vLLM's prefix cache on; loads in the background; a Redis whose answers rot and whose connections break",
        True,
        1,
        ("redis",),
        {"write": "back", "lookup_deadline": 2.0},
    ),
    Scenario(
        "mixed",
        "vLLM's prefix cache on, priority scheduling; long hits in the background, short ones before the pass; both tiers",
        True,
        200,
        ("disk", "redis"),
        {"store_decode": True, "load_deadline": 0.3, "lookup_deadline": 2.0},
        {"scheduling_policy": "priority"},
    ),
    Scenario(
        "two engines",
        "two data-parallel engines, vLLM's prefix cache on, half of the requests each; a folder on disk and Redis in common",
        True,
        200,
        ("disk", "redis"),
        {"engines_on_node": 2, "lookup_deadline": 2.0},
        engines=2,
    ),
)


def random_sessions(seed: int, count: int) -> list[dict[str, Any]]:
    """Prompts that share prefixes of all lengths: continuations of a few documents, of parts of them, and of each other."""
    generator = random.Random(seed)
    documents = [prompt(1000 * seed + number, generator.randrange(100, 300)) for number in range(8)]
    requests: list[dict[str, Any]] = []
    for number in range(count):
        start = generator.choice(documents)
        if requests and generator.random() < 0.4:
            start = generator.choice(requests)["prompt"][:400]
        elif generator.random() < 0.3:
            start = start[: generator.randrange(40, len(start))]
        text = start + prompt(1000 * seed + 500 + number, generator.randrange(1, 120))
        requests.append({"id": f"r{number}", "prompt": text, "output": generator.randrange(8, 48)})
    return requests


@dataclass
class Comparison:
    """Outcomes with lmc against those without. Behind a tie that went the other way a request is free."""

    requests: int = 0
    tokens: int = 0
    cached: int = 0  # tokens that lmc or the engine's own cache gave
    ties: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    logprob_error: float = 0.0  # largest difference of a chosen token's log-probability

    def add(self, name: str, got: dict[str, Any], wanted: dict[str, Any]) -> None:
        self.requests += 1
        self.cached += got["cached"]
        if len(got["tokens"]) != len(wanted["tokens"]):
            self.differences.append(f"{name}: {len(got['tokens'])} tokens instead of {len(wanted['tokens'])}")
        for step, (token, expected) in enumerate(zip(got["tokens"], wanted["tokens"], strict=False)):
            gap = wanted["gaps"][step]
            if token != expected:
                where = f"{name}: token {step} is {token} instead of {expected}, gap {gap:.6f}"
                (self.ties if gap < TIE_LOGPROB else self.differences).append(where)
                break
            self.tokens += 1
            error = abs(got["logprobs"][step] - wanted["logprobs"][step])
            self.logprob_error = max(self.logprob_error, error)
            if error >= TIE_LOGPROB:
                self.differences.append(f"{name}: token {step}'s log-probability is off by {error:.6f}")
                break


@dataclass
class Verdict:
    """One scenario's run."""

    comparison: Comparison
    tally: dict[str, Any]
    media_faults: dict[str, int]
    preemptions: int
    loaded: dict[str, int]  # tier -> tokens that hits took from it
    misses: dict[str, int]  # lookups that ended early, by reason
    failures: dict[str, int]  # operations that failed, by kind
    leftovers: dict[str, int]

    @property
    def faults(self) -> list[str]:
        """What keeps the run from being passed: differences, leftovers, or that it never put lmc to the test."""
        found = self.comparison.differences + [
            f"{number} {name} left over" for name, number in self.leftovers.items() if number
        ]
        if not self.preemptions:
            found.append("no request was preempted")
        if not any(self.loaded.values()):
            found.append("no token was loaded")
        return found

    @property
    def passed(self) -> bool:
        return not self.faults


def run_scenario(
    scenario: Scenario,
    model: Path,
    requests: list[dict[str, Any]],
    wanted: dict[str, dict[str, Any]],
    folder: Path,
    *,
    seed: int,
    host_chunks: int,
    disk_chunks: int,
    blocks: int,
    context: int,
    concurrency: int = 12,
    rot_seconds: float = 0.1,
) -> Verdict:
    """host_chunks, disk_chunks: of each engine. blocks: an engine's KV space, in blocks of 32 tokens. rot_seconds: from one damaged
    file to the next."""
    chunk_bytes = CHUNK * kv_bytes_per_token(model)
    with ExitStack() as stack:
        faults = stack.enter_context(faulty_tiers(folder, scenario.tiers, seed, chunk_bytes, rot_seconds))
        settings = {
            "chunk_tokens": CHUNK,
            "host.capacity": scenario.engines * host_chunks * chunk_bytes,
            "disk.capacity": scenario.engines * disk_chunks * stored_bytes(chunk_bytes),
            "background_load_tokens": scenario.background_load_tokens,
            "metrics.enabled": False,
            "strict": True,
        }
        engines = [
            stack.enter_context(
                VllmDriver(
                    model,
                    settings=settings | faults.settings | scenario.settings,
                    engine_of_node=number if scenario.engines > 1 else None,
                    **{
                        "enable_prefix_caching": scenario.prefix_caching,
                        "max_model_len": context,
                        "max_num_seqs": concurrency,
                        "max_num_batched_tokens": BATCHED_TOKENS,
                        "num_gpu_blocks_override": blocks,
                        **scenario.options,
                    },
                )
            )
            for number in range(scenario.engines)
        ]
        faults.begin()  # not before: a tier that cannot be reached at start is refused, since the settings are strict

        def run(number: int) -> dict[str, Any]:
            dealt = requests[number :: scenario.engines]
            return dict(
                engines[number].call(
                    "traffic", requests=dealt, seed=seed + number, concurrency=concurrency, chances=asdict(CHANCES)
                )
            )

        with ThreadPoolExecutor(scenario.engines) as pool:
            tallies = list(pool.map(run, range(scenario.engines)))
        comparison = Comparison()
        for name, got in sorted(item for tally in tallies for item in tally.pop("outcomes").items()):
            comparison.add(name, got, wanted[name])

        def of_label(name: str, label: str) -> dict[str, int]:
            return _added(engine.call("by_label", name=name, label=label) for engine in engines)

        return Verdict(
            comparison,
            _added(tallies),
            faults.done,
            sum(int(engine.call("engine_metric", name="num_preemptions")) for engine in engines),
            of_label("lmc_hit_tokens_total", "tier"),
            of_label("lmc_misses_total", "reason"),
            of_label("lmc_failures_total", "operation"),
            _added(engine.call("leftovers") for engine in engines),
        )


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, number in one.items():
            total[name] = total.get(name, 0) + number
    return total


@dataclass
class TierFaults:
    """Tiers that fail now and then, from begin() on."""

    settings: dict[str, Any] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)  # what was done to them -> how often
    starts: list[Callable[[], None]] = field(default_factory=list)

    def begin(self) -> None:
        for start in self.starts:
            start()


@contextmanager
def faulty_tiers(
    folder: Path, names: tuple[str, ...], seed: int, chunk_bytes: int, rot_seconds: float
) -> Iterator[TierFaults]:
    faults = TierFaults()
    generator = random.Random(seed)
    with ExitStack() as stack:
        if "disk" in names:
            faults.settings |= {"disk.path": str(folder / "disk"), "disk.fsync": False}
            faults.starts.append(stack.enter_context(_rot(folder / "disk", generator, faults.done, rot_seconds)))
        if "redis" in names:
            server = stack.enter_context(services.redis_server(folder))
            proxy = stack.enter_context(services.proxy(server.port))
            faults.settings |= {"redis.url": f"redis://{services.LOCAL}:{proxy.port}/0"}
            unreliable = _unreliable(generator, faults.done, chunk_bytes)
            faults.starts.append(partial(setattr, proxy, "to_client", unreliable))
        yield faults


@contextmanager
def _rot(folder: Path, generator: random.Random, done: dict[str, int], seconds: float) -> Iterator[Callable[[], None]]:
    """From the call of what is returned on, every so many seconds one file's bit flips, or its end or all of it is lost."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            files = [file for file in folder.glob("v*/*/r*/??/*") if file.is_file()]
            if not files:
                continue
            file, what = generator.choice(files), generator.choice(["flipped", "cut", "removed"])
            try:
                if what == "removed":
                    file.unlink()
                else:
                    with file.open("r+b") as stream:
                        size = stream.seek(0, 2)
                        if size == 0:
                            continue  # nothing was left of it
                        place = generator.randrange(size)
                        if what == "cut":
                            stream.truncate(place)
                        else:
                            stream.seek(place)
                            byte = stream.read(1)
                            stream.seek(place)
                            stream.write(bytes([byte[0] ^ 0x10]))
            except FileNotFoundError:
                continue  # the cache was quicker
            done[f"disk: {what}"] = done.get(f"disk: {what}", 0) + 1

    thread = threading.Thread(target=work, daemon=True)
    try:
        yield thread.start
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()


def _unreliable(generator: random.Random, done: dict[str, int], chunk_bytes: int) -> services.Fault:
    """A bit flips in a tenth of the chunks; a connection breaks in a fiftieth of them, and in a five-hundredth of the short answers."""

    def fault(data: bytes) -> bytes:
        share = len(data) / chunk_bytes  # an answer comes in pieces
        drawn = generator.random()
        if drawn < max(0.002, 0.02 * share):
            done["redis: reset"] = done.get("redis: reset", 0) + 1
            return services.Last(data[: len(data) // 2])
        if drawn > 1 - 0.1 * share and len(data) > 4096:
            done["redis: flipped"] = done.get("redis: flipped", 0) + 1
            place = len(data) // 2
            return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        return data

    return fault
