"""Copies by a small Triton kernel that reads and writes pinned host memory over the bus: for many small pieces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lmc.cache.transfer.backends.base import on_stream
from lmc.cache.transfer.planner import Addresses, Descriptors, fragment
from lmc.errors import TransferError

FRAGMENT_BYTES = 64 << 10  # so that a few large descriptors keep all programs busy
DEFAULT_PROGRAMS = 8


class KernelBackend:
    name = "kernel"

    def __init__(
        self,
        device: str,
        *,
        programs: int = DEFAULT_PROGRAMS,
        is_pinned: Callable[[Addresses], bool] = lambda addresses: True,
    ) -> None:
        """programs: multiprocessors at most in use; is_pinned tells whether the device can reach these host addresses.

        Compiles nothing yet; the first execute does, which takes a second once per machine. On device "cpu" the kernel must be interpreted
        (TRITON_INTERPRET=1), which is for tests.
        """
        import torch

        from lmc.cache.transfer.backends import copy_kernel

        self._torch = torch
        self._device = torch.device(device)
        self._programs = programs
        self._is_pinned = is_pinned
        self._code = copy_kernel
        self._kernel = copy_kernel.compiled()

    def refuses(self, descriptors: Descriptors) -> str:
        """Why these descriptors need another backend; empty when they don't."""
        together = np.bitwise_or.reduce(descriptors.src | descriptors.dst | descriptors.size)
        if int(together) % self._code.ALIGNMENT:
            return f"addresses and sizes are not multiples of {self._code.ALIGNMENT} bytes"
        if not self._is_pinned(descriptors.slots):
            return "the slots are not pinned"
        return ""

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        if len(descriptors) == 0:
            return
        parts = fragment(descriptors, FRAGMENT_BYTES)
        try:
            self._launch(parts, stream)
        except (
            RuntimeError,
            self._code.TritonError,
        ) as error:  # no memory for the table, or the kernel does not compile
            raise TransferError(f"the copy kernel cannot be launched: {error}") from error

    def _launch(self, parts: Descriptors, stream: int) -> None:
        torch = self._torch
        table = torch.from_numpy(np.stack((parts.src, parts.dst, parts.size)).view(np.int64))
        with on_stream(self._device, stream):
            if self._device.type == "cuda":
                table = table.pin_memory().to(self._device, non_blocking=True)
            self._kernel[(min(len(parts), self._programs),)](
                table[0],
                table[1],
                table[2],
                len(parts),
                BLOCK=self._code.BLOCK_WORDS,
                num_warps=self._code.NUM_WARPS,
                enable_fp_fusion=False,  # there is no arithmetic; unset, Triton warns
            )
