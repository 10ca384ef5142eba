"""A request's way through the host tier without an engine: lookup, plan, copies and report of one instance, over real memory: its own, or
a node's."""

from __future__ import annotations

import ctypes
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lmc.cache.keys import Namespace
from lmc.cache.node.open import open_scheduler, open_worker
from lmc.cache.plan import Plan
from lmc.cache.scheduler.cache import Identity
from lmc.cache.settings import load_settings
from lmc.cache.transfer.layout import KVLayout, Layer, Piece, Region

CHUNK_TOKENS = 256
_NOBODY = Identity()


@dataclass(frozen=True)
class Shape:
    """A paged KV cache as engines on a CPU lay it out: for every layer the keys of all blocks, then their values."""

    name: str
    block_tokens: int
    value_bytes: int
    layers: int = 8
    heads: int = 8
    head_size: int = 128

    @property
    def piece_bytes(self) -> int:
        """One block's keys, or values, in one layer: the contiguous piece that a copy moves."""
        return self.block_tokens * self.heads * self.head_size * self.value_bytes

    def num_bytes(self, tokens: int) -> int:
        return tokens // self.block_tokens * 2 * self.layers * self.piece_bytes


class HostPath:
    """One instance with a slab of `requests` prompts of `tokens` tokens, and room in the KV cache for two."""

    def __init__(self, shape: Shape, tokens: int, requests: int, node: Path | None = None) -> None:
        """node: socket of an lmc node that has the slab's memory; else the instance has its own."""
        self.lookups: list[float] = []  # seconds of each lookup that found a whole prompt
        self.num_bytes = shape.num_bytes(tokens)
        self._tokens = tokens
        self._num_blocks = 2 * tokens // shape.block_tokens + 1
        plane = self._num_blocks * shape.piece_bytes
        self._kv = _touched(2 * shape.layers * plane)
        self._spare = _touched(self.num_bytes)
        base = self._kv.ctypes.data
        layout = KVLayout(
            "benchmark",
            "cpu",
            shape.block_tokens,
            self._num_blocks,
            tuple(Region(base + n * plane, shape.piece_bytes, shape.piece_bytes) for n in range(2 * shape.layers)),
            tuple(
                Layer((f"layer{n}",), (Piece(2 * n, 0, shape.piece_bytes), Piece(2 * n + 1, 0, shape.piece_bytes)))
                for n in range(shape.layers)
            ),
            f"benchmark {shape}",
        )
        flags = {"host.capacity": requests * self.num_bytes, "chunk_tokens": CHUNK_TOKENS, "metrics.enabled": False}
        attached = {"node": str(node), "node_deadline": 10.0} if node is not None else {}
        config = load_settings(None, {}, flags | {"background_load_tokens": 2 * tokens} | attached).config
        namespace = Namespace("benchmark", shape.name, "", "", layout.fingerprint, CHUNK_TOKENS, 1)
        self._worker = open_worker(config, namespace, layout, rank=0, num_ranks=1)
        self._engine = open_scheduler(config, [self._worker.ready()], shape.block_tokens)
        self._random = random.Random(1)
        self._served = 0

    def turn(self) -> tuple[float, float]:
        """Seconds to store a new prompt, and to load it again; checks every byte. Blocks are in random order."""
        prompt = [self._random.randrange(150_000) for _ in range(self._tokens)] + [0]  # the last token is never loaded
        blocks = self._random.sample(range(self._num_blocks), self._num_blocks)
        count = self._num_blocks // 2
        here, there = [*blocks[:count], 0], [*blocks[count : 2 * count], 0]
        planes = self._kv.reshape(
            -1, self._num_blocks, self._kv.size // self._num_blocks // len(self._worker.copier.layout.regions)
        )
        planes[:, blocks[:count]] = np.frombuffer(self._random.randbytes(planes[:, 0].size), np.uint8).reshape(
            len(planes), 1, -1
        )
        planes[:, blocks[:count], :8] = np.arange(count, dtype=np.uint64).view(np.uint8).reshape(count, 8)
        name = self._new_name()
        assert self._engine.lookup(name, prompt, 0, _NOBODY) == 0
        self._engine.admit(name, 0, here)
        store = self._timed_store(name, prompt, here)
        self._engine.finish(name)
        name = self._new_name()
        load = self._timed_load(name, prompt, there)
        self._engine.finish(name)
        assert (planes[:, blocks[:count]] == planes[:, blocks[count : 2 * count]]).all(), "wrong bytes were loaded"
        return store, load

    def memcpy(self) -> float:
        """Seconds to copy as many bytes in one piece."""
        started = time.perf_counter()
        ctypes.memmove(self._spare.ctypes.data, self._kv.ctypes.data, self.num_bytes)
        return time.perf_counter() - started

    def close(self) -> None:
        self._engine.close()
        self._worker.close()

    def _timed_store(self, name: str, prompt: list[int], blocks: list[int]) -> float:
        started = time.perf_counter()
        self._engine.store(name, prompt, len(prompt), len(prompt), blocks)
        self._step(self._engine.take_plan())
        return time.perf_counter() - started

    def _timed_load(self, name: str, prompt: list[int], blocks: list[int]) -> float:
        started = time.perf_counter()
        gain = self._engine.lookup(name, prompt, 0, _NOBODY)
        self.lookups.append(time.perf_counter() - started)
        assert gain == self._tokens, f"{gain} of {self._tokens} tokens can be loaded"
        self._engine.admit(name, gain, blocks)
        self._step(self._engine.take_plan())
        return time.perf_counter() - started

    def _step(self, plan: Plan) -> None:
        self._worker.begin(plan)
        self._worker.end(plan)
        assert not self._worker.take_failed_blocks()
        self._engine.apply(self._worker.take_report())

    def _new_name(self) -> str:
        self._served += 1
        return f"request {self._served}"


def _touched(size: int) -> np.ndarray:
    """Allocated as engines on a CPU allocate their KV cache, so that the kernel gives it the same kind of pages."""
    return torch.ones(size, dtype=torch.uint8).numpy()
