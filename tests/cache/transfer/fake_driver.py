"""libcuda's functions for machines without one: real C function pointers with the documented signatures, whose copies are memmove."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from lmc.cache.transfer.cuda import Driver

SUCCESS, INVALID_VALUE, NOT_FOUND = 0, 1, 500

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
        self.capturing = False
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

    def _register(self, address: int, size: int, flags: int) -> int:
        if flags != 1 or address in self.registered:
            return INVALID_VALUE
        self.registered[address] = size
        return SUCCESS

    def _unregister(self, address: int) -> int:
        return SUCCESS if self.registered.pop(address, None) else INVALID_VALUE

    def _retain(self, out: Any, device: int) -> int:
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
        out[0] = b"CUDA_ERROR_INVALID_VALUE" if code == INVALID_VALUE else b"CUDA_ERROR_UNKNOWN"
        return SUCCESS


def fake_driver(version: int = 13000) -> tuple[Driver, FakeLibrary]:
    library = FakeLibrary(version)
    return Driver(library), library
