from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from lmc.cache.sections import S3Config
from lmc.cache.tiers.s3 import S3Tier
from lmc.errors import ConfigError, TierError
from tests import services
from tests.contracts.tier import SCOPE, OpenTier, TierContract, key, load, payload

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with services.s3_server("chunks") as endpoint:
        yield endpoint


def config(endpoint: str, /, **other: object) -> S3Config:
    settings = {
        "bucket": "chunks",
        "endpoint": endpoint,
        "access_key_id": "id",
        "secret_access_key": "secret",
        "timeout": 20,
    }
    return S3Config.model_validate(settings | other)


class TestS3Tier(TierContract):
    model_examples = 5
    _prefixes = itertools.count()

    @pytest.fixture
    def open_tier(self, endpoint: str) -> OpenTier:
        prefix = f"test{next(self._prefixes)}/deep"
        return lambda scope: S3Tier(config(endpoint, prefix=prefix), scope)


def test_prefixes_do_not_meet(endpoint: str) -> None:
    one, other = (S3Tier(config(endpoint, prefix=prefix), SCOPE) for prefix in ("one", "one-more"))
    one.put(key(1), payload(1))
    assert load(other, 1) is None


def test_a_missing_bucket_is_an_error_and_not_a_miss(endpoint: str) -> None:
    tier = S3Tier(config(endpoint, bucket="absent"), SCOPE)
    with pytest.raises(TierError, match="bucket absent: cannot store"):
        tier.put(key(1), payload(1))
    with pytest.raises(TierError, match="no such bucket"):
        load(tier, 1)


def test_an_unreachable_store_costs_an_error_of_one_line_per_call() -> None:
    tier = S3Tier(config(f"http://{services.LOCAL}:{services.free_port()}", timeout=0.5), SCOPE)
    for _ in range(2):
        with pytest.raises(TierError) as caught:
            load(tier, 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(TierError, match="look up"):
        tier.contains([key(1), key(2)])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"endpoint": "store.example:9000"}, r"s3\.endpoint.*http://"),
        ({"prefix": "//"}, "empty path segment"),
        ({"secret_access_key": None}, "SecretAccessKey"),
    ],
)
def test_wrong_settings_are_refused_at_once(wrong: dict[str, str | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        S3Tier(config("http://localhost", **wrong), SCOPE)
