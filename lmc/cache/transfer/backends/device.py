"""Puts the backends of a CUDA device together and measures them against each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np

from lmc.cache.transfer.backends.auto import AutoBackend
from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.backends.dma import DmaBackend
from lmc.cache.transfer.backends.kernel import KernelBackend
from lmc.cache.transfer.backends.reference import TorchBackend
from lmc.cache.transfer.backends.staged import StagedBackend
from lmc.cache.transfer.cost import SCRATCH_BYTES, CostModel, Measure, calibrate
from lmc.cache.transfer.cuda import load_driver
from lmc.cache.transfer.planner import Addresses, Descriptors, Direction
from lmc.cache.transfer.runtimes import CudaRuntime, run_now

logger = logging.getLogger(__name__)

STAGING_BYTES = 32 << 20


def device_backend(device: str, forced: str, is_pinned: Callable[[Addresses], bool]) -> AutoBackend:
    runtime = CudaRuntime(device)
    backends = device_backends(device, is_pinned)
    if forced == "torch":
        backends = {"torch": TorchBackend(device)}
    # Scratch memory of the calibration is pinned, whatever the slab is; so it has backends of its own.
    model = None if forced else _calibrate(device, runtime)
    if model is not None:
        logger.info("lmc: transfer calibration on %s in %.0f ms: %s", device, model.seconds * 1e3, model.describe())
    return AutoBackend(backends, model, lambda queue: run_now(runtime, queue), forced=forced)


def device_backends(device: str, is_pinned: Callable[[Addresses], bool]) -> dict[str, Backend]:
    """The copy engine takes anything; the others have conditions."""
    import torch

    dma = DmaBackend(load_driver())
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device=device)
    staged = StagedBackend(KernelBackend(device), dma, staging.data_ptr(), STAGING_BYTES, staging)
    return {"dma": dma, "kernel": KernelBackend(device, is_pinned=is_pinned), "staged": staged}


def _calibrate(device: str, runtime: CudaRuntime) -> CostModel:
    backends = device_backends(device, lambda addresses: True)
    measure = device_measure(device, runtime, backends)
    for name in backends:
        for direction in Direction:
            measure(name, direction, 4096, 2)  # compile and load
    return calibrate(backends, measure)


def device_measure(device: str, runtime: CudaRuntime, backends: Mapping[str, Backend]) -> Measure:
    """Seconds between two events around one batch of scattered pieces in scratch memory."""
    import torch

    blocks = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    slots = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, pin_memory=True)
    stream = runtime.new_stream()
    generator = np.random.default_rng(0)

    def measure(name: str, direction: Direction, piece: int, count: int) -> float:
        places = generator.permutation(SCRATCH_BYTES // piece)[:count].astype(np.uint64) * np.uint64(piece)
        size = np.full(count, piece, dtype=np.uint64)
        engine = np.uint64(blocks.data_ptr()) + places
        slot = np.uint64(slots.data_ptr()) + np.arange(count, dtype=np.uint64) * np.uint64(piece)
        storing = direction is Direction.STORE
        copies = Descriptors(engine if storing else slot, slot if storing else engine, size, direction)
        torch.cuda.synchronize(device)
        started = stream.record()
        stream.run(lambda handle: backends[name].execute(copies, handle))
        ended = stream.record()
        ended.synchronize()
        return ended.seconds_since(started)

    return measure
