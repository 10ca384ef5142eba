"""The calls of the CUDA driver that torch does not offer: batched copies, and pinning of memory that torch did not allocate.

Bound with ctypes to libcuda, which comes with the driver: nothing to compile, and nothing is loaded before a device is used. These are
driver calls: a failure is only their return code and leaves no sticky error for torch's runtime to trip over.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lmc.cache.transfer.planner import Addresses
from lmc.errors import CaptureError, TransferError

BATCH_VERSION = 12080  # the first driver with batched copies
BATCH_VERSION_2 = 13000  # the signature lost its failIdx

SOURCE_IN_STREAM_ORDER = 1
SOURCE_ANY_ORDER = 3  # for host memory that nothing queued on the stream writes

CAPTURE_RELAXED = 2  # cuThreadExchangeStreamCaptureMode: this thread's calls are no part of anybody's capture
HOST_POINTERS = 91  # device attribute: registered host memory has the same address on the device

_PORTABLE = 1  # cuMemHostRegister: for every context
_CAPTURE_UNSUPPORTED = 900

_ADDRESS_ARRAY = np.ctypeslib.ndpointer(dtype=np.uint64, ndim=1, flags="C_CONTIGUOUS")


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes: one for a whole batch here; the location hints concern managed memory only."""

    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("source_hint", _Location),
        ("destination_hint", _Location),
        ("flags", ctypes.c_uint),
    ]


_BATCH_ARGUMENTS: list[Any] = [  # ndpointer makes classes that ctypes' types don't name
    *[_ADDRESS_ARRAY] * 3,  # destinations, sources, sizes
    ctypes.c_size_t,
    ctypes.POINTER(CopyAttributes),
    ctypes.POINTER(ctypes.c_size_t),  # first copy of each attribute
    ctypes.c_size_t,
]


