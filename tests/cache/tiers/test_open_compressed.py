"""Opening tiers that are to compress: what cannot be served is left out with one line, or refuses the start where that is asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.settings import load_settings
from lmc.cache.tiers import codec
from lmc.cache.tiers.codec import Element, element_of
from lmc.cache.tiers.format import TierScope, stored_bytes
from lmc.cache.tiers.open import open_tiers
from lmc.errors import ConfigError, TierError
from tests import services
from tests.contracts.tier import key

SCOPE = TierScope("abc", 0, "layout", 16_384, element="bf16")
OPAQUE = TierScope("abc", 0, "layout", 16_384)
FP8 = TierScope("abc", 0, "layout", 16_384, element="fp8")


def config(folder: Path, compress: str, **more: object) -> CacheConfig:
    return CacheConfig.model_validate({"disk": {"path": folder, "compress": compress}, **more})


def opened(folder: Path, tier: str, compress: str) -> CacheConfig:
    """Settings with that tier alone; nobody answers for the remote ones."""
    address = f"{services.LOCAL}:{services.free_port()}"
    s3 = {"bucket": "chunks", "endpoint": f"http://{address}", "access_key_id": "a", "secret_access_key": "b"}
    where = {"disk": {"path": folder}, "redis": {"url": f"redis://{address}"}, "s3": {**s3, "timeout": 0.3}}[tier]
    return CacheConfig.model_validate({tier: {**where, "compress": compress}})


@pytest.mark.parametrize("compress", ["lossless", "lossless-max"])
def test_a_tier_that_compresses_opens(tmp_path: Path, compress: str) -> None:
    tiers, warnings = open_tiers(config(tmp_path, compress), SCOPE, 1)
    assert list(tiers) == ["disk"] and warnings == []


def test_kv_of_an_unknown_kind_leaves_the_tier_out_with_one_line(tmp_path: Path) -> None:
    tiers, (warning,) = open_tiers(config(tmp_path, "lossless"), OPAQUE, 1)
    assert tiers == {}
    assert "disk.compress is lossless, but the KV of this engine" in warning and "\n" not in warning
    with pytest.raises(TierError, match="does not consist of one known kind of number"):
        open_tiers(config(tmp_path, "lossless", strict=True), OPAQUE, 1)


def test_one_that_only_asks_needs_no_codec(tmp_path: Path) -> None:
    tiers, warnings = open_tiers(config(tmp_path, "lossless"), OPAQUE)
    assert list(tiers) == ["disk"] and warnings == []


def test_a_missing_library_leaves_the_tier_out_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    tiers, (warning,) = open_tiers(config(tmp_path, "lossless-max"), SCOPE, 1)
    assert tiers == {}
    assert "lossless-max needs the package zstandard; install it, or use lossless" in warning
    assert list(open_tiers(config(tmp_path, "lossless"), SCOPE, 1)[0]) == ["disk"]
    with pytest.raises(TierError, match="zstandard"):
        open_tiers(config(tmp_path, "lossless-max", strict=True), SCOPE, 1)


@pytest.mark.parametrize("tier", ["disk", "redis", "s3"])
def test_a_code_that_cannot_shorten_such_kv_is_never_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tier: str
) -> None:
    codec.codec_loop.cache_clear()
    tiers, _ = open_tiers(opened(tmp_path, tier, "lossless"), FP8, 1)
    assert f"{tier}.compress: lossless has no code for fp8" in caplog.text
    assert codec.codec_loop.cache_info().currsize == 0, "nothing that will not run is compiled"
    if tier == "disk":
        assert tiers["disk"].put(key(1), memoryview(bytes(FP8.chunk_bytes))).codec_seconds == 0


@pytest.mark.parametrize("tier", ["disk", "redis", "s3"])
@pytest.mark.parametrize(
    ("element", "needed"), [("bf16", 1), ("fp16", 1), ("fp32", 1), ("fp8", 0), ("opaque", 1)]
)  # fp8 has a code of Zstandard's alone
def test_a_tier_opens_with_what_earlier_chunks_may_need(
    tmp_path: Path, tier: str, element: Element, needed: int
) -> None:
    codec.codec_loop.cache_clear()
    open_tiers(opened(tmp_path, tier, "none"), replace(SCOPE, element=element))
    assert codec.codec_loop.cache_info().currsize == 0, "one that only asks loads nothing"
    open_tiers(opened(tmp_path, tier, "none"), replace(SCOPE, element=element), 1)
    assert codec.codec_loop.cache_info().currsize == needed


@pytest.mark.parametrize("scope", [SCOPE, OPAQUE])
def test_no_load_compiles_when_compression_is_off_again(tmp_path: Path, scope: TierScope) -> None:
    chunk = bytes(SCOPE.chunk_bytes)
    before, _ = open_tiers(config(tmp_path, "lossless"), SCOPE, 1)
    assert before["disk"].put(key(1), memoryview(chunk)).stored_bytes < stored_bytes(len(chunk))
    codec.codec_loop.cache_clear()
    after, _ = open_tiers(config(tmp_path, "none"), scope, 1)
    compiled = codec.codec_loop.cache_info().misses
    out = bytearray(len(chunk))
    assert after["disk"].get(key(1), memoryview(out)).codec_seconds > 0 and out == chunk
    assert codec.codec_loop.cache_info().misses == compiled == 1


def test_an_unknown_codec_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "lmc.yaml"
    file.write_text("disk: {path: /nowhere, compress: gzip}")
    with pytest.raises(ConfigError, match=r"disk\.compress") as caught:
        load_settings(file)
    assert "\n" not in str(caught.value) and "lossless-max" in str(caught.value)


@pytest.mark.parametrize(
    ("dtypes", "kv_dtype", "element"),
    [
        ({"bfloat16"}, "torch.bfloat16/auto", "bf16"),
        ({"float16"}, "torch.float16", "fp16"),
        ({"float32"}, "torch.float32/auto", "fp32"),
        ({"uint8"}, "torch.bfloat16/fp8_e4m3", "fp8"),
        ({"uint8"}, "auto/torch.float8_e5m2", "fp8"),
        ({"float8_e4m3fn"}, "", "fp8"),
        ({"uint8"}, "torch.bfloat16/fp8_ds_mla", "opaque"),  # scales and bf16 between the numbers
        ({"bfloat16", "uint8"}, "torch.bfloat16/auto", "opaque"),
        ({"int8"}, "", "opaque"),
        (set(), "torch.bfloat16", "opaque"),
    ],
)
def test_what_kv_consists_of(dtypes: set[str], kv_dtype: str, element: str) -> None:
    assert element_of(dtypes, kv_dtype) == element
