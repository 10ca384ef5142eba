"""Measures every transfer backend over piece sizes and directions, next to what the machine can do at all.

The limit is measured in the same run, turn by turn with the backend: one memcpy of all the bytes on the CPU, one copy by the bare copy
engine on a GPU. Ratios of one run mean something on a shared machine; rates of two runs don't.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.backends.host import HostBackend, useful_threads
from lmc.cache.transfer.backends.reference import TorchBackend
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.errors import ConfigError

PIECE_SIZES = tuple(1 << power for power in range(12, 22))  # 4 KiB to 2 MiB
TOTAL_BYTES = 64 << 20  # per copy, well above the caches
TORCH_BYTES = 4 << 20  # the reference is slow, and nobody waits for it
REPETITIONS = 7


@dataclass(frozen=True)
class ProbeRow:
    """Medians of one backend, direction and piece size; GB are 1e9 bytes."""

    backend: str
    direction: str
    piece_bytes: int
    gb_per_s: float
    limit_gb_per_s: float
    share: float  # median over the turns of the backend's rate by the limit's in the same turn


@dataclass(frozen=True)
class Probe:
    device: str
    machine: str
    rows: list[ProbeRow]
    absent: dict[str, str] = field(default_factory=dict)  # backend -> why it was not measured


Turn = Callable[[], float]  # copies once, returns seconds


def probe_device(
    device: str, sizes: Sequence[int] = PIECE_SIZES, *, total_bytes: int = TOTAL_BYTES, repetitions: int = REPETITIONS
) -> Probe:
    """device: "cpu", "cuda:0" or "auto". Raises ConfigError for what cannot be measured here."""
    import torch

    for size in sizes:
        if not 16 <= size <= total_bytes:
            raise ConfigError(f"a piece of {size} bytes cannot be measured with copies of {total_bytes} bytes")
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return probe_cpu(sizes, total_bytes=total_bytes, repetitions=repetitions)
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ConfigError(f"there is no device {device} here; use --device cpu")
    return probe_cuda(device, sizes, total_bytes=total_bytes, repetitions=repetitions)


def probe_cpu(
    sizes: Sequence[int] = PIECE_SIZES,
    *,
    total_bytes: int = TOTAL_BYTES,
    repetitions: int = REPETITIONS,
    threads: int | None = None,
) -> Probe:
    """Host backend and torch reference between two parts of memory; threads None measures what helps."""
    threads = threads or useful_threads()
    backends: dict[str, Backend] = {"host": HostBackend(1)}
    if threads > 1:
        backends[f"host x{threads}"] = HostBackend(threads)
    backends["torch"] = TorchBackend("cpu")
    blocks, slots = _touched(total_bytes), _touched(total_bytes)
    rows = []
    for direction in Direction:
        source, target = (blocks, slots) if direction is Direction.STORE else (slots, blocks)
        limit = _timed(partial(_memcpy, source, target))
        for size in sizes:
            copies = scattered(blocks.ctypes.data, slots.ctypes.data, total_bytes, size, direction)
            for label, backend in backends.items():
                if label == "torch":
                    copies = _first(copies, TORCH_BYTES)
                turn = _timed(partial(backend.execute, copies))
                rows.append(_compare(label, turn, limit, direction, size, copies.num_bytes, total_bytes, repetitions))
    absent = dict.fromkeys(("dma", "kernel", "staged"), "needs a CUDA device")
    return Probe("cpu", _machine(), rows, absent)


def probe_cuda(
    device: str,
    sizes: Sequence[int] = PIECE_SIZES,
    *,
    total_bytes: int = TOTAL_BYTES,
    repetitions: int = REPETITIONS,
) -> Probe:
    """Every device backend between pinned host memory and the device. Raises TransferError without a usable driver."""
    import torch

    from lmc.cache.transfer.backends.device import device_backends
    from lmc.cache.transfer.runtimes import CudaRuntime

    runtime = CudaRuntime(device)
    backends = {**device_backends(device, lambda addresses: True), "torch": TorchBackend(device)}
    blocks = torch.zeros(total_bytes, dtype=torch.uint8, device=device)
    slots = torch.zeros(total_bytes, dtype=torch.uint8, pin_memory=True)
    stream = runtime.new_stream()

    def timed(backend: Backend, copies: Descriptors) -> Turn:
        def turn() -> float:
            torch.cuda.synchronize(device)
            started = stream.record()
            stream.run(partial(backend.execute, copies))
            ended = stream.record()
            ended.synchronize()
            return ended.seconds_since(started)

        turn()  # compile, load, allocate
        return turn

    rows = []
    for direction in Direction:
        whole = scattered(blocks.data_ptr(), slots.data_ptr(), total_bytes, total_bytes, direction)
        limit = timed(backends["dma"], whole)
        for size in sizes:
            copies = scattered(blocks.data_ptr(), slots.data_ptr(), total_bytes, size, direction)
            for label, backend in backends.items():
                turn = timed(backend, copies)
                rows.append(_compare(label, turn, limit, direction, size, copies.num_bytes, total_bytes, repetitions))
    return Probe(device, f"{torch.cuda.get_device_name(device)}, {_machine()}", rows)


def scattered(blocks: int, slots: int, total_bytes: int, size: int, direction: Direction) -> Descriptors:
    """Pieces in random order on the engine's side and one after the other in the slots: the worst case that a plan can be."""
    count = total_bytes // size
    places = np.random.default_rng(size).permutation(count).astype(np.uint64) * np.uint64(size)
    engine = np.uint64(blocks) + places
    slot = np.uint64(slots) + np.arange(count, dtype=np.uint64) * np.uint64(size)
    pair = (engine, slot) if direction is Direction.STORE else (slot, engine)
    return Descriptors(*pair, np.full(count, size, dtype=np.uint64), direction)


def _compare(
    label: str,
    turn: Turn,
    limit: Turn,
    direction: Direction,
    size: int,
    num_bytes: int,
    limit_bytes: int,
    repetitions: int,
) -> ProbeRow:
    """Backend and limit by turns, so that a disturbance hits both alike."""
    rates, limits = [], []
    for _ in range(repetitions):
        limits.append(limit_bytes / limit() / 1e9)
        rates.append(num_bytes / turn() / 1e9)
    share = statistics.median(rate / best for rate, best in zip(rates, limits, strict=True))
    return ProbeRow(label, str(direction), size, statistics.median(rates), statistics.median(limits), share)


def _first(copies: Descriptors, num_bytes: int) -> Descriptors:
    count = max(1, num_bytes // int(copies.size[0]))
    return Descriptors(copies.src[:count], copies.dst[:count], copies.size[:count], copies.direction)


def _timed(copy: Callable[[], None]) -> Turn:
    def turn() -> float:
        started = time.perf_counter()
        copy()
        return time.perf_counter() - started

    turn()
    return turn


def _touched(size: int) -> npt.NDArray[np.uint8]:
    return np.ones(size, dtype=np.uint8)


def _memcpy(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    ctypes.memmove(target.ctypes.data, source.ctypes.data, len(source))


def _machine() -> str:
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
