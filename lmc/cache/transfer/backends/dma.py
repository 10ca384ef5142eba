"""Copies by the device's copy engine: no multiprocessor is used, any alignment, pinned or pageable memory."""

from __future__ import annotations

from lmc.cache.transfer.cuda import SOURCE_ANY_ORDER, SOURCE_IN_STREAM_ORDER, Driver
from lmc.cache.transfer.planner import Descriptors, Direction


class DmaBackend:
    name = "dma"

    def __init__(self, driver: Driver, *, batched: bool = True) -> None:
        """batched: many copies in one call of the driver; False where it does not take host pointers (Driver.takes_host_pointers)."""
        self._driver = driver
        self._batched = batched

    def refuses(self, descriptors: Descriptors) -> str:
        return ""

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        # A slot holds still until its load is done, so the engine may read it early; blocks are written by the stream's predecessors.
        order = SOURCE_ANY_ORDER if descriptors.direction is Direction.LOAD else SOURCE_IN_STREAM_ORDER
        self._driver.copy(descriptors.src, descriptors.dst, descriptors.size, order, stream, batched=self._batched)
