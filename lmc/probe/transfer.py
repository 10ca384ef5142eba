"""Measures every transfer backend by piece size and direction, beside the machine's limit.

The limit is measured in the same run, in turns with the backend. On a CPU it is one memcpy of all the bytes; on a GPU it is one copy by the
copy engine. On a shared machine only ratios within one run can be compared, not the rates of two runs.
"""

from __future__ import annotations

import ctypes
import mmap
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
from lmc.cache.transfer.cuda import Driver
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.cache.transfer.streams import Runtime
from lmc.errors import ConfigError

PIECE_SIZES = tuple(1 << power for power in range(12, 22))  # 4 KiB to 2 MiB
TOTAL_BYTES = 64 << 20  # per copy, well above the caches
WINDOW_BYTES = 8 << 20
TORCH_SHARE = 8  # the reference copies so much less: it is slow, and nobody waits for it
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
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # the reference is compared with one thread
        try:
            return probe_cpu(sizes, total_bytes=total_bytes, repetitions=repetitions)
        finally:
            torch.set_num_threads(before)
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
    """Measure the host backend and torch's copy between two parts of memory.

    With threads None the best number of threads is measured first.

    A turn copies one window of the memory, so it is shorter than a time slice of the operating system's scheduler.
    """
    threads = threads or useful_threads()
    backends: dict[str, Backend] = {"host": HostBackend(1)}
    if threads > 1:
        backends[f"host x{threads}"] = HostBackend(threads)
    backends["torch"] = TorchBackend("cpu")
    blocks, slots = _touched(total_bytes), _touched(total_bytes)
    window = min(total_bytes, WINDOW_BYTES)
    windows = range(0, total_bytes - window + 1, window)
    rows = []
    for direction in Direction:
        source, target = (blocks, slots) if direction is Direction.STORE else (slots, blocks)
        limit = [_timed(partial(_memcpy, source, target, start, window)) for start in windows]
        for size in sizes:
            copies = scattered(blocks.ctypes.data, slots.ctypes.data, total_bytes, size, direction)
            count = window // size
            for label, backend in backends.items():
                taken = count if label != "torch" else max(1, count // TORCH_SHARE)
                parts = [_rows(copies, number * count, taken) for number in range(len(windows))]
                turns = [_timed(partial(backend.execute, part)) for part in parts]
                rates = (taken * size, window)
                rows.append(_compare(label, turns, limit, direction, size, rates, repetitions))
    absent = dict.fromkeys(("dma", "kernel", "staged"), "needs a CUDA device")
    return Probe("cpu", _machine(), rows, absent)


def probe_cuda(
    device: str,
    sizes: Sequence[int] = PIECE_SIZES,
    *,
    total_bytes: int = TOTAL_BYTES,
    repetitions: int = REPETITIONS,
) -> Probe:
    """Measure every device backend between pinned host memory and the device. Raises TransferError when there is no usable driver."""
    import torch

    from lmc.cache.transfer.cuda import load_driver
    from lmc.cache.transfer.runtimes import CudaRuntime

    machine = f"{torch.cuda.get_device_name(device)}, {_machine()}"
    rows = measure_device(device, CudaRuntime(device), load_driver(), sizes, total_bytes, repetitions)
    return Probe(device, machine, rows)


def measure_device(
    device: str, runtime: Runtime, driver: Driver, sizes: Sequence[int], total_bytes: int, repetitions: int
) -> list[ProbeRow]:
    import torch

    from lmc.cache.transfer.backends.device import device_backends, seconds_on

    backends = {**device_backends(device, lambda addresses: True, driver), "torch": TorchBackend(device)}
    blocks = torch.zeros(total_bytes, dtype=torch.uint8, device=device)
    slots = torch.zeros(total_bytes, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    stream = runtime.new_stream()

    def warm(backend: Backend, copies: Descriptors) -> Turn:
        turn = partial(seconds_on, stream, runtime, backend, copies)
        turn()
        return turn

    rows = []
    for direction in Direction:
        whole = scattered(blocks.data_ptr(), slots.data_ptr(), total_bytes, total_bytes, direction)
        limit = [warm(backends["dma"], whole)]
        for size in sizes:
            copies = scattered(blocks.data_ptr(), slots.data_ptr(), total_bytes, size, direction)
            for label, backend in backends.items():
                turns = [warm(backend, copies)]
                rates = (copies.num_bytes, total_bytes)
                rows.append(_compare(label, turns, limit, direction, size, rates, repetitions))
    return rows


def scattered(blocks: int, slots: int, total_bytes: int, size: int, direction: Direction) -> Descriptors:
    """Return pieces in random order on the engine's side and in sequence in the slots: the worst case of a plan."""
    count = total_bytes // size
    places = np.random.default_rng(size).permutation(count).astype(np.uint64) * np.uint64(size)
    engine = np.uint64(blocks) + places
    slot = np.uint64(slots) + np.arange(count, dtype=np.uint64) * np.uint64(size)
    pair = (engine, slot) if direction is Direction.STORE else (slot, engine)
    return Descriptors(*pair, np.full(count, size, dtype=np.uint64), direction)


def _compare(
    label: str,
    turns: Sequence[Turn],
    limit: Sequence[Turn],
    direction: Direction,
    size: int,
    num_bytes: tuple[int, int],
    repetitions: int,
) -> ProbeRow:
    """Measure the backend and the limit in turns, so that a disturbance affects both. num_bytes are those of one turn."""
    rates, limits = [], []
    for _ in range(repetitions):
        for number, turn in enumerate(turns):
            elsewhere = limit[(number + len(limit) // 2) % len(limit)]  # not what the backend leaves in the cache
            limits.append(num_bytes[1] / elsewhere() / 1e9)
            rates.append(num_bytes[0] / turn() / 1e9)
    share = statistics.median(rate / best for rate, best in zip(rates, limits, strict=True))
    return ProbeRow(label, str(direction), size, statistics.median(rates), statistics.median(limits), share)


def _rows(copies: Descriptors, start: int, count: int) -> Descriptors:
    part = slice(start, start + count)
    return Descriptors(copies.src[part], copies.dst[part], copies.size[part], copies.direction)


def _timed(copy: Callable[[], None]) -> Turn:
    def turn() -> float:
        started = time.perf_counter()
        copy()
        return time.perf_counter() - started

    turn()
    return turn


def _touched(size: int) -> npt.NDArray[np.uint8]:
    """Return resident memory that begins at a page, as slots and engines' allocations do."""
    memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    memory.fill(1)
    return memory


def _memcpy(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8], start: int, size: int) -> None:
    ctypes.memmove(target.ctypes.data + start, source.ctypes.data + start, size)


def _machine() -> str:
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
