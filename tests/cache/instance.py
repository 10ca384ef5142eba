"""An engine that only moves bytes: a CacheScheduler, its workers and KV blocks whose right content is known for every token."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import numpy as np

from lmc.cache.config import CacheConfig
from lmc.cache.keys import Namespace
from lmc.cache.plan import Plan, Report
from lmc.cache.scheduler.cache import CacheScheduler, Identity
from lmc.cache.settings import load_settings
from lmc.cache.share import ALONE, Share, of_directory
from lmc.cache.tiers.format import FORMAT
from lmc.cache.transfer.backends import Backend
from lmc.cache.transfer.common_slots import CommonSlots
from lmc.cache.transfer.layout import KVLayout, Layer, Piece, Region
from lmc.cache.transfer.planner import Descriptors
from lmc.cache.transfer.runtimes import ThreadRuntime
from lmc.cache.transfer.streams import TransferStreams
from lmc.cache.worker.block_copies import BlockCopier
from lmc.cache.worker.common import share_slots
from lmc.cache.worker.open import open_worker

BLOCK_TOKENS = 4
CHUNK_TOKENS = 8
BLOCK_BYTES = 96
NUM_BLOCKS = 64
NUM_LAYERS = 2
CHUNK_BYTES = NUM_LAYERS * BLOCK_BYTES * CHUNK_TOKENS // BLOCK_TOKENS
NOBODY = Identity()
T = TypeVar("T")


def settings(**values: object) -> CacheConfig:
    """host_capacity="..." stands for host.capacity."""
    flags = {"chunk_tokens": CHUNK_TOKENS, "host.capacity": 64 * 4096, "metrics.enabled": False, "disk.fsync": False}
    flags["disk.capacity"] = "1MiB"
    sections = ("host", "disk", "redis", "s3", "mooncake", "metrics", "admin", "clients")
    for name, value in values.items():
        section, _, rest = name.partition("_")
        flags[f"{section}.{rest}" if section in sections and rest else name] = value
    return load_settings(None, {}, flags).config


def right_bytes(rank: int, tokens: Sequence[int], block: int, salt: str = "") -> np.ndarray:
    """What a block must hold: it depends on the rank and on every token up to its end. (layers, bytes)"""
    seed = f"{rank}/{salt}/{list(tokens[: (block + 1) * BLOCK_TOKENS])}".encode()
    raw = hashlib.shake_128(seed).digest(NUM_LAYERS * BLOCK_BYTES)
    return np.frombuffer(raw, dtype=np.uint8).reshape(NUM_LAYERS, BLOCK_BYTES)


@dataclass
class Served:
    loaded: int  # tokens
    sources: dict[str, int]
    miss: object
    polls: int


@dataclass
class Instance:
    config: CacheConfig
    num_ranks: int = 1
    clock: Callable[[], float] = time.monotonic
    model: str = "test"
    streams: bool = False  # copies on threads that stand for a device's streams
    by_layer: bool = False  # the forward pass waits for one layer of its loads after the other
    part: tuple[int, int] = (0, 1)  # of a common disk folder
    share: Share = ALONE
    alike: int = 1  # neighbouring ranks that hold the same KV, and have their slots in common
    serial: int = 0
    reports: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kv = [np.zeros((NUM_LAYERS, NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8) for _ in range(self.num_ranks)]
        self.workers = []
        layouts = [_layout(blocks) for blocks in self.kv]
        parts = self.num_ranks // self.alike
        named = [Namespace("test", self.model, "", "u8", one.fingerprint, CHUNK_TOKENS, parts) for one in layouts]
        described = list(zip(named, layouts, strict=True))
        commons = agree(self.config, described, self.alike) if self.alike > 1 else [None] * self.num_ranks
        for rank, ((namespace, layout), common) in enumerate(zip(described, commons, strict=True)):
            worker = open_worker(self.config, namespace, layout, rank=rank, num_ranks=parts, common=common)
            if common is not None:
                os.close(common.descriptor)
            if self.streams:
                copier = worker.copier
                slow = Slow(copier.backend)
                worker.copier = BlockCopier(layout, copier._slab, slow, TransferStreams(ThreadRuntime(), slow))
            self.workers.append(worker)
        self.scheduler = CacheScheduler(
            of_directory(self.config, self.share),
            [worker.ready() for worker in self.workers],
            BLOCK_TOKENS,
            clock=self.clock,
            part=self.part,
        )

    def serve(self, tokens: Sequence[int], identity: Identity = NOBODY, *, settle: bool = True) -> Served:
        """A request from its arrival to its end; checks every loaded byte and fills in what was not loaded."""
        self.serial += 1
        name = f"r{self.serial}"
        polls = 0
        until = time.monotonic() + 120
        while (gain := self.scheduler.lookup(name, tokens, 0, identity)) is None:
            polls += 1
            self.pump()
            time.sleep(0.001)
            assert time.monotonic() < until, "the lookup never ended"
        num_blocks = -(-len(tokens) // BLOCK_TOKENS)
        blocks = [(self.serial * 7 + 3 * index) % NUM_BLOCKS for index in range(num_blocks)]
        for worker in self.workers:
            worker.fence(set(blocks))
        for kv in self.kv:
            kv[:, blocks] = 0xEE
        self.scheduler.admit(name, gain, blocks)
        plan = self.scheduler.take_plan()
        failed: set[int] = set()
        salt = f"{identity.tenant}/{identity.salt}/{identity.lora}"
        for rank, worker in enumerate(self.workers):
            worker.begin(plan, by_layer=self.by_layer)
            right = True
            for layer in range(NUM_LAYERS):
                worker.wait_layer(f"layer{layer}")
                for index in range(gain // BLOCK_TOKENS):
                    wanted = right_bytes(rank // self.alike, tokens, index, salt)[layer]
                    right = right and bool((self.kv[rank][layer, blocks[index]] == wanted).all())
            failed |= worker.take_failed_blocks()
            assert failed or right, "wrong bytes were loaded"
        loaded = 0 if failed else gain
        for rank, kv in enumerate(self.kv):
            for index in range(loaded // BLOCK_TOKENS, len(tokens) // BLOCK_TOKENS):
                kv[:, blocks[index]] = right_bytes(rank // self.alike, tokens, index, salt)
        for worker in self.workers:
            worker.end(plan)
        self.pump()
        self.scheduler.store(name, tokens, len(tokens), len(tokens), blocks)
        plan = self.scheduler.take_plan()
        for worker in self.workers:
            worker.begin(plan)
            worker.end(plan)
        sources, miss = dict(self.scheduler.loaded_from(name)), self.scheduler.explain(name)["miss"]
        self.scheduler.finish(name)
        self.pump()
        if settle:
            self.settle()
        return Served(loaded, sources, miss, polls)

    def pump(self) -> None:
        """An engine step without requests."""
        report = Report()
        for worker in self.workers:
            report = report.merge(worker.take_report())
        self.reports.append(report)
        self.scheduler.apply(report)
        plan = self.scheduler.take_plan()
        for worker in self.workers:
            worker.begin(Plan(tier_copies=plan.tier_copies))

    def settle(self) -> None:
        until = time.monotonic() + 120
        while self.scheduler.busy:
            self.pump()
            time.sleep(0.001)
            assert time.monotonic() < until, "copies never ended"
        self.scheduler.directory.check()

    def metric(self, name: str, **labels: str) -> float:
        return self.scheduler.metrics.registry.get_sample_value(f"lmc_{name}", labels) or 0.0

    def close(self) -> None:
        self.scheduler.close()
        for worker in self.workers:
            worker.close()


def agree(
    config: CacheConfig, described: Sequence[tuple[Namespace, KVLayout] | Exception], alike: int
) -> list[CommonSlots | Exception | None]:
    """What share_slots gives to each rank of a node, or raises there. Threads stand for the ranks' processes."""
    num_ranks = len(described)
    given: list[object] = [None] * num_ranks
    meeting = threading.Barrier(num_ranks, timeout=60)

    def of_rank(rank: int) -> CommonSlots | Exception | None:
        def gather(one: T) -> list[T]:
            given[rank] = one
            meeting.wait()
            of_all = cast("list[T]", list(given))
            meeting.wait()
            return of_all

        def describe() -> tuple[Namespace, KVLayout]:
            one = described[rank]
            if isinstance(one, Exception):
                raise one
            return one

        try:
            return share_slots(config, describe, rank=rank, alike=alike, num_ranks=num_ranks, gather=gather)[1]
        except Exception as error:  # noqa: BLE001  it is the test's own
            return error

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(of_rank, range(num_ranks)))


