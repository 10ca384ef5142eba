"""The memory of the host tier: one mapping of equal slots, made ready piece by piece in the background.

The mapping is private and anonymous, which is what the kernel gives huge pages to: shared memory, which ranks with the same KV have in
common, gets them under a switch of its own, off by default. A piece is bound to the GPU's memory node, touched by several threads and
registered with the driver, in this order; then its slots are ready. Registering in one call would hold the driver's lock for minutes (0.1 s
per GB), and start-up waits for none of it. What
fails leaves pageable memory and a text in `problem`: slower, never wrong.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmc.errors import CaptureError, TierError, TransferError
from lmc.units import format_size

logger = logging.getLogger(__name__)

PAGE = mmap.PAGESIZE
PIECE_BYTES = 1 << 30
HUGE_PAGE = 2 << 20
HUGE_PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHARED_HUGE_PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
TOUCH_BYTES = 32 << 20  # one thread's bite; close() waits for no more than this
RETRY_SECONDS = 0.05  # until pinning is tried again after it was refused because a CUDA graph was being captured

_POPULATE_WRITE = 23  # madvise: fault pages in for writing without changing them (Linux 5.14)
_PREFERRED = (
    1  # mbind: this node, others when it is full; binding strictly would have the kernel kill the engine instead
)
_MBIND = {"x86_64": 237, "aarch64": 235}


class Registrar(Protocol):
    """Pins memory for a device. lmc.cache.transfer.cuda has the real one."""

    def register(self, address: int, size: int) -> None:
        """Raises TransferError; the memory is then pageable as before. CaptureError: it may be tried again."""

    def unregister(self, address: int) -> None:
        """Raises TransferError."""


class Slab:
    """num_slots slots of slot_bytes, each starting on a page, in memory that never moves or grows."""

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        *,
        registrar: Registrar | None = None,
        numa_node: int | None = None,
        threads: int = 8,
        piece_bytes: int = PIECE_BYTES,
        common: int | None = None,
    ) -> None:
        """Maps the memory and starts to make it ready; takes microseconds. Raises TierError when it cannot be mapped.

        common: descriptor of memory of slab_bytes() that other processes map, too; the caller closes it.
        """
        if num_slots < 1 or slot_bytes < 1:
            raise TierError(f"host tier: {num_slots} slots of {slot_bytes} bytes cannot be mapped; raise host.capacity")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        size = slab_bytes(num_slots, slot_bytes)
        self.slot_stride = size // num_slots
        self.problem = ""  # why memory is not as it should be, for logs and metrics
        try:
            if common is None:
                memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                memory = mmap.mmap(common, size)
        except (OSError, ValueError, OverflowError) as error:
            raise TierError(f"host tier: cannot map {format_size(size)}: {error}; lower host.capacity") from error
        if registrar is not None:
            memory.madvise(mmap.MADV_DONTFORK)  # a child would get copies of pinned pages
        mapped = np.frombuffer(memory, dtype=np.uint8)  # keeps the mapping while a view of it lives
        start = -mapped.ctypes.data % HUGE_PAGE if common is None else 0  # the same bytes of the file in every process
        self._bytes = mapped[start : start + size]
        self.base = self._bytes.ctypes.data  # address of slot 0; the others follow slot_stride bytes apart
        if size >= HUGE_PAGE and (
            failure := _ask_for_huge_pages(memory, HUGE_PAGES_FILE if common is None else SHARED_HUGE_PAGES_FILE)
        ):
            self.degrade(f"pages are small, which slows touching, pinning and copies: {failure}")
        self._registrar = registrar
        self._numa_node = numa_node
        self._threads = max(1, min(threads, os.cpu_count() or 1))
        self._slots_per_piece = max(1, piece_bytes // self.slot_stride)
        self._ready = 0
        self.pinned_slots = 0  # slots below this number are registered
        edges = range(self._slots_per_piece, num_slots, self._slots_per_piece) if registrar is not None else ()
        # Addresses where one registered piece ends and the next begins: plan() keeps copies from crossing them.
        self.boundaries = np.array([self.base + slot * self.slot_stride for slot in edges], dtype=np.uint64)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._worker = threading.Thread(target=self._make_ready, name="lmc-slab", daemon=True)
        self._worker.start()

    def address(self, slot: int) -> int:
        """Where a slot starts in this process."""
        self._check(slot)
        return self.base + slot * self.slot_stride

    def view(self, slot: int) -> memoryview:
        """A slot's bytes, writable in place."""
        self._check(slot)
        start = slot * self.slot_stride
        return self._bytes[start : start + self.slot_bytes].data

    @property
    def extent(self) -> tuple[int, int]:
        """Address and size of all slots together."""
        return self.base, len(self._bytes)

    def is_pinned(self, addresses: npt.NDArray[np.uint64]) -> bool:
        """Whether every one of these addresses in slots lies in registered memory."""
        end = self.base + self.pinned_slots * self.slot_stride
        return bool((addresses < end).all())

    def wait(self, slots: int | None = None, timeout: float | None = None) -> bool:
        """Wait until this many slots (all by default) are ready. False if the time is over or the slab was closed."""
        wanted = self.num_slots if slots is None else slots
        with self._changed:
            return self._changed.wait_for(lambda: self._ready >= wanted or self._closing.is_set(), timeout) and (
                self._ready >= wanted
            )

    def degrade(self, problem: str) -> None:
        """Remember and log why the memory is slower than it should be."""
        logger.warning("lmc: host tier: %s", problem)
        self.problem = f"{self.problem}; {problem}" if self.problem else problem

    def close(self) -> None:
        """Stop the background work and unregister. The memory is freed with the last view of it."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._worker.join()
        for first in range(0, self.pinned_slots, self._slots_per_piece):
            assert self._registrar is not None
            try:
                self._registrar.unregister(self.address(first))
            except TransferError as error:
                logger.warning("lmc: host tier: %s", error)
        self.pinned_slots = 0

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} does not exist; there are {self.num_slots}")

    def _make_ready(self) -> None:
        if self._numa_node is not None and (failure := _bind(self.base, len(self._bytes), self._numa_node)):
            self.degrade(f"memory is not bound to NUMA node {self._numa_node}: {failure}")
        pinning = self._registrar is not None
        with ThreadPoolExecutor(self._threads, thread_name_prefix="lmc-touch") as pool:
            for first in range(0, self.num_slots, self._slots_per_piece):
                count = min(self._slots_per_piece, self.num_slots - first)
                address, size = self.base + first * self.slot_stride, count * self.slot_stride
                bites = range(0, size, TOUCH_BYTES)
                failures = list(
                    pool.map(lambda at: touch(address + at, min(TOUCH_BYTES, size - at), self._closing), bites)  # noqa: B023 - used up before the next turn
                )
                if self._closing.is_set():
                    return
                if failure := next(filter(None, failures), ""):
                    self.degrade(f"pages are left to be touched by the first store: {failure}")
                if pinning:
                    pinning = self._pin(first, count, address, size)
                with self._changed:
                    self._ready = first + count
                    self._changed.notify_all()

    def _pin(self, first: int, count: int, address: int, size: int) -> bool:
        assert self._registrar is not None
        while True:
            try:
                self._registrar.register(address, size)
            except CaptureError:
                if self._closing.wait(RETRY_SECONDS):
                    return False
            except TransferError as error:
                self.degrade(f"{self.num_slots - first} of {self.num_slots} slots stay pageable: {error}")
                return False
            else:
                self.pinned_slots = first + count
                return True


def touch(address: int, size: int, closing: threading.Event) -> str:
    """Have the kernel hand out the pages now, bite by bite until closing is set. Why it cannot; empty if nothing is wrong."""
    for at in range(0, size, TOUCH_BYTES):
        if closing.is_set():
            break
        bite = ctypes.c_size_t(min(TOUCH_BYTES, size - at))
        # Through ctypes, which releases the GIL; mmap.madvise holds it for as long as the kernel clears pages.
        if _libc.madvise(ctypes.c_void_p(address + at), bite, _POPULATE_WRITE):
            return os.strerror(ctypes.get_errno())
    return ""


def slab_bytes(num_slots: int, slot_bytes: int) -> int:
    """Size of num_slots slots that start on pages."""
    return num_slots * -(-slot_bytes // PAGE) * PAGE


def open_slab(device: str, num_slots: int, slot_bytes: int, common: int | None = None) -> Slab:
    """The slab beside a device: pinned and NUMA-local for "cuda:0", ordinary memory for "cpu". Raises TierError when it cannot be mapped.

    common: as Slab takes it. Without a usable driver the slab is ordinary memory, and says so in `problem`.
    """
    if not device.startswith("cuda"):
        return Slab(num_slots, slot_bytes, common=common)
    try:
        registrar, node = open_registrar(device)
    except TransferError as error:
        slab = Slab(num_slots, slot_bytes, common=common)
        slab.degrade(f"all {num_slots} slots stay pageable: {error}")
        return slab
    return Slab(num_slots, slot_bytes, registrar=registrar, numa_node=node, common=common)


def open_registrar(device: str) -> tuple[Registrar | None, int | None]:
    """What pins memory for a device, and the memory node next to it; nothing for a CPU. Raises TransferError without a usable driver."""
    if not device.startswith("cuda"):
        return None, None
    from lmc.cache.transfer.cuda import DeviceRegistrar, load_driver

    index = int(device.partition(":")[2] or 0)
    driver = load_driver()
    return DeviceRegistrar(driver, index), gpu_numa_node(driver.pci_bus_id(index))


def gpu_numa_node(pci_bus_id: str, sysfs: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The memory node next to a GPU, from "0000:3B:00.0"; None when the machine has one node or doesn't say."""
    try:
        node = int((sysfs / pci_bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


_libc = ctypes.CDLL(None, use_errno=True)


def _ask_for_huge_pages(memory: mmap.mmap, switch: Path) -> str:
    """Why the kernel will give none; empty if it may."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        if "[never]" in switch.read_text():
            return f"{switch} is set to never; set it to {'madvise' if switch == HUGE_PAGES_FILE else 'advise'}"
    except FileNotFoundError:
        return ""  # the kernel took the advice and does not say how it is set up
    except OSError as error:
        return f"madvise for huge pages: {error.strerror}"
    return ""


def _bind(address: int, size: int, node: int) -> str:
    number = _MBIND.get(platform.machine())
    if number is None:
        return os.strerror(errno.ENOSYS)
    words = (ctypes.c_ulong * (node // 64 + 1))()
    words[node // 64] = 1 << (node % 64)
    arguments = (address, size, _PREFERRED, ctypes.addressof(words), len(words) * 64 + 1, 0)
    if _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments)) == 0:
        return ""
    return os.strerror(ctypes.get_errno())
