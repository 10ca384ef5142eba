"""libcuda's functions for machines without one: real C function pointers with the documented signatures, whose copies are memmove.

It has the rules that cost a start: while a CUDA graph is captured in global mode, calls that touch memory or contexts fail on every thread
that has not asked for the relaxed mode, and they end the capture; and a batched copy faults after it has returned where registered memory
has another address on the device.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from lmc.cache.transfer.cuda import Driver

SUCCESS, INVALID_VALUE, NOT_FOUND, CAPTURE_UNSUPPORTED = 0, 1, 500, 900
GLOBAL, RELAXED = 0, 2  # modes of a thread

_int, _pointer, _size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t


class _Location(ctypes.Structure):
    _fields_ = [("type", _int), ("id", _int)]


class Attributes(ctypes.Structure):
    """Written down from cuda.h, not from the code under test."""

    _fields_ = [
        ("srcAccessOrder", _int),
        ("srcLocHint", _Location),
        ("dstLocHint", _Location),
        ("flags", ctypes.c_uint),
    ]


class FakeLibrary:
    def __init__(self, version: int) -> None:
        self.version = version
        self.capturing = False  # the stream that copies are given to
        self.graph_capture = False  # another thread captures in global mode
        self.broken_captures = 0  # calls that were refused meanwhile: each ends the capture
        self.refuse_relaxed = 0  # so many calls are refused even to relaxed threads
        self.host_pointers = True
        self.faulted = False  # a batched copy met memory that the device does not reach
        self._modes: dict[int, int] = {}  # of threads
        self.refuse_copy: int | None = None  # the index of a copy that fails
        self.batches: list[tuple[int, int, int]] = []  # (copies, source access order, stream)
        self.single_copies: list[int] = []  # streams
        self.registered: dict[int, int] = {}
        self.contexts: list[int] = []
        self._nine = ctypes.CFUNCTYPE(
            _int, *[_pointer] * 3, _size, _pointer, _pointer, _size, ctypes.POINTER(_size), _pointer
        )(self._batch_nine)
        self._eight = ctypes.CFUNCTYPE(_int, *[_pointer] * 3, _size, _pointer, _pointer, _size, _pointer)(self._batch)
        self.cuInit = self._function(lambda flags: SUCCESS, ctypes.c_uint)
        self.cuDriverGetVersion = self._function(self._get_version, ctypes.POINTER(_int))
        self.cuGetProcAddress_v2 = self._function(
            self._get_address, ctypes.c_char_p, ctypes.POINTER(_pointer), _int, ctypes.c_uint64, ctypes.POINTER(_int)
        )
        self.cuMemcpyAsync = self._function(self._copy, ctypes.c_uint64, ctypes.c_uint64, _size, _pointer)
        self.cuMemHostRegister_v2 = self._function(self._register, _pointer, _size, ctypes.c_uint)
        self.cuMemHostUnregister = self._function(self._unregister, _pointer)
        self.cuDevicePrimaryCtxRetain = self._function(self._retain, ctypes.POINTER(_pointer), _int)
        self.cuCtxSetCurrent = self._function(self._set_context, _pointer)
        self.cuDeviceGetPCIBusId = self._function(self._bus_id, _pointer, _int, _int)
        self.cuStreamIsCapturing = self._function(self._is_capturing, _pointer, ctypes.POINTER(_int))
        self.cuDeviceGetAttribute = self._function(self._attribute, ctypes.POINTER(_int), _int, _int)
        self.cuThreadExchangeStreamCaptureMode = self._function(self._exchange_mode, ctypes.POINTER(_int))
        self.cuGetErrorName = self._function(self._error_name, _int, ctypes.POINTER(ctypes.c_char_p))

    @staticmethod
    def _function(body: Callable[..., int], *arguments: Any) -> Any:
        return ctypes.CFUNCTYPE(_int, *arguments)(body)

    def _get_version(self, out: Any) -> int:
        out[0] = self.version
        return SUCCESS

    def _get_address(self, name: bytes, out: Any, version: int, flags: int, status: Any) -> int:
        """As the driver does: the newest form that is not newer than the version asked for."""
        assert name == b"cuMemcpyBatchAsync"
        if version > self.version or version < 12080:
            return NOT_FOUND
        out[0] = ctypes.cast(self._eight if version >= 13000 else self._nine, _pointer).value
        status[0] = 0
        return SUCCESS

    def _batch(
        self, dsts: int, srcs: int, sizes: int, count: int, attributes: int, firsts: int, num: int, stream: int
    ) -> int:
        if not stream or count == 0 or num != 1 or (_size * 1).from_address(firsts)[0] != 0:
            return INVALID_VALUE
        if not self.host_pointers:
            self.faulted = True
            return SUCCESS
        order = Attributes.from_address(attributes).srcAccessOrder
        columns = [(ctypes.c_uint64 * count).from_address(array) for array in (dsts, srcs, sizes)]
        for index, (dst, src, size) in enumerate(zip(*columns, strict=True)):
            if index == self.refuse_copy or size == 0:
                return INVALID_VALUE
            ctypes.memmove(dst, src, size)
        self.batches.append((count, order, stream))
        return SUCCESS

    def _batch_nine(self, *arguments: Any) -> int:
        *first, failed, stream = arguments
        code = self._batch(*first, stream)
        if code != SUCCESS:
            failed[0] = self.refuse_copy or 0
        return code

    def _copy(self, dst: int, src: int, size: int, stream: int) -> int:
        ctypes.memmove(dst, src, size)
        self.single_copies.append(stream)
        return SUCCESS

    def _unsafe(self) -> bool:
        """Whether a call of this thread is refused for a capture's sake."""
        if not self.graph_capture:
            return False
        if self.mode_of_this_thread == RELAXED and self.refuse_relaxed == 0:
            return False
        self.refuse_relaxed = max(0, self.refuse_relaxed - 1)
        self.broken_captures += 1
        return True

    @property
    def mode_of_this_thread(self) -> int:
        return self._modes.get(threading.get_native_id(), GLOBAL)

    def _exchange_mode(self, mode: Any) -> int:
        thread = threading.get_native_id()
        self._modes[thread], mode[0] = mode[0], self.mode_of_this_thread
        return SUCCESS

    def _attribute(self, out: Any, attribute: int, device: int) -> int:
        if attribute != 91:
            return INVALID_VALUE
        out[0] = int(self.host_pointers)
        return SUCCESS

    def _register(self, address: int, size: int, flags: int) -> int:
        if self._unsafe():
            return CAPTURE_UNSUPPORTED
        if flags != 1 or address in self.registered:
            return INVALID_VALUE
        self.registered[address] = size
        return SUCCESS

    def _unregister(self, address: int) -> int:
        if self._unsafe():
            return CAPTURE_UNSUPPORTED
        return SUCCESS if self.registered.pop(address, None) else INVALID_VALUE

    def _retain(self, out: Any, device: int) -> int:
        if self._unsafe():
            return CAPTURE_UNSUPPORTED
        out[0] = 4000 + device
        return SUCCESS

    def _set_context(self, context: int) -> int:
        self.contexts.append(context)
        return SUCCESS

    def _bus_id(self, out: int, length: int, device: int) -> int:
        text = b"0000:3B:00.%d\0" % device
        ctypes.memmove(out, text, min(len(text), length))
        return SUCCESS

    def _is_capturing(self, stream: int, out: Any) -> int:
        out[0] = int(self.capturing)
        return SUCCESS

    def _error_name(self, code: int, out: Any) -> int:
        names = {
            INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE",
            CAPTURE_UNSUPPORTED: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        }
        out[0] = names.get(code, b"CUDA_ERROR_UNKNOWN")
        return SUCCESS


def fake_driver(version: int = 13000) -> tuple[Driver, FakeLibrary]:
    library = FakeLibrary(version)
    return Driver(library), library
