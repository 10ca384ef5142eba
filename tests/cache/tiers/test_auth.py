"""auth_key: who can write to the medium and does not know it can make no chunk that is served."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.sections import RedisConfig, S3Config
from lmc.cache.tiers.base import Tier
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import FOOTER_BYTES, TierScope, derive_auth_key
from lmc.cache.tiers.open import open_tiers, read_auth_key
from lmc.cache.tiers.redis import RedisTier
from lmc.cache.tiers.s3 import S3Tier
from lmc.errors import ConfigError, Corrupt, Forged
from tests import services
from tests.cache.instance import Instance, chunk_files, prompt, settings
from tests.cache.tiers.test_disk import file_of
from tests.contracts.tier import CHUNK_BYTES, SCOPE, OpenTier, TierContract, key, load, payload

KEY = derive_auth_key("a key that nobody guesses")
TEXT = "another key that nobody guesses"


def keyed(scope: TierScope) -> TierScope:
    return replace(scope, auth_key=KEY)


class Authenticated(TierContract):
    """The contract holds with a key, and none but its owner's chunks are served."""

    model_examples = 5

    def plain(self, open_tier: OpenTier) -> Tier:
        """What somebody without the key writes with."""
        tier = open_tier(SCOPE)
        tier._scope = SCOPE  # type: ignore[attr-defined]
        return tier

    def test_a_chunk_without_the_key_is_forged(self, open_tier: OpenTier) -> None:
        owner = open_tier(SCOPE)
        self.plain(open_tier).put(key(1), payload(1))
        with pytest.raises(Forged, match="not sealed with this cache's auth_key"):
            load(owner, 1)
        owner.put(key(1), payload(1))
        assert load(owner, 1) == payload(1)

    def test_a_chunk_with_another_key_is_forged(self, open_tier: OpenTier) -> None:
        owner, other = open_tier(SCOPE), open_tier(SCOPE)
        other._scope = replace(SCOPE, auth_key=derive_auth_key(TEXT))  # type: ignore[attr-defined]
        other.put(key(1), payload(1))
        with pytest.raises(Forged):
            load(owner, 1)

    def test_who_has_no_key_does_not_read_a_sealed_chunk(self, open_tier: OpenTier) -> None:
        open_tier(SCOPE).put(key(1), payload(1))
        with pytest.raises(Corrupt, match="stored with an auth_key, and this cache has none"):
            load(self.plain(open_tier), 1)


class TestDisk(Authenticated):
    @pytest.fixture
    def open_tier(self, tmp_path: Path) -> OpenTier:
        return lambda scope: DiskTier(tmp_path, keyed(scope))


@pytest.mark.service
class TestRedis(Authenticated):
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.RedisServer]:
        with services.redis_server(tmp_path_factory.mktemp("redis")) as running:
            yield running

    @pytest.fixture
    def open_tier(self, server: services.RedisServer) -> OpenTier:
        with server.client() as client:
            client.flushall()
        return lambda scope: RedisTier(RedisConfig(url=server.url, timeout=20.0), keyed(scope))


@pytest.mark.service
def test_s3() -> None:
    with services.s3_server("chunks") as endpoint:
        config = S3Config(bucket="chunks", endpoint=endpoint, access_key_id="id", secret_access_key="s", timeout=20.0)
        owner, other = S3Tier(config, keyed(SCOPE)), S3Tier(config, SCOPE)
        owner.put(key(1), payload(1))
        assert load(owner, 1) == payload(1)
        other.put(key(2), payload(2))
        with pytest.raises(Forged, match="s3 tier"):
            load(owner, 2)


