from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.transfer.backends.dma import DmaBackend
from lmc.cache.transfer.cuda import CopyAttributes, DeviceRegistrar, Driver, load_driver
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.errors import TransferError
from tests.cache.transfer.fake_driver import Attributes, FakeLibrary, fake_driver
from tests.contracts.transfer import block_tables, check_backend, engines, vllm_engine

VERSIONS = (12040, 12080, 12090, 13000, 13010)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_layout_round_trips(version: int) -> None:
    driver, library = fake_driver(version)

    @settings(deadline=None, max_examples=40)
    @given(st.data(), st.integers(0, 2**20))
    def check(data: st.DataObject, seed: int) -> None:
        engine = data.draw(engines())
        check_backend(DmaBackend(driver), engine, data.draw(block_tables(engine.layout.num_blocks)), seed, stream=7)

    check()
    assert bool(library.batches) == (version >= 12080)
    assert bool(library.single_copies) == (version < 12080)
    assert {stream for _, _, stream in library.batches} | set(library.single_copies) == {7}


def test_one_call_moves_a_batch_with_the_right_source_order() -> None:
    """Blocks are read in stream order (the step before wrote them), slots may be read early."""
    driver, library = fake_driver()
    check_backend(DmaBackend(driver), vllm_engine("LBHNC", torch.float16), [[4, 1], [0, 3]], 0, stream=7)
    assert library.batches == [(12, 1, 7), (12, 3, 7)]


def test_attributes_have_the_layout_of_cuda_h() -> None:
    assert ctypes.sizeof(CopyAttributes) == ctypes.sizeof(Attributes) == 24
    ours, theirs = CopyAttributes(3), Attributes(3)
    assert bytes(ours) == bytes(theirs)


def one_copy() -> tuple[Descriptors, np.ndarray, np.ndarray]:
    source, target = np.arange(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    columns = (np.array([value], dtype=np.uint64) for value in (source.ctypes.data, target.ctypes.data, 64))
    return Descriptors(*columns, Direction.STORE), source, target


def test_the_default_stream_is_refused() -> None:
    driver, library = fake_driver()
    copies, _, target = one_copy()
    with pytest.raises(TransferError, match="a stream of their own"):
        DmaBackend(driver).execute(copies, 0)
    assert not target.any() and not library.batches


def test_a_graph_capture_is_refused() -> None:
    driver, library = fake_driver()
    library.capturing = True
    copies, _, target = one_copy()
    with pytest.raises(TransferError, match="being captured"):
        DmaBackend(driver).execute(copies, 7)
    assert not target.any()


@pytest.mark.parametrize(("version", "where"), [(12080, " at copy 5 of 12"), (13000, "")])
def test_a_failed_copy_is_named(version: int, where: str) -> None:
    driver, library = fake_driver(version)
    library.refuse_copy = 5
    with pytest.raises(TransferError, match=f"cuMemcpyBatchAsync failed{where}: CUDA_ERROR_INVALID_VALUE"):
        check_backend(DmaBackend(driver), vllm_engine("LBHNC", torch.float16), [[4, 1], [0, 3]], 0, stream=7)


def test_no_copies_are_no_call() -> None:
    driver, library = fake_driver()
    nothing = np.empty(0, dtype=np.uint64)
    DmaBackend(driver).execute(Descriptors(nothing, nothing, nothing, Direction.LOAD), 7)
    assert library.batches == []


def test_a_driver_without_the_call_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLibrary, "_get_address", lambda *arguments: 500)
    driver, library = fake_driver(13000)
    assert not driver.has_batch
    copies, source, target = one_copy()
    DmaBackend(driver).execute(copies, 7)
    assert (target == source).all() and library.single_copies == [7]


def test_registration_enters_the_devices_context_in_every_thread() -> None:
    driver, library = fake_driver()
    registrar = DeviceRegistrar(driver, 1)
    registrar.register(4096, 8192)
    assert library.registered == {4096: 8192}
    with pytest.raises(TransferError, match="cuMemHostRegister failed: CUDA_ERROR_INVALID_VALUE"):
        registrar.register(4096, 8192)
    registrar.unregister(4096)
    assert library.registered == {}
    assert library.contexts == [4001] * 3


def test_the_bus_id_is_the_devices() -> None:
    assert fake_driver()[0].pci_bus_id(0) == "0000:3B:00.0"


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(TransferError, match="no CUDA driver on this machine: libcuda"):
        load_driver()


def test_the_fake_has_the_functions_that_the_driver_asks_for() -> None:
    assert Driver(FakeLibrary(13000)).version == 13000


def test_where_host_pointers_are_translated_copies_go_one_by_one() -> None:
    """The batched call takes them without a word and the device faults later (WSL2, paravirtual GPUs)."""
    driver, library = fake_driver()
    library.host_pointers = False
    assert not driver.takes_host_pointers(0)
    check_backend(
        DmaBackend(driver, batched=driver.takes_host_pointers(0)),
        vllm_engine("LBHNC", torch.float16),
        [[4, 1], [0, 3]],
        0,
        stream=7,
    )
    assert library.single_copies == [7] * 24
    assert not library.faulted
