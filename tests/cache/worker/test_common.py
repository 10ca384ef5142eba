"""Ranks that hold the same KV: one stores, all load from its slots, and what fails on one is a miss for all."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lmc.cache.plan import COPY, BlockCopy, Plan, RequestCopies
from lmc.cache.transfer.common_slots import SlotsOffer, offer_slots, take_slots
from lmc.cache.transfer.pinned import Slab
from lmc.cache.transfer.planner import Descriptors, Direction
from lmc.cache.worker import common as common_module
from lmc.errors import TierError, TransferError
from tests import services
from tests.cache.instance import CHUNK_BYTES, Instance, agree, chunk_files, prompt, settings

ALIKE = [(2, 2), (4, 2), (4, 4)]  # ranks, and how many neighbours hold the same


def break_next_load(instance: Instance, rank: int) -> None:
    backend = instance.workers[rank].copier.backend
    copy = backend.execute

    def broken(descriptors: Descriptors, stream: int = 0) -> None:
        if descriptors.direction is Direction.LOAD:
            backend.execute = copy
            raise TransferError("injected")
        copy(descriptors, stream)

    backend.execute = broken


@pytest.mark.service
@pytest.mark.parametrize(("ranks", "alike"), ALIKE)
def test_one_copy_is_stored_in_every_tier_and_all_ranks_load_it(
    instances: list[Instance], tmp_path: Path, ranks: int, alike: int
) -> None:
    parts = ranks // alike
    with services.redis_server(tmp_path) as server:
        redis = {"redis_url": server.url, "lookup_deadline": 60}
        below = {"disk_path": str(tmp_path / "disk"), "host_capacity": 8 * parts * CHUNK_BYTES, **redis}
        one = Instance(settings(**below), ranks, alike=alike)
        instances.append(one)
        first, second = prompt(1, 50), prompt(2, 50)
        assert one.serve(first).loaded == 0
        assert one.serve(first).sources == {"host": 48}
        assert [len(chunk_files(tmp_path / "disk", rank)) for rank in range(ranks)] == [6] * parts + [0] * (
            ranks - parts
        )
        assert server.client().dbsize() == 6 * parts
        assert one.scheduler.directory.usage()["host"][1] == 8
        one.serve(second)  # takes the place of the first in host memory
        assert set(one.serve(first).sources) == {"disk", "host"}
        again = Instance(settings(**below), ranks, alike=alike)
        instances.append(again)
        assert again.serve(second).sources == {"disk": 48}
        other = Instance(settings(**redis), ranks, alike=alike)
        instances.append(other)
        assert other.serve(first).sources == {"redis": 48}


@pytest.mark.parametrize(("ranks", "alike"), ALIKE)
def test_a_load_that_fails_on_one_rank_is_a_miss_for_all(instances: list[Instance], ranks: int, alike: int) -> None:
    one = Instance(settings(), ranks, alike=alike)
    instances.append(one)
    tokens = prompt(1, 50)
    one.serve(tokens)
    for rank in range(ranks):
        break_next_load(one, rank)
        assert one.serve(tokens).loaded == 0
        assert one.serve(tokens).loaded == 48


@pytest.mark.parametrize("failing", [0, 1])
def test_nothing_is_stored_of_a_pass_in_which_one_of_the_ranks_read_unfilled_blocks(
    instances: list[Instance], failing: int
) -> None:
    """Each rank reads what all ranks have computed, so the bytes of the rank that stores are garbage, too."""
    one = Instance(settings(), 2, alike=2)
    instances.append(one)
    store = RequestCopies("r", (BlockCopy(7, bytes([7]) * 32, 0, (1, 2)),))
    reports = []
    for rank, worker in enumerate(one.workers):
        worker.begin(Plan(failed_blocks=[9] if rank == failing else []))
        worker.end(Plan(stores=[store]))
        reports.append(worker.take_report())
    merged = reports[0].merge(reports[1])
    assert merged.finished[7] == 2
    assert merged.failed == {7: COPY}


@pytest.mark.parametrize("streams", [False, True])
@hypothesis_settings(max_examples=15, deadline=None)
@given(requests=st.lists(st.tuples(st.integers(0, 5), st.integers(9, 70), st.integers(-1, 3)), min_size=4, max_size=14))
def test_every_rank_reads_right_bytes_whatever_is_evicted_and_fails(
    requests: list[tuple[int, int, int]], streams: bool
) -> None:
    """Instance.serve checks each loaded byte. The host holds twelve chunks; the third number is the rank whose next load fails."""
    one = Instance(settings(host_capacity=12 * 2 * CHUNK_BYTES), 4, alike=2, streams=streams)
    try:
        for seed, length, failing in requests:
            if failing >= 0 and not streams:
                break_next_load(one, failing)
            one.serve(prompt(seed, length), settle=False)
        one.settle()
        assert one.scheduler.directory.num_open == 0
    finally:
        one.close()


def open_files() -> set[str]:
    return {file.name for file in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("lost", ["the memory of one", "the cache of one", "room for a chunk"])
def test_ranks_that_cannot_have_slots_in_common_store_a_copy_each(
    instances: list[Instance], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    one = Instance(settings(), 4, alike=2)
    instances.append(one)
    described: list[object] = [(worker.ready().namespace, worker.copier.layout) for worker in one.workers]
    config = settings()
    before = open_files()
    if lost == "the memory of one":

        def take(offer: SlotsOffer) -> int:
            if offer.token == tokens[0]:
                offer = dataclasses.replace(offer, token="another process's")
            return take_slots(offer)

        tokens: list[str] = []

        def offer(num_slots: int, slot_bytes: int) -> SlotsOffer:
            made = offer_slots(num_slots, slot_bytes)
            tokens.append(made.token)
            return made

        monkeypatch.setattr(common_module, "offer_slots", offer)
        monkeypatch.setattr(common_module, "take_slots", take)
        why = "not the memory that was offered"
    elif lost == "the cache of one":
        described[3] = MemoryError("injected")
        why = "rank 3 has no cache"
    else:
        config = settings(host_capacity=2 * CHUNK_BYTES - 1)
        why = "less than one chunk"
    assert agree(config, described, 2) == [None] * 3 + [described[3] if lost == "the cache of one" else None]
    assert why in caplog.text
    assert open_files() == before


def test_another_process_maps_the_same_bytes_and_only_what_was_offered() -> None:
    offer = offer_slots(3, 5000)
    slab = Slab(3, 5000, common=offer.descriptor)
    slab.view(1)[:] = bytes([7]) * 5000
    program = (
        "import sys; from lmc.cache.transfer.common_slots import SlotsOffer, take_slots; "
        "from lmc.cache.transfer.pinned import Slab; "
        "descriptor = take_slots(SlotsOffer(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], 3, 5000)); "
        "slab = Slab(3, 5000, common=descriptor); assert bytes(slab.view(1)) == bytes([7]) * 5000; "
        "slab.view(2)[:] = bytes([9]) * 5000; slab.close()"
    )
    arguments = [str(offer.process), str(offer.descriptor), offer.token]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=120)
    assert (np.frombuffer(slab.view(2), dtype=np.uint8) == 9).all()
    assert not any(slab.view(0))
    with pytest.raises(TierError, match="not the memory that was offered"):
        take_slots(dataclasses.replace(offer, descriptor=0))
    with pytest.raises(TierError, match="cannot open the memory of process"):
        take_slots(dataclasses.replace(offer, descriptor=1 << 20))
    os.close(offer.descriptor)
    assert bytes(slab.view(1)) == bytes([7]) * 5000
    slab.close()
