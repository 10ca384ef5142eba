"""Chooses the backend that copies for a layout."""

from __future__ import annotations

from collections.abc import Callable

from lmc.cache.transfer.backends.auto import AutoBackend, at_once
from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.planner import Addresses
from lmc.errors import ConfigError

__all__ = ["Backend", "choose_backend"]

DEVICE_BACKENDS = ("dma", "kernel", "staged", "torch")


def choose_backend(
    layout: KVLayout,
    *,
    name: str = "auto",
    threads: int = 0,
    is_pinned: Callable[[Addresses], bool] = lambda addresses: False,
) -> AutoBackend:
    """The backends for this layout's device, calibrated: 100 ms, and a second more where a kernel must be compiled.

    name: "auto", or the backend to prefer. threads: of the host backend; 0 measures what helps. is_pinned: whether a device's kernels can
    reach these slots (Slab.is_pinned). Raises ConfigError when the name does not fit the device, TransferError without a driver.
    """
    if layout.device == "cpu":
        return _host_side(name, threads)
    if not layout.device.startswith("cuda"):
        raise ConfigError(f"there is no transfer backend for the device {layout.device}")
    if name not in ("auto", *DEVICE_BACKENDS):
        raise ConfigError(
            f"the transfer backend {name!r} does not copy to {layout.device}; use one of {DEVICE_BACKENDS}"
        )
    from lmc.cache.transfer.backends.device import device_backend
    from lmc.cache.transfer.cuda import load_driver
    from lmc.cache.transfer.runtimes import CudaRuntime

    forced = "" if name == "auto" else name
    return device_backend(layout.device, forced, is_pinned, load_driver(), CudaRuntime(layout.device))


def _host_side(name: str, threads: int) -> AutoBackend:
    if name in ("auto", "host"):
        from lmc.cache.transfer.backends.host import HostBackend, useful_threads

        host = HostBackend(threads or useful_threads())
        return AutoBackend({host.name: host}, None, at_once, threads=host.threads)
    if name == "torch":
        from lmc.cache.transfer.backends.reference import TorchBackend

        return AutoBackend({"torch": TorchBackend("cpu")}, None, at_once)
    raise ConfigError(f"the transfer backend {name!r} does not copy in CPU memory; use host or torch")
