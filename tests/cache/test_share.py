"""Data-parallel engines of a node share what is set for the node: memory, a disk folder, ports and files."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.cache.config import CacheConfig
from lmc.cache.settings import load_settings
from lmc.cache.share import Share, of_directory, of_engine, part_of
from lmc.cache.worker import open as opening
from lmc.errors import ConfigError
from lmc.memory import Memory
from tests.cache.instance import CHUNK_BYTES, Instance, chunk_files, prompt, settings

GIB = 1 << 30


def config(**values: object) -> CacheConfig:
    return load_settings(flags={name.replace("__", "."): value for name, value in values.items()}).config


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(opening, "available_memory", lambda: Memory(num_bytes, 2 * num_bytes, "memory.max"))


@given(
    st.integers(1, 16),
    st.integers(1, 8),
    st.one_of(st.integers(GIB, 64 * GIB), st.sampled_from(["25%", "100%", "0.5%"])),
)
def test_all_ranks_of_all_engines_together_take_no_more_than_was_asked(
    engines: int, ranks: int, capacity: int | str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        free(patch, 40 * GIB)
        asked = config(host__capacity=capacity)
        taken = sum(
            opening.host_bytes(of_engine(asked, Share(engine, engines)), rank, ranks)
            for engine in range(engines)
            for rank in range(ranks)
        )
    allowed = 40 * GIB * float(capacity[:-1]) / 100 if isinstance(capacity, str) else capacity
    assert allowed * 0.999 <= taken <= allowed


def test_what_was_decided_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    free(monkeypatch, 40 * GIB)
    caplog.set_level(logging.INFO, "lmc")
    mine = of_engine(config(), Share(1, 2))
    for rank in range(4):
        opening.host_bytes(mine, rank, 4)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        "lmc: host memory: 5.0 GiB of this engine for 4 ranks, 1.2 GiB each "
        "(asked for 12.5%; 40.0 GiB are free here, as memory.max says)"
    )


def test_more_than_is_free_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    free(monkeypatch, GIB)
    assert opening.host_bytes(config(host__capacity="2GiB"), 0, 1) == 2 * GIB
    assert "2.0 GiB is more than the 1.0 GiB that are free" in caplog.text


def test_each_engine_has_a_port_and_a_record_of_its_own() -> None:
    asked = config(metrics__port=9400, record="/data/trace.jsonl")
    mine = [of_engine(asked, Share(rank, 4)) for rank in range(4)]
    assert [one.metrics.port for one in mine] == [9400, 9401, 9402, 9403]
    assert [str(one.record) for one in mine] == [
        "/data/trace.jsonl",
        *(f"/data/trace.dp{rank}.jsonl" for rank in (1, 2, 3)),
    ]
    assert of_engine(config(), Share(3, 4)).metrics.port == 0  # each takes a free one
    with pytest.raises(ConfigError, match="leaves no port for engine 3"):
        of_engine(config(metrics__port=65533), Share(3, 4))


def test_engines_of_other_nodes_take_nothing_of_this_one() -> None:
    asked = config(host__capacity="8GiB", disk__path="/data", disk__capacity="80GiB")
    mine = of_directory(of_engine(asked, Share(rank=5, engines=4)), Share(rank=5, engines=4))
    assert (mine.host.capacity, mine.disk.capacity, mine.metrics.port) == (2 * GIB, 20 * GIB, 0)
    assert part_of(asked, Share(5, 4)) == (1, 4)
    alone = of_engine(asked, Share(rank=5))
    assert (alone.host, alone.disk) == (asked.host, asked.disk)


def engines(asked: CacheConfig, number: int) -> list[Instance]:
    shares = [Share(rank, number) for rank in range(number)]
    return [Instance(of_engine(asked, share), part=part_of(asked, share), share=share) for share in shares]


def test_a_folders_capacity_counts_once(tmp_path: Path) -> None:
    """Over three starts, with prompts that differ: never more files than fit, and each engine finds what the other has written."""
    fits = 40
    asked = settings(disk_path=tmp_path, disk_capacity=fits * (CHUNK_BYTES + 4096), lookup_deadline=60)
    for start in range(3):
        pair = engines(asked, 2)
        try:
            for turn in range(12):
                for number, engine in enumerate(pair):
                    engine.serve(prompt(1000 * start + 10 * turn + number, 40))
            assert fits * 0.8 <= len(chunk_files(tmp_path)) <= fits
            if start == 0:
                assert pair[1].serve(prompt(0, 40)).sources == {"disk": 32}  # the first engine has written it
        finally:
            for engine in pair:
                engine.close()


def test_what_is_beyond_the_capacity_at_the_start_is_deleted_by_the_engine_whose_part_it_is(tmp_path: Path) -> None:
    values = {"disk_path": tmp_path, "lookup_deadline": 60}
    filler = Instance(settings(**{**values, "disk_capacity": "1MiB"}))
    for seed in range(20):
        filler.serve(prompt(seed, 40))
    filler.close()
    assert len(chunk_files(tmp_path)) == 100
    pair = engines(settings(**{**values, "disk_capacity": 30 * (CHUNK_BYTES + 4096)}), 2)
    try:
        for engine in pair:
            engine.pump()
            engine.settle()
    finally:
        for engine in pair:
            engine.close()
    assert len(chunk_files(tmp_path)) <= 30


def test_a_folder_that_other_nodes_use_too_is_not_divided() -> None:
    assert part_of(config(disk__path="/data", disk__shared=True), Share(1, 2)) == (0, 1)


# Stand-ins for the engines' own objects, with what these hold in a real start with several engines.


def vllm_config(rank: int, size: int, local: int, engine_id: str) -> SimpleNamespace:
    parallel = SimpleNamespace(
        data_parallel_index=rank, data_parallel_rank=rank, data_parallel_size=size, data_parallel_size_local=local
    )
    return SimpleNamespace(parallel_config=parallel, kv_transfer_config=SimpleNamespace(engine_id=engine_id))


@pytest.mark.parametrize(
    ("found", "asked", "arguments", "share"),
    [
        (vllm_config(0, 1, 1, "a-b"), None, ["--data-parallel-size", "4"], Share(0, 1)),
        (vllm_config(5, 8, 4, "a-b_dp5"), None, [], Share(5, 4)),  # experts: vLLM says all
        (vllm_config(1, 1, 1, "a-b_dp1"), None, ["--data-parallel-size", "2"], Share(1, 2)),
        (vllm_config(1, 1, 1, "a-b_dp1"), None, ["-dp=8", "-dpl", "4"], Share(1, 4)),
        (vllm_config(1, 1, 1, "a-b_dp1"), 3, ["-dp", "8"], Share(1, 3)),
        (vllm_config(1, 1, 1, "a-b_dp1"), None, ["-dp", "8", "--data-parallel-rank", "1"], Share(1, 1)),
    ],
)
def test_vllms_share(found: SimpleNamespace, asked: int | None, arguments: list[str], share: Share) -> None:
    from lmc.cache.connectors.vllm.parallel import share_of

    assert share_of(found, asked, arguments) == share
