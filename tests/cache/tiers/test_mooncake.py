from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc.cache.sections import MooncakeConfig
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.lent import LentMemory
from lmc.cache.tiers.mooncake import MooncakeTier
from lmc.cache.tiers.mooncake_client import SCRATCH
from lmc.cache.tiers.mooncake_process import Region
from lmc.errors import Corrupt
from tests import services
from tests.contracts.tier import CHUNK_BYTES, CODED, SCOPE, OpenTier, TierContract, key, kv_payload, load, payload
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


@pytest.mark.parametrize(
    "scope", [SCOPE, CODED, replace(SCOPE, auth_key=bytes(range(32)))], ids=["raw", "coded", "sealed"]
)
def test_chunks_in_lent_memory_come_and_go_with_nothing_beside_them(store: MooncakeStore, scope: TierScope) -> None:
    count, stride = 6, -(-CHUNK_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.memfd_create("slots")
    os.ftruncate(descriptor, count * stride)
    slab = memoryview(mmap.mmap(descriptor, count * stride))
    slots = [slab[start : start + CHUNK_BYTES] for start in range(0, len(slab), stride)]
    tier = MooncakeTier(mooncake_config(store), scope)
    tier.lend(LentMemory(descriptor, np.frombuffer(slab, np.uint8).ctypes.data, len(slab), slab))
    os.close(descriptor)  # the tier has its own
    wanted = bytearray(len(slab))
    for number in range(3):
        slots[number][:] = kv_payload(number)
        wanted[number * stride : number * stride + CHUNK_BYTES] = kv_payload(number)
        tier.put(key(number), slots[number])
    for number in range(3):
        tier.get(key(number), slots[5 - number])
        wanted[(5 - number) * stride : (5 - number) * stride + CHUNK_BYTES] = kv_payload(number)
    assert slab == wanted
    with tier._client.connected() as process:
        assert process.region(slots[4]) == (len(process._lent) - 1, 4 * stride, CHUNK_BYTES)
        assert process.region(memoryview(bytearray(10))) is None
    tier.close()


@given(
    seed=st.integers(0, 1000), length=st.sampled_from([1, 4096, CHUNK_BYTES, CHUNK_BYTES + 4095, CHUNK_BYTES + 4096])
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_under_a_chunks_name_is_corrupt_and_replaced(store: MooncakeStore, seed: int, length: int) -> None:
    """Real footers of other chunks with some bytes changed among it."""
    chance = random.Random(seed)
    for scope in (SCOPE, CODED):
        tier = MooncakeTier(mooncake_config(store), scope)
        tier.put(key(1), kv_payload(1))
        with tier._line("damage", key(1)) as (line, _):
            size = line.call("get_up_to", tier._name(key(1)), [Region(SCRATCH, 0, len(line.scratch))])
            damaged = bytearray(line.scratch[:size]) if length > CHUNK_BYTES else bytearray(chance.randbytes(length))
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            line.call("remove", tier._name(key(1)))
            line.scratch[: len(damaged)] = damaged
            assert line.call("put", tier._name(key(1)), [Region(SCRATCH, 0, len(damaged))]) == 0
        with pytest.raises(Corrupt):
            load(tier, 1)
        tier.delete(key(1))  # as the cache does; a put would take a whole footer's word for the payload
        tier.put(key(1), kv_payload(1))
        assert load(tier, 1) == kv_payload(1)
        tier.put(key(1), payload(1))
        assert load(tier, 1) == payload(1)
        tier.close()
