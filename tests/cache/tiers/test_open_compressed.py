"""Opening tiers that are to compress: what cannot be served is left out with one line, or refuses the start where that is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.settings import load_settings
from lmc.cache.tiers.codec import element_of
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.open import open_tiers
from lmc.errors import ConfigError, TierError

SCOPE = TierScope("abc", 0, "layout", 16_384, element="bf16")
OPAQUE = TierScope("abc", 0, "layout", 16_384)


def config(folder: Path, compress: str, **more: object) -> CacheConfig:
    return CacheConfig.model_validate({"disk": {"path": folder, "compress": compress}, **more})


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