@dataclass
class Slow:
    """A backend whose copies come late, so that a missing wait shows."""

    backend: Backend
    name: str = "slow"

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        time.sleep(0.003)
        self.backend.execute(descriptors, stream)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def start(
    instances: list[Instance], num_ranks: int = 1, clock: Callable[[], float] = time.monotonic, **values: object
) -> Instance:
    """An instance that the fixture `instances` closes after the test."""
    instances.append(Instance(settings(**values), num_ranks, clock))
    return instances[-1]


def prompt(seed: int, num_tokens: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 1000, num_tokens)]


def serve_side_by_side(pair: Sequence[Instance], turns: int) -> None:
    """Two instances at the same time, with prompts of which some are common."""

    def work(instance: Instance, seed: int) -> None:
        for turn in range(turns):
            instance.serve(prompt((turn * seed) % 7, 20 + 8 * (turn % 4)))
            instance.serve(prompt(100 * seed + turn % 5, 36))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, pair, (1, 3)))


def chunk_files(folder: Path, rank: int = 0) -> list[Path]:
    return sorted(path for path in folder.glob(f"{FORMAT}/*/r{rank}/??/*") if path.is_file())


def _layout(blocks: np.ndarray) -> KVLayout:
    """One region per layer, as in a layer-outermost cache."""
    base = blocks.ctypes.data
    layer_bytes = NUM_BLOCKS * BLOCK_BYTES
    return KVLayout(
        "test",
        "cpu",
        BLOCK_TOKENS,
        NUM_BLOCKS,
        tuple(Region(base + layer * layer_bytes, BLOCK_BYTES, BLOCK_BYTES) for layer in range(NUM_LAYERS)),
        tuple(Layer((f"layer{layer}",), (Piece(layer, 0, BLOCK_BYTES),)) for layer in range(NUM_LAYERS)),
        f"test blocks of {BLOCK_BYTES} bytes",
    )
