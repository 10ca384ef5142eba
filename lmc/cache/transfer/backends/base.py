"""What a backend is: it executes descriptors, and knows nothing of layouts, blocks or chunks."""

from __future__ import annotations

from typing import Protocol

from lmc.cache.transfer.planner import Descriptors


class Backend(Protocol):
    name: str

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        """Copy every descriptor. Bytes at the destination outside the descriptors stay as they are.

        stream is a CUDA stream handle: the copies are queued there and are done when the stream gets past them. A backend of the CPU
        ignores it and returns when the bytes are in place. Raises TransferError; the destination may then hold part of the bytes.
        """
