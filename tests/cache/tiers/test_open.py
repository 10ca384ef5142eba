from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.tiers.breaker import BoundedBreaker, Breaker
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.late import LateTier
from lmc.cache.tiers.open import open_tiers
from lmc.errors import ConfigError, TierError
from tests import services
from tests.contracts.tier import SCOPE, key, load, payload


def test_without_settings_there_is_no_tier() -> None:
    assert open_tiers(CacheConfig(), SCOPE) == ({}, [])


def test_a_disk_tier_works(tmp_path: Path) -> None:
    tiers, warnings = open_tiers(CacheConfig.model_validate({"disk": {"path": tmp_path}}), SCOPE)
    assert not warnings
    assert isinstance(tiers["disk"], BoundedBreaker) and isinstance(tiers["disk"]._tier, LateTier)
    assert isinstance(tiers["disk"]._tier.open(), DiskTier) and tiers["disk"].is_open
    tiers["disk"].put(key(1), payload(1))
    assert load(tiers["disk"], 1) == payload(1)


def test_a_disk_tier_that_cannot_be_opened_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = {"disk": {"path": tmp_path / "file"}}
    tiers, [warning] = open_tiers(CacheConfig.model_validate(settings), SCOPE)
    assert not tiers
    assert "Not a directory; running without it" in warning
    with pytest.raises(TierError, match="Not a directory"):
        open_tiers(CacheConfig.model_validate(settings | {"strict": True}), SCOPE)


def test_remote_tiers_that_do_not_answer_stay_and_are_tried_again() -> None:
    address = f"{services.LOCAL}:{services.free_port()}"
    settings = {
        "redis": {"url": f"redis://{address}"},
        "s3": {"bucket": "chunks", "endpoint": f"http://{address}", "access_key_id": "a", "secret_access_key": "b"},
    }
    settings["s3"]["timeout"] = 0.3
    tiers, warnings = open_tiers(CacheConfig.model_validate(settings), SCOPE)
    assert list(tiers) == ["redis", "s3"]
    assert len(warnings) == 2
    assert all("running without it until it answers" in warning for warning in warnings)
    for tier in tiers.values():
        assert isinstance(tier, Breaker)
        with pytest.raises(TierError):
            tier.put(key(1), payload(1))


@pytest.mark.service
def test_a_redis_that_answers_gives_no_warning(tmp_path: Path) -> None:
    with services.redis_server(tmp_path) as server:
        tiers, warnings = open_tiers(CacheConfig.model_validate({"redis": {"url": server.url}}), SCOPE)
        assert not warnings
        tiers["redis"].put(key(1), payload(1))
        assert load(tiers["redis"], 1) == payload(1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lmc.cache.tiers.s3", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"obstore; install lmc-kv\[s3\]"):
        open_tiers(CacheConfig.model_validate({"s3": {"bucket": "chunks"}}), SCOPE)
