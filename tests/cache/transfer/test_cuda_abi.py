"""The driver calls against NVIDIA's own header, which Triton ships: right symbols, argument lists and structures, without a device."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lmc.cache.transfer.backends.dma import DmaBackend
from lmc.cache.transfer.cuda import DeviceRegistrar, Driver
from lmc.errors import CaptureError, TransferError
from tests.contracts.transfer import ORDERS, check_backend, vllm_engine

STREAM = 0x7FFF00002000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    triton = find_spec("triton")
    if compiler is None or triton is None or triton.origin is None:
        pytest.skip("needs a C compiler and Triton's copy of cuda.h")
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    if not (include / "cuda.h").is_file():
        pytest.skip(f"no cuda.h in {include}")
    out = tmp_path_factory.mktemp("cuda") / "libfakecuda.so"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-I", include, source, "-o", out], check=True, timeout=60)
    return ctypes.CDLL(str(out))


def test_batches_reach_the_driver_as_the_header_says(library: ctypes.CDLL) -> None:
    driver = Driver(library)
    assert (driver.version, driver.has_batch) == (13000, True)
    for order in ORDERS:
        check_backend(DmaBackend(driver), vllm_engine(order, torch.bfloat16), [[4, 1], [0, 3]], 1, stream=STREAM)
    assert library.number_of_batches() == 2 * len(ORDERS)
    assert library.order_of_last_batch() == 3


def test_registration_passes_whole_addresses_and_sizes(library: ctypes.CDLL) -> None:
    registrar = DeviceRegistrar(Driver(library), 0)
    registrar.register(0x7F1234567000, 5 << 32)
    registrar.unregister(0x7F1234567000)
    with pytest.raises(TransferError, match="cuMemHostRegister failed: CUDA_ERROR_OF_THE_TEST"):
        registrar.register(0x7F1234567000, 4096)


def test_the_bus_id_is_read(library: ctypes.CDLL) -> None:
    assert Driver(library).pci_bus_id(0) == "0000:3B:00.0"


def test_registration_goes_on_while_another_thread_captures(library: ctypes.CDLL) -> None:
    driver = Driver(library)
    library.set_capturing(1)
    try:
        with pytest.raises(CaptureError, match="cuMemHostRegister failed"):
            driver.register(0x7F1234567000, 5 << 32)
        registrar = DeviceRegistrar(driver, 0)
        registrar.register(0x7F1234567000, 5 << 32)
        registrar.unregister(0x7F1234567000)
        assert driver.exchange_capture_mode(0) == 0, "the thread's mode was put back"
    finally:
        library.set_capturing(0)


def test_the_device_is_asked_whether_it_takes_host_pointers(library: ctypes.CDLL) -> None:
    driver = Driver(library)
    for answer in (0, 1):
        library.set_host_pointers(answer)
        assert driver.takes_host_pointers(0) == bool(answer)
