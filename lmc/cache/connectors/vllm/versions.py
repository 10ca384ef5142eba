"""What the tested versions of vLLM (docs/compatibility.md) have under different names or not at all."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

if TYPE_CHECKING:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
else:
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ModuleNotFoundError:  # before 0.32 vLLM never asks where a hit came from

        class CacheHitSource:
            """Names only; nothing reads them."""

            HOST = "host"
            DISK = "disk"
            EXTERNAL_UNSPECIFIED = "external_unspecified"


try:
    from vllm.v1.kv_cache_layout import KVCacheLayout
except ModuleNotFoundError:  # a vLLM whose layouts have no such names
    LAYOUT_NAMES: frozenset[str] = frozenset()
else:
    LAYOUT_NAMES = frozenset(layout.name for layout in KVCacheLayout)

REPORTS_FAILED_REQUESTS = "failed_recving" in {field.name for field in dataclasses.fields(KVConnectorTransferResults)}

__all__ = ["LAYOUT_NAMES", "REPORTS_FAILED_REQUESTS", "CacheHitSource"]
