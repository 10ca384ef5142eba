"""Copies one descriptor at a time with torch: slow, plain, and what the other backends are compared with."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from lmc.cache.transfer.backends.base import on_stream
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.errors import TransferError

if TYPE_CHECKING:
    import torch


class TorchBackend:
    name = "torch"

    def __init__(self, device: str) -> None:
        """device: where the engine's blocks are; slots are in host memory."""
        import torch

        self._torch = torch
        self._device = torch.device(device)

    def refuses(self, descriptors: Descriptors) -> str:
        return ""

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        try:
            with on_stream(self._device, stream):
                self._copy(descriptors)
        except RuntimeError as error:
            raise TransferError(f"torch cannot copy: {error}") from error

    def _copy(self, descriptors: Descriptors) -> None:
        storing = descriptors.direction is Direction.STORE
        columns = (descriptors.src.tolist(), descriptors.dst.tolist(), descriptors.size.tolist())
        for src, dst, size in zip(*columns, strict=True):
            source = self._block(src, size) if storing else self._slot(src, size)
            target = self._slot(dst, size) if storing else self._block(dst, size)
            target.copy_(source, non_blocking=True)

    def _slot(self, address: int, size: int) -> torch.Tensor:
        # Bytes, whatever the dtype: fp8 lacks many operations, and none is wanted.
        return self._torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=self._torch.uint8)

    def _block(self, address: int, size: int) -> torch.Tensor:
        if self._device.type == "cpu":
            return self._slot(address, size)
        return self._torch.as_tensor(_DeviceBytes(address, size), device=self._device)


class _DeviceBytes:
    """Device memory as the CUDA array interface describes it; torch takes it without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
