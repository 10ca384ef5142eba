"""Puts the backends of a CUDA device together and measures them against each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec

import numpy as np

from lmc.cache.transfer import cost
from lmc.cache.transfer.backends.auto import AutoBackend
from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.backends.dma import DmaBackend
from lmc.cache.transfer.backends.kernel import KernelBackend
from lmc.cache.transfer.backends.reference import TorchBackend
from lmc.cache.transfer.backends.staged import StagedBackend
from lmc.cache.transfer.cuda import Driver
from lmc.cache.transfer.planner import Addresses, Descriptors, Direction
from lmc.cache.transfer.runtimes import run_now
from lmc.cache.transfer.streams import Runtime, Stream
from lmc.errors import TransferError

logger = logging.getLogger(__name__)

STAGING_BYTES = 32 << 20


def device_backend(
    device: str, forced: str, is_pinned: Callable[[Addresses], bool], driver: Driver, runtime: Runtime
) -> AutoBackend:
    """forced: the name to prefer, without calibration; empty to measure which is fastest when.

    Every backend has copied both ways when this returns: what it compiles and loads is not left to the first copies in serving. Raises
    TransferError without device memory to copy with.
    """
    try:
        backends = {"torch": TorchBackend(device)} if forced == "torch" else device_backends(device, is_pinned, driver)
        measure = device_measure(device, runtime, backends)
        for name in list(backends):
            try:
                for direction in Direction:
                    measure(name, direction, 4096, 2)
            except TransferError as error:
                if len(backends) == 1 or name == "dma":
                    raise
                logger.warning("lmc: transfer: the %s backend is left out: %s", name, error)
                del backends[name]
        model = None if forced else cost.calibrate(backends, measure)
    except RuntimeError as error:  # torch's, of memory that is not there
        raise TransferError(
            f"transfers on {device} cannot be set up: {error}; leave the device some memory, or run with --no-cache"
        ) from error
    if model is not None:
        logger.info("lmc: transfer calibration on %s in %.0f ms: %s", device, model.seconds * 1e3, model.describe())
    return AutoBackend(backends, model, partial(run_now, runtime), forced=forced)


def device_backends(device: str, is_pinned: Callable[[Addresses], bool], driver: Driver) -> dict[str, Backend]:
    """The copy engine takes anything; the others have conditions, the first of them Triton."""
    import torch

    translated = not driver.takes_host_pointers(torch.device(device).index or 0)
    dma = DmaBackend(driver, batched=not translated)
    if find_spec("triton") is None:
        logger.warning("lmc: transfer: triton is not installed; every copy goes to the copy engine, small ones slowly")
        return {"dma": dma}
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device=device)
    staged = StagedBackend(KernelBackend(device), dma, staging.data_ptr(), STAGING_BYTES, staging)
    if translated:
        logger.warning(
            "lmc: transfer: %s does not reach registered memory under the host's addresses (WSL2, some virtual GPUs); "
            "copies are made one by one, and by no kernel",
            device,
        )
        return {"dma": dma, "staged": staged}
    return {"dma": dma, "kernel": KernelBackend(device, is_pinned=is_pinned), "staged": staged}


def device_measure(device: str, runtime: Runtime, backends: Mapping[str, Backend]) -> cost.Measure:
    """Seconds between two events around one batch of scattered pieces in scratch memory."""
    import torch

    blocks = torch.zeros(cost.SCRATCH_BYTES, dtype=torch.uint8, device=device)
    slots = torch.zeros(cost.SCRATCH_BYTES, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    stream = runtime.new_stream()
    generator = np.random.default_rng(0)

    def measure(name: str, direction: Direction, piece: int, count: int) -> float:
        places = generator.permutation(cost.SCRATCH_BYTES // piece)[:count].astype(np.uint64) * np.uint64(piece)
        size = np.full(count, piece, dtype=np.uint64)
        engine = np.uint64(blocks.data_ptr()) + places
        slot = np.uint64(slots.data_ptr()) + np.arange(count, dtype=np.uint64) * np.uint64(piece)
        storing = direction is Direction.STORE
        copies = Descriptors(engine if storing else slot, slot if storing else engine, size, direction)
        return seconds_on(stream, runtime, backends[name], copies)

    return measure


def seconds_on(stream: Stream, runtime: Runtime, backend: Backend, copies: Descriptors) -> float:
    """Execute once on the stream while nothing else runs on the device; the time is the stream's own."""
    runtime.compute_stream().record().synchronize()
    started = stream.record()
    stream.run(partial(backend.execute, copies))
    ended = stream.record()
    ended.synchronize()
    return ended.seconds_since(started)