def test_no_rearrangement_of_genuine_bytes_is_served(tmp_path: Path) -> None:
    """Swapped between keys, ranks, namespaces and layouts; an older payload under a newer footer, and the other way round."""
    owner = DiskTier(tmp_path, keyed(SCOPE))
    scopes = [
        replace(keyed(SCOPE), rank=1),
        replace(keyed(SCOPE), namespace="fedcba9876543210"),
        replace(keyed(SCOPE), layout="another layout"),
    ]
    genuine = []
    for scope in scopes:
        DiskTier(tmp_path, scope).put(key(1), payload(1))
        genuine.append(file_of(tmp_path, 1, scope).read_bytes())
    for number in (1, 2):
        owner.put(key(number), payload(number))
    older, second = (file_of(tmp_path, number).read_bytes() for number in (1, 2))
    owner.put(key(1), payload(3))
    newer = file_of(tmp_path, 1).read_bytes()
    genuine += [second, older[:-FOOTER_BYTES] + newer[-FOOTER_BYTES:], newer[:-FOOTER_BYTES] + older[-FOOTER_BYTES:]]
    for content in genuine:
        file_of(tmp_path, 1).write_bytes(content)
        with pytest.raises(Corrupt):
            load(owner, 1)
    file_of(tmp_path, 1).write_bytes(newer)
    assert load(owner, 1) == payload(3)


def test_no_byte_of_a_sealed_chunk_may_change_even_with_the_checksums_made_anew(tmp_path: Path) -> None:
    owner = DiskTier(tmp_path, keyed(SCOPE))
    owner.put(key(1), payload(1))
    path = file_of(tmp_path, 1)
    genuine = path.read_bytes()
    chance = random.Random(3)
    positions = [*(CHUNK_BYTES + chance.randrange(FOOTER_BYTES) for _ in range(200)), *range(0, CHUNK_BYTES, 997)]
    for position in positions:
        changed = bytearray(genuine)
        changed[position] ^= 1 << chance.randrange(8)
        forged = SCOPE.seal(key(1), SCOPE.checksum(memoryview(changed)[:CHUNK_BYTES]), None, CHUNK_BYTES, None)
        for content in (bytes(changed), bytes(changed[:CHUNK_BYTES]) + forged):
            path.write_bytes(content)
            with pytest.raises(Corrupt):
                load(owner, 1)


@pytest.mark.parametrize("size", [1, 240, 4096, 300_000])
@pytest.mark.parametrize("cached", [True, False])
def test_both_ways_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, cached: bool) -> None:
    from lmc.cache.tiers import read_loop

    monkeypatch.setattr(read_loop, "_is_cached", lambda *_: cached)
    tier = DiskTier(tmp_path, keyed(replace(SCOPE, chunk_bytes=size)))
    tier.put(key(1), payload(1, size))
    assert load(tier, 1, size) == payload(1, size)


def test_the_key_comes_from_a_setting_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{TEXT}\n")
    by_file = CacheConfig.model_validate({"auth_key_file": tmp_path / "key"})
    assert read_auth_key(by_file) == read_auth_key(CacheConfig(auth_key=TEXT)) == derive_auth_key(TEXT)
    assert read_auth_key(CacheConfig()) == b""
    assert TEXT not in repr(TierScope("ns", 0, "layout", 1, derive_auth_key(TEXT)))
    for wrong in ({"auth_key": "short"}, {"auth_key_file": tmp_path / "none"}):
        with pytest.raises(ConfigError, match="auth_key"):
            open_tiers(CacheConfig.model_validate(wrong), SCOPE)
    with pytest.raises(ValueError, match="both set"):
        CacheConfig.model_validate({"auth_key": TEXT, "auth_key_file": tmp_path / "key"})


def test_a_forged_chunk_is_a_miss_of_that_cause_and_is_replaced(tmp_path: Path) -> None:
    tokens = prompt(1, 50)
    stranger = Instance(settings(disk_path=tmp_path))
    stranger.serve(tokens)
    stranger.close()
    instance = Instance(settings(disk_path=tmp_path, auth_key=TEXT))
    assert instance.serve(tokens).loaded == 0
    assert instance.metric("failure_causes_total", operation="stage", tier="disk", cause="forged") == 6
    instance.serve(tokens)
    instance.close()
    assert len(chunk_files(tmp_path)) == 6
    again = Instance(settings(disk_path=tmp_path, auth_key=TEXT))
    assert again.serve(tokens).sources == {"disk": 48}
    again.close()
