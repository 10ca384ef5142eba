"""How the backends of a device are put together, with a fake driver, the interpreted kernel and CPU memory in the device's place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lmc.cache.transfer import cost
from lmc.cache.transfer.backends import choose_backend, copy_kernel, device
from lmc.cache.transfer.backends.device import device_backend
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.runtimes import CallerStream, ThreadRuntime
from lmc.cache.transfer.streams import Stream, TransferStreams
from lmc.errors import ConfigError, TransferError
from lmc.probe.transfer import measure_device
from tests.cache.transfer.fake_driver import fake_driver
from tests.contracts.transfer import check_backend, vllm_engine


class NumberedStream(CallerStream):
    def run(self, queue_copies: Callable[[int], None]) -> None:
        queue_copies(7)


class NumberedRuntime(ThreadRuntime):
    """Streams that work at once and have a handle, as CUDA's do."""

    def new_stream(self) -> Stream:
        return NumberedStream()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the kernel backend needs triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cost, "SCRATCH_BYTES", 64 << 10)
    monkeypatch.setattr(cost, "PIECE_SIZES", (8 << 10, 4 << 10))
    monkeypatch.setattr(device, "STAGING_BYTES", 64 << 10)


ENGINE = vllm_engine("LBNHC", torch.bfloat16, content=16)
TABLE = [[4, 1], [0, 3]]


def test_the_calibrated_backend_copies_and_counts() -> None:
    driver, _ = fake_driver()
    backend = device_backend("cpu", "", lambda addresses: True, driver, NumberedRuntime())
    assert backend._model is not None
    assert {name for name, _ in backend._model.rates} == {"dma", "kernel", "staged"}
    check_backend(backend, ENGINE, TABLE, 1)
    check_backend(backend, ENGINE, TABLE, 2, stream=7)
    assert sum(backend.chosen.values()) == 4


@pytest.mark.parametrize("name", ["dma", "kernel", "staged", "torch"])
def test_a_forced_backend_is_not_calibrated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "calibrate", lambda *arguments: pytest.fail("calibrated"))
    backend = device_backend("cpu", name, lambda addresses: True, fake_driver()[0], NumberedRuntime())
    check_backend(backend, ENGINE, TABLE, 1)
    assert backend.chosen == {(name, "store"): 1, (name, "load"): 1}


def test_pageable_slots_are_left_to_the_copy_engine() -> None:
    backend = device_backend("cpu", "kernel", lambda addresses: False, fake_driver()[0], NumberedRuntime())
    check_backend(backend, ENGINE, TABLE, 1)
    assert backend.chosen == {("dma", "store"): 1, ("dma", "load"): 1}
    assert backend.refused == {"kernel: the slots are not pinned": 2}


def test_without_triton_the_copy_engine_does_everything(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    backend = device_backend("cpu", "", lambda addresses: True, fake_driver()[0], NumberedRuntime())
    check_backend(backend, ENGINE, TABLE, 1)
    assert set(backend.chosen) == {("dma", "store"), ("dma", "load")}
    assert "triton is not installed" in caplog.text


def test_a_kernel_that_does_not_start_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("lmc.cache.transfer.backends.kernel.on_stream", broken)
    backend = device_backend("cpu", "", lambda addresses: True, fake_driver()[0], NumberedRuntime())
    check_backend(backend, ENGINE, TABLE, 1)
    assert set(backend.chosen) == {("dma", "store"), ("dma", "load")}
    assert "the kernel backend is left out: the copy kernel cannot be launched: out of memory" in caplog.text
    assert "the staged backend is left out" in caplog.text


def test_it_works_behind_streams() -> None:
    backend = device_backend("cpu", "", lambda addresses: True, fake_driver()[0], NumberedRuntime())
    streams = TransferStreams(NumberedRuntime(), backend)

    class Submitting:
        name = "submitting"
        refuses = backend.refuses

        def execute(self, descriptors: object, stream: int = 0) -> None:
            transfer = streams.submit(descriptors)  # type: ignore[arg-type]
            assert streams.drain() == [transfer]
            assert transfer.error is None

    check_backend(Submitting(), ENGINE, TABLE, 1)


def test_the_probe_measures_every_backend_both_ways() -> None:
    rows = measure_device("cpu", NumberedRuntime(), fake_driver()[0], (4096, 16384), 64 << 10, 2)
    assert {(row.backend, row.direction, row.piece_bytes) for row in rows} == {
        (backend, direction, size)
        for backend in ("dma", "kernel", "staged", "torch")
        for direction in ("store", "load")
        for size in (4096, 16384)
    }


def layout_on(name: str) -> KVLayout:
    layout = ENGINE.layout
    return KVLayout(layout.engine, name, 4, layout.num_blocks, layout.regions, layout.layers, layout.description)


def test_the_device_decides() -> None:
    for name, chosen in (("auto", "host"), ("host", "host"), ("torch", "torch")):
        backend = choose_backend(layout_on("cpu"), name=name)
        check_backend(backend, ENGINE, TABLE, 1)
        assert backend.chosen == {(chosen, "store"): 1, (chosen, "load"): 1}
    assert choose_backend(layout_on("cpu"), threads=3).threads == 3
    for name, device_name, message in (
        ("dma", "cpu", "use host or torch"),
        ("host", "cuda:0", "use one of"),
        ("auto", "xpu:0", "no transfer backend for the device xpu:0"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_backend(layout_on(device_name), name=name)


def test_a_cuda_layout_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise TransferError("no CUDA driver on this machine: libcuda.so.1")

    monkeypatch.setattr("lmc.cache.transfer.cuda.load_driver", missing)
    with pytest.raises(TransferError, match="no CUDA driver"):
        choose_backend(layout_on("cuda:0"))


class Kernels:
    """In the place of copy_kernel.compiled: remembers which kernels have been launched, for a first launch compiles and loads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[int] = []
        self.made = 0
        original = copy_kernel.compiled

        def compiled() -> object:
            kernel, number = original(), self.made
            self.made += 1

            class Watched:
                def __getitem__(_, grid: object) -> Callable[..., object]:
                    self.launched.append(number)
                    return kernel[grid]  # type: ignore[no-any-return]

            return Watched()

        monkeypatch.setattr(copy_kernel, "compiled", compiled)


@pytest.mark.parametrize("forced", ["", "kernel", "staged"])
def test_no_kernel_has_its_first_launch_in_serving(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(monkeypatch)
    backend = device_backend("cpu", forced, lambda addresses: True, fake_driver()[0], NumberedRuntime())
    warm = set(kernels.launched)
    for one in backend._backends.values():
        check_backend(one, ENGINE, TABLE, 1, stream=7)
    assert kernels.made == 2
    assert set(kernels.launched) == warm == {0, 1}


def test_a_device_that_translates_host_pointers_gets_single_copies_and_no_kernel_on_slots(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver, library = fake_driver()
    library.host_pointers = False
    backend = device_backend("cpu", "", lambda addresses: True, driver, NumberedRuntime())
    assert set(backend._backends) == {"dma", "staged"}
    check_backend(backend, ENGINE, TABLE, 1)
    assert library.single_copies and not library.batches and not library.faulted
    assert "does not reach registered memory under the host's addresses" in caplog.text


@pytest.mark.parametrize("forced", ["", "staged"])
def test_without_device_memory_the_cache_is_refused_and_not_the_engine(
    forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 MiB")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(TransferError, match=r"CUDA out of memory.*leave the device some memory"):
        device_backend("cpu", forced, lambda addresses: True, fake_driver()[0], NumberedRuntime())
