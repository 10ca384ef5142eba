from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from lmc.cache.transfer import pinned
from lmc.cache.transfer.cuda import DeviceRegistrar
from lmc.cache.transfer.pinned import PAGE, Slab, gpu_numa_node, open_slab
from lmc.errors import TierError, TransferError
from tests.cache.transfer.fake_driver import GLOBAL, fake_driver
from tests.services import wait_until


class FakeRegistrar:
    """Remembers registrations, refuses from the `limit`-th on, and waits for `gate` when there is one."""

    def __init__(self, limit: int = 1 << 30, gate: threading.Semaphore | None = None) -> None:
        self.pieces: dict[int, int] = {}
        self.calls = 0
        self._limit = limit
        self._gate = gate

    def register(self, address: int, size: int) -> None:
        if self._gate is not None and not self._gate.acquire(timeout=60):
            self._gate = None
        self.calls += 1
        if len(self.pieces) >= self._limit:
            raise TransferError("the driver has no memory to register with")
        assert address % PAGE == 0 and size % PAGE == 0
        self.pieces[address] = size

    def unregister(self, address: int) -> None:
        del self.pieces[address]


def test_slots_start_on_pages_and_do_not_meet() -> None:
    slab = Slab(5, PAGE + 1)
    addresses = [slab.address(slot) for slot in range(5)]
    assert all(address % PAGE == 0 for address in addresses)
    for slot in range(5):
        slab.view(slot)[:] = bytes([slot]) * (PAGE + 1)
    assert [bytes(slab.view(slot)) for slot in range(5)] == [bytes([slot]) * (PAGE + 1) for slot in range(5)]
    assert np.frombuffer(slab.view(2), dtype=np.uint8).ctypes.data == addresses[2]
    slab.close()


def test_memory_stays_as_it_is_while_it_is_made_ready() -> None:
    """A store may come before a slot is ready; touching pages must not undo it."""
    slab = Slab(64, 1 << 20)
    for slot in reversed(range(64)):
        slab.view(slot)[:8] = slot.to_bytes(8, "little")
    assert slab.wait(timeout=60)
    assert [int.from_bytes(slab.view(slot)[:8], "little") for slot in range(64)] == list(range(64))
    slab.close()


def test_ready_memory_is_resident() -> None:
    slab = Slab(8, 1 << 20)
    assert slab.wait(timeout=60)
    smaps = Path("/proc/self/smaps").read_text().splitlines()
    start = f"{slab.address(0):x}-"
    index = next((line for line, text in enumerate(smaps) if text.startswith(start)), None)
    if index is not None:  # the kernel may have merged the mapping with its neighbour
        rss = next(text for text in smaps[index:] if text.startswith("Rss:"))
        assert int(rss.split()[1]) * 1024 >= 8 << 20
    slab.close()


def test_slots_become_usable_piece_by_piece() -> None:
    gate = threading.Semaphore(0)
    registrar = FakeRegistrar(gate=gate)
    slab = Slab(6, PAGE, registrar=registrar, piece_bytes=2 * PAGE)
    assert not slab.wait(1, timeout=0)
    for pieces in (1, 2):
        gate.release()
        assert slab.wait(2 * pieces, timeout=60)
        assert slab.pinned_slots == 2 * pieces
        assert not slab.wait(2 * pieces + 1, timeout=0.01)
    first, third = (np.array([slab.address(slot)], dtype=np.uint64) for slot in (0, 4))
    assert slab.is_pinned(first)
    assert not slab.is_pinned(third)
    assert not slab.is_pinned(np.concatenate((first, third)))
    gate.release()
    assert slab.wait(timeout=60)
    assert slab.is_pinned(third)
    assert sorted(registrar.pieces.values()) == [2 * PAGE] * 3
    assert slab.boundaries.tolist() == [slab.address(2), slab.address(4)]
    slab.close()
    assert registrar.pieces == {}


def test_a_refused_registration_leaves_pageable_memory_and_says_so() -> None:
    registrar = FakeRegistrar(limit=1)
    slab = Slab(6, PAGE, registrar=registrar, piece_bytes=2 * PAGE)
    assert slab.wait(timeout=60)
    assert slab.pinned_slots == 2
    assert registrar.calls == 2  # it does not ask again and again
    assert slab.problem == "4 of 6 slots stay pageable: the driver has no memory to register with"
    slab.view(5)[:] = b"x" * PAGE
    slab.close()


def test_close_does_not_wait_for_a_large_slab() -> None:
    gate = threading.Semaphore(1)
    registrar = FakeRegistrar(gate=gate)
    slab = Slab(1 << 12, 1 << 20, registrar=registrar, piece_bytes=1 << 20)
    assert slab.wait(1, timeout=60)
    threading.Timer(0.05, gate.release).start()
    slab.close()
    assert registrar.calls <= 2, "the piece that it was at, and no more"
    assert not slab.wait(100, timeout=0)


def test_what_cannot_be_mapped_is_refused() -> None:
    with pytest.raises(TierError, match=r"lower host\.capacity"):
        Slab(1 << 30, 1 << 40)
    with pytest.raises(TierError, match=r"raise host\.capacity"):
        Slab(0, PAGE)


def test_slots_out_of_range_are_refused() -> None:
    slab = Slab(2, PAGE)
    for slot in (-1, 2):
        with pytest.raises(IndexError, match="does not exist"):
            slab.address(slot)
        with pytest.raises(IndexError, match="does not exist"):
            slab.view(slot)
    slab.close()