class Driver:
    """Calls libcuda, or in tests a library with the same functions."""

    def __init__(self, library: Any) -> None:  # ctypes.CDLL makes its functions on the fly
        self._library = library
        self._check("cuInit", library.cuInit(0))
        version = ctypes.c_int()
        self._check("cuDriverGetVersion", library.cuDriverGetVersion(ctypes.byref(version)))
        self.version = version.value
        self._batch = self._find_batch()
        self._copy = library.cuMemcpyAsync
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]

    @property
    def has_batch(self) -> bool:
        return self._batch is not None

    def takes_host_pointers(self, device: int) -> bool:
        """Whether the device reaches registered memory under the host's own address. Under WSL2 and on some virtual GPUs it does not:
        batched copies fault there, after the call has returned, and so do kernels; single copies are translated."""
        value = ctypes.c_int(0)
        code = self._library.cuDeviceGetAttribute(ctypes.byref(value), HOST_POINTERS, device)
        return code == 0 and value.value == 1

    def copy(
        self, src: Addresses, dst: Addresses, size: Addresses, source_order: int, stream: int, *, batched: bool = True
    ) -> None:
        """Queue copies on a stream other than the default one: in one call from driver 12.8 on, one by one before, or where batched is
        False. Raises TransferError."""
        if stream == 0:
            raise TransferError("batched copies need a stream of their own, not the default stream")
        self._refuse_capture(stream)
        if len(size) == 0:
            return
        if self._batch is None or not batched:
            for copy in zip(dst.tolist(), src.tolist(), size.tolist(), strict=True):
                self._check("cuMemcpyAsync", self._copy(*copy, stream))
            return
        attributes = CopyAttributes(source_access_order=source_order)
        first = ctypes.c_size_t(0)
        arguments = (dst, src, size, len(size), ctypes.byref(attributes), ctypes.byref(first), 1)
        if self.version >= BATCH_VERSION_2:
            self._check("cuMemcpyBatchAsync", self._batch(*arguments, stream))
            return
        failed = ctypes.c_size_t(0)
        code = self._batch(*arguments, ctypes.byref(failed), stream)
        self._check("cuMemcpyBatchAsync", code, f" at copy {failed.value} of {len(size)}")

    @contextmanager
    def apart_from_captures(self) -> Iterator[None]:
        """The calling thread's calls inside are allowed while another thread captures a CUDA graph, and leave that capture whole.

        An engine captures in the mode in which a call such as cuMemHostRegister of any other thread fails and ends the capture.
        """
        before = self.exchange_capture_mode(CAPTURE_RELAXED)
        try:
            yield
        finally:
            self.exchange_capture_mode(before)

    def exchange_capture_mode(self, mode: int) -> int:
        """Set the calling thread's mode; returns the mode that it had."""
        value = ctypes.c_int(mode)
        self._check(
            "cuThreadExchangeStreamCaptureMode", self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(value))
        )
        return value.value

    def register(self, address: int, size: int) -> None:
        """Pin host memory. The calling thread needs a current context. Raises CaptureError when it may be tried again."""
        self._check(
            "cuMemHostRegister",
            self._library.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(size), _PORTABLE),
        )

    def unregister(self, address: int) -> None:
        self._check("cuMemHostUnregister", self._library.cuMemHostUnregister(ctypes.c_void_p(address)))

    def primary_context(self, device: int) -> int:
        """The primary context of a device. It is kept until the process ends, as torch keeps it."""
        context = ctypes.c_void_p()
        self._check("cuDevicePrimaryCtxRetain", self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        return context.value or 0

    def enter(self, context: int) -> None:
        """Make the context current in the calling thread."""
        self._check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(ctypes.c_void_p(context)))

    def pci_bus_id(self, device: int) -> str:
        """PCI address of a device, such as "0000:3B:00.0"."""
        text = ctypes.create_string_buffer(32)
        self._check("cuDeviceGetPCIBusId", self._library.cuDeviceGetPCIBusId(text, 32, device))
        return text.value.decode()

    def _refuse_capture(self, stream: int) -> None:
        """Raise TransferError while a CUDA graph is captured: batched copies cannot be captured, and may fail silently."""
        status = ctypes.c_int()
        code = self._library.cuStreamIsCapturing(ctypes.c_void_p(stream), ctypes.byref(status))
        self._check("cuStreamIsCapturing", code)
        if status.value:
            raise TransferError("a CUDA graph is being captured on the transfer stream; copies cannot be part of it")

    def _find_batch(self) -> Any:  # a ctypes function pointer, of one of two signatures
        if self.version < BATCH_VERSION:
            return None
        wanted = BATCH_VERSION_2 if self.version >= BATCH_VERSION_2 else BATCH_VERSION
        pointer, found = ctypes.c_void_p(), ctypes.c_int()
        code = self._library.cuGetProcAddress_v2(
            b"cuMemcpyBatchAsync", ctypes.byref(pointer), wanted, ctypes.c_uint64(0), ctypes.byref(found)
        )
        if code != 0 or not pointer.value:
            return None
        failed_index = [] if wanted == BATCH_VERSION_2 else [ctypes.POINTER(ctypes.c_size_t)]
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *_BATCH_ARGUMENTS, *failed_index, ctypes.c_void_p)
        return prototype(pointer.value)

    def _check(self, call: str, code: int, where: str = "") -> None:
        if code != 0:
            text = ctypes.c_char_p()
            name = self._library.cuGetErrorName(code, ctypes.byref(text))
            kind = CaptureError if code == _CAPTURE_UNSUPPORTED else TransferError
            raise kind(f"{call} failed{where}: {(text.value or b'').decode() if name == 0 else code}")


class DeviceRegistrar:
    """Pins memory from any thread, in the primary context of one device: the context that torch uses. The engine may be capturing a
    CUDA graph at the same time."""

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        with driver.apart_from_captures():
            self._context = driver.primary_context(device)

    def register(self, address: int, size: int) -> None:
        with self._driver.apart_from_captures():
            self._driver.enter(self._context)
            self._driver.register(address, size)

    def unregister(self, address: int) -> None:
        with self._driver.apart_from_captures():
            self._driver.enter(self._context)
            self._driver.unregister(address)


def load_driver() -> Driver:
    """The driver of this machine. Raises TransferError when there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferError(f"no CUDA driver on this machine: {error}") from error
    return Driver(library)
