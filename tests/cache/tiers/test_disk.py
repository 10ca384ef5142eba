from __future__ import annotations

from pathlib import Path

import pytest
from lmc.cache.tiers.disk import DiskTier
from tests.contracts.tier import OpenTier, TierContract


class TestDiskTier(TierContract):
    @pytest.fixture
    def open_tier(self, tmp_path: Path) -> OpenTier:
        return lambda scope: DiskTier(tmp_path, scope)
