"""The interface of a backend: it executes descriptors, and knows nothing of layouts, blocks or chunks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from lmc.cache.transfer.planner import Descriptors

if TYPE_CHECKING:
    import torch


class Backend(Protocol):
    name: str

    def refuses(self, descriptors: Descriptors) -> str:
        """Why this backend cannot copy these descriptors, or an empty text if it can."""

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        """Copy every descriptor. Bytes at the destination outside the descriptors stay as they are.

        stream is a CUDA stream handle: the copies are queued there and are done when the stream gets past them. A backend of the CPU
        ignores it and returns when the bytes are in place. Raises TransferError; the destination may then hold part of the bytes.
        """


def on_stream(device: torch.device, handle: int) -> AbstractContextManager[object]:
    """torch works on this CUDA stream inside the context; on the CPU there is none."""
    if device.type != "cuda":
        return nullcontext()
    import torch

    stream: Any = torch.cuda.ExternalStream  # torch leaves its constructor untyped
    context: AbstractContextManager[object] = torch.cuda.stream(stream(handle, device))
    return context
