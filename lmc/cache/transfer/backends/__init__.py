"""Which backend copies for a layout."""

from __future__ import annotations

from lmc.cache.layout import KVLayout
from lmc.cache.transfer.backends.base import Backend
from lmc.errors import ConfigError

__all__ = ["Backend", "choose_backend"]


def choose_backend(layout: KVLayout, *, name: str = "auto", threads: int = 1) -> Backend:
    """The backend for this layout's device. name overrides the choice. Raises ConfigError when it cannot serve the device."""
    from lmc.cache.transfer.backends.host import HostBackend

    if layout.device == "cpu" and name in ("auto", "host"):
        return HostBackend(threads)
    raise ConfigError(f"the transfer backend {name!r} cannot copy to and from {layout.device}")
