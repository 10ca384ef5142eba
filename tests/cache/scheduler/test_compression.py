"""Compressed tiers in a whole cache: the bytes that come back, what the directory believes they take, and what the metrics say."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from lmc.cache.tiers.format import stored_bytes
from tests.cache import instance as engine
from tests.cache.instance import Instance, chunk_files, prompt, settings, start

BLOCK = 8192
CHUNK = engine.NUM_LAYERS * BLOCK * engine.CHUNK_TOKENS // engine.BLOCK_TOKENS  # raw bytes of one rank
PROMPTS = [prompt(seed, 50) for seed in range(12)]  # six chunks each


def right_bytes(rank: int, tokens: list[int], block: int, salt: str = "") -> np.ndarray:
    """As KV of bf16 is, and for every fifth block noise: so chunks are of many sizes."""
    text = f"{rank}/{salt}/{list(tokens[: (block + 1) * engine.BLOCK_TOKENS])}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    size = engine.NUM_LAYERS * BLOCK
    if seed % 5 == 0:
        return np.frombuffer(rng.bytes(size), np.uint8).reshape(engine.NUM_LAYERS, BLOCK)
    values = rng.standard_normal(size // 2).astype(np.float32) * (1 + seed % 7)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(engine.NUM_LAYERS, BLOCK)


@pytest.fixture(autouse=True)
def bf16_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine._layout
    monkeypatch.setattr(engine, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(engine, "right_bytes", right_bytes)
    monkeypatch.setattr(
        engine, "_layout", lambda blocks: dataclasses.replace(plain(blocks), dtypes=frozenset({"bfloat16"}))
    )


def options(folder: Path, num_ranks: int = 1, **more: object) -> dict[str, object]:
    host = {"host_capacity": 20 * CHUNK * num_ranks, "disk_path": folder, "disk_capacity": "64MiB"}
    return {**host, "disk_compress": "lossless", **more}


def taken(folder: Path, num_ranks: int) -> int:
    return sum(path.stat().st_size for rank in range(num_ranks) for path in chunk_files(folder, rank))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("compress", ["lossless", "lossless-max"])
def test_what_was_compressed_comes_back_after_a_restart(
    instances: list[Instance], tmp_path: Path, num_ranks: int, compress: str
) -> None:
    values = options(tmp_path, num_ranks, disk_compress=compress)
    first = Instance(settings(**values), num_ranks)
    for tokens in PROMPTS:
        first.serve(tokens)
    held = taken(tmp_path, num_ranks)
    assert first.scheduler.directory.room()["disk"][0] == held
    assert held < 0.85 * 6 * len(PROMPTS) * num_ranks * stored_bytes(CHUNK)
    first.close()
    second = start(instances, num_ranks, **values)
    assert second.scheduler.directory.room()["disk"][0] == held
    for tokens in PROMPTS:
        assert second.serve(tokens).sources["disk"] == 48  # serve() compares every byte


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_a_full_disk_is_counted_to_the_byte(
    instances: list[Instance], tmp_path: Path, num_ranks: int, policy: str
) -> None:
    raw = 15 * stored_bytes(CHUNK) * num_ranks
    cache = start(instances, num_ranks, **options(tmp_path, num_ranks, disk_capacity=raw, policy=policy))
    most = 0
    for number in range(2 * len(PROMPTS)):
        cache.serve(PROMPTS[(number * number) % len(PROMPTS)])
        held, capacity = cache.scheduler.directory.room()["disk"]
        assert held == taken(tmp_path, num_ranks) and held <= capacity == raw
        most = max(most, cache.scheduler.directory.usage()["disk"][0])
    assert most > 15, "compression has made room for more chunks than fit without"
    assert cache.metric("evicted_chunks_total", tier="disk") > 0
    assert cache.metric("failures_total", operation="write") == 0


def test_settings_may_change_between_starts(instances: list[Instance], tmp_path: Path) -> None:
    codes = ["none", "lossless", "lossless-max"]
    for number, compress in enumerate(codes):
        cache = Instance(settings(**options(tmp_path, disk_compress=compress)))
        for earlier in range(number):
            assert cache.serve(PROMPTS[earlier]).sources["disk"] == 48
        cache.serve(PROMPTS[number])
        cache.close()
    last = start(instances, **options(tmp_path, disk_compress="none"))
    assert last.scheduler.directory.room()["disk"][0] == taken(tmp_path, 1)
    assert all(last.serve(PROMPTS[number]).sources["disk"] == 48 for number in range(3))


def test_the_metrics_say_what_the_codec_did(instances: list[Instance], tmp_path: Path) -> None:
    first = Instance(settings(**options(tmp_path)))
    for tokens in PROMPTS:
        first.serve(tokens)
    ways = {"tier": "disk", "transfer": "write"}
    assert first.metric("codec_raw_bytes_total", **ways) == 6 * len(PROMPTS) * CHUNK
    assert first.metric("codec_stored_bytes_total", **ways) == taken(tmp_path, 1)
    assert first.metric("codec_seconds_total", **ways) > 0
    assert first.metric("codec_ratio", tier="disk") == pytest.approx(taken(tmp_path, 1) / (6 * len(PROMPTS) * CHUNK))
    assert first.metric("tier_bytes", tier="disk") == taken(tmp_path, 1)
    assert first.metric("tier_capacity_bytes", tier="disk") == 64 << 20
    assert first.scheduler.stats()["tiers"]["disk"]["bytes"] == taken(tmp_path, 1)  # type: ignore[index]
    first.close()
    second = start(instances, **options(tmp_path))
    second.serve(PROMPTS[0])
    assert 0 < second.metric("codec_raw_bytes_total", tier="disk", transfer="stage") <= 6 * CHUNK


def test_a_damaged_compressed_chunk_is_a_miss_and_is_replaced(instances: list[Instance], tmp_path: Path) -> None:
    first = Instance(settings(**options(tmp_path)))
    first.serve(PROMPTS[0])
    first.close()
    short = [path for path in chunk_files(tmp_path) if path.stat().st_size < stored_bytes(CHUNK)]
    for path in short:
        damaged = bytearray(path.read_bytes())
        damaged[20] ^= 1
        path.write_bytes(damaged)
    second = start(instances, **options(tmp_path))
    assert second.serve(PROMPTS[0]).loaded < 48
    assert second.serve(PROMPTS[0]).loaded == 48
    assert second.scheduler.directory.room()["disk"][0] == taken(tmp_path, 1)


def test_a_cache_of_unknown_numbers_runs_without_the_tier(
    instances: list[Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine._layout
    monkeypatch.setattr(
        engine, "_layout", lambda blocks: dataclasses.replace(plain(blocks), dtypes=frozenset({"int8"}))
    )
    cache = start(instances, **options(tmp_path))
    cache.serve(PROMPTS[0])
    assert set(cache.scheduler.directory.usage()) == {"host"} and chunk_files(tmp_path) == []
    assert cache.serve(PROMPTS[0]).sources == {"host": 48}
