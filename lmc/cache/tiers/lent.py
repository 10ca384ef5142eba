"""Memory that several processes map: host slots that another process may fill and read for a tier."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable


class LentMemory(NamedTuple):
    descriptor: int
    address: int  # in this process
    size: int
    mapping: object = None  # keeps the memory mapped at this address


@runtime_checkable
class Borrower(Protocol):
    """A tier that moves chunks in such memory without a copy."""

    def lend(self, memory: LentMemory) -> None:
        """Tell it of memory that other processes can map. Chunks elsewhere are moved all the same."""