def test_a_failed_bind_is_visible_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_bind", lambda address, size, node: "Operation not permitted")
    slab = Slab(2, PAGE, numa_node=1)
    assert slab.wait(timeout=60)
    assert slab.problem == "memory is not bound to NUMA node 1: Operation not permitted"
    slab.close()


def test_binding_reaches_the_kernel() -> None:
    """Node 0 exists everywhere, node 1023 nowhere; sandboxes may forbid the call."""
    slab = Slab(2, PAGE)
    assert pinned._bind(slab.address(0), 2 * PAGE, 0) in ("", "Operation not permitted", "Function not implemented")
    assert pinned._bind(slab.address(0), 2 * PAGE, 1000) != ""
    slab.close()


def test_the_gpus_node_comes_from_sysfs(tmp_path: Path) -> None:
    device = tmp_path / "0000:3b:00.0"
    device.mkdir()
    (device / "numa_node").write_text("1\n")
    assert gpu_numa_node("0000:3B:00.0", tmp_path) == 1
    (device / "numa_node").write_text("-1\n")
    assert gpu_numa_node("0000:3B:00.0", tmp_path) is None
    assert gpu_numa_node("0000:99:00.0", tmp_path) is None


def test_a_cuda_devices_slab_is_pinned_in_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, library = fake_driver()
    monkeypatch.setattr("lmc.cache.transfer.cuda.load_driver", lambda: driver)
    slab = open_slab("cuda:1", 3, PAGE)
    assert slab.wait(timeout=60)
    assert slab.pinned_slots == 3
    assert library.registered == {slab.address(0): 3 * PAGE}
    assert set(library.contexts) == {4001}
    slab.close()
    assert library.registered == {}


def test_without_a_driver_a_cuda_devices_slab_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise TransferError("no CUDA driver on this machine: libcuda.so.1")

    monkeypatch.setattr("lmc.cache.transfer.cuda.load_driver", missing)
    slab = open_slab("cuda:0", 3, PAGE)
    assert slab.wait(timeout=60)
    assert slab.problem == "all 3 slots stay pageable: no CUDA driver on this machine: libcuda.so.1"
    assert slab.pinned_slots == 0
    slab.close()


def test_a_cpus_slab_is_ordinary_memory() -> None:
    slab = open_slab("cpu", 3, PAGE)
    assert slab.wait(timeout=60)
    assert (slab.pinned_slots, slab.problem) == (0, "")
    assert len(slab.boundaries) == 0
    slab.close()


def test_pinning_beside_a_graph_capture_leaves_the_capture_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM captures CUDA graphs right after it has handed over its KV cache, while the slab's thread pins."""
    driver, library = fake_driver()
    monkeypatch.setattr("lmc.cache.transfer.cuda.load_driver", lambda: driver)
    library.graph_capture = True
    slab = open_slab("cuda:0", 6, PAGE)
    assert slab.wait(timeout=60)
    slab.close()
    assert library.broken_captures == 0
    assert slab.problem == ""
    assert library.registered == {}
    assert library.mode_of_this_thread == GLOBAL, "the engine's own thread is as it was"


def test_a_refusal_for_a_captures_sake_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "RETRY_SECONDS", 0.001)
    driver, library = fake_driver()
    registrar = DeviceRegistrar(driver, 0)
    library.graph_capture, library.refuse_relaxed = True, 5
    slab = Slab(6, PAGE, registrar=registrar, piece_bytes=2 * PAGE)
    assert slab.wait(timeout=60)
    assert (slab.pinned_slots, slab.problem) == (6, "")
    assert library.broken_captures == 5
    slab.close()


def test_close_does_not_wait_for_a_capture_to_end() -> None:
    driver, library = fake_driver()
    registrar = DeviceRegistrar(driver, 0)
    library.graph_capture, library.refuse_relaxed = True, 1 << 30
    slab = Slab(2, PAGE, registrar=registrar)
    wait_until(lambda: library.broken_captures > 0, "the first try")
    slab.close()
    assert slab.pinned_slots == 0


def _flags_of(slab: Slab) -> set[str]:
    """What the kernel knows of the mapping: hg, it was asked for huge pages; dc, a child does not get it; sh, it is shared."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside = False
    for line in lines:
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(edge, 16) for edge in first.split("-"))
            inside = low <= slab.address(0) < high
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    pytest.fail("the slab is not mapped")


@pytest.mark.parametrize("pinning", [False, True])
def test_the_kernel_is_asked_for_huge_pages_where_it_gives_them(pinning: bool) -> None:
    slab = Slab(8, 1 << 20, registrar=FakeRegistrar() if pinning else None)
    flags = _flags_of(slab)
    assert "hg" in flags and "sh" not in flags
    assert ("dc" in flags) == pinning, "a process that the engine forks must not get copies of pinned pages"
    assert slab.address(0) % pinned.HUGE_PAGE == 0
    slab.close()


def test_huge_pages_that_are_switched_off_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.setattr(pinned, "HUGE_PAGES_FILE", setting)
    for text, said in (("always madvise [never]", True), ("always [madvise] never", False), (None, False)):
        setting.unlink(missing_ok=True)
        if text is not None:
            setting.write_text(text)
        slab = Slab(8, 1 << 20)
        assert slab.wait(timeout=60)
        assert ("is set to never; set it to madvise" in slab.problem) == said
        slab.close()
