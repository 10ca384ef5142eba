from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmc.cache.sections import MooncakeConfig
from lmc.cache.tiers.mooncake import MooncakeTier
from tests import services
from tests.contracts.tier import OpenTier, TierContract
from tests.services import MooncakeStore

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeStore]:
    with services.mooncake_store(tmp_path_factory.mktemp("mooncake")) as running:
        yield running


@pytest.fixture(autouse=True)
def emptied(store: MooncakeStore) -> None:
    """Names of another test's chunks are this one's, too."""
    store.clear()


def mooncake_config(store: MooncakeStore, **settings: object) -> MooncakeConfig:
    """Settings with a time-out that a busy machine does not run into."""
    given = {"master": store.address, "metadata": store.metadata, "hostname": services.LOCAL, "timeout": 20.0}
    return MooncakeConfig.model_validate(given | settings)


class TestSharedByClients(TierContract):
    @pytest.fixture
    def open_tier(self, store: MooncakeStore) -> OpenTier:
        return lambda scope: MooncakeTier(mooncake_config(store), scope)
