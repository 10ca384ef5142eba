"""Settings of LMCache, translated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmc.cache.from_lmcache import translate
from lmc.cache.settings import load_settings
from lmc.cli import app
from lmc.errors import ConfigError

EXAMPLE = """
chunk_size: 256
local_cpu: true
max_local_cpu_size: 5.5
local_disk: "file:///var/cache/lmcache/"
max_local_disk_size: 100
remote_url: "redis://:secret@cache:6379"
remote_serde: cachegen
cache_policy: LFU
save_decode_cache: true
lookup_timeout_ms: 300
min_retrieve_tokens: 512
enable_blending: true
enable_p2p: false
save_unfull_chunk: true
extra_config: {s3_num_io_threads: 64}
made_up: 1
"""


def translated(tmp_path: Path, text: str) -> tuple[dict[str, object], str]:
    file = tmp_path / "lmcache.yaml"
    file.write_text(text)
    made = translate(file)
    return made.settings, "\n".join(made.remarks)


def test_a_file_with_everything(tmp_path: Path) -> None:
    file = tmp_path / "lmcache.yaml"
    file.write_text(EXAMPLE)
    out = tmp_path / "lmc.yaml"
    result = CliRunner().invoke(app, ["config", "from-lmcache", str(file), "-o", str(out)])
    assert result.exit_code == 0 and f"lmc config check {out}" in result.output
    config = load_settings(out).config
    assert (config.chunk_tokens, config.policy, config.store_decode, config.min_load_tokens) == (256, "lfu", True, 512)
    assert (config.host.capacity, config.disk.capacity) == (5.5 * (1 << 30), 100 << 30)
    assert (str(config.disk.path), config.redis.url) == ("/var/cache/lmcache", "redis://:secret@cache:6379")
    assert config.lookup_deadline == 0.3
    comments = [line for line in out.read_text().splitlines() if line.startswith("#")]
    for said in ("max_local_cpu_size is for each rank", "cachegen changes the values", "enable_blending: no counterpart",
                 "enable_p2p: no counterpart: instances share", "save_unfull_chunk: not needed",
                 "extra_config.s3_num_io_threads: no counterpart", "made_up: no counterpart"):  # fmt: skip
        assert any(said in line for line in comments), said
    assert CliRunner().invoke(app, ["config", "from-lmcache", str(file)]).output == out.read_text()
    assert CliRunner().invoke(app, ["config", "check", str(out)]).exit_code == 0


@pytest.mark.parametrize(
    ("line", "settings", "remark"),
    [
        ("local_cpu: false", {}, "always has a host tier"),
        ("max_local_disk_size: 9", {}, ""),
        ("local_disk: /a, /b", {"disk.path": "/a"}, "left out: /b"),
        ("remote_url: rediss://h:1", {"redis.url": "rediss://h:1"}, ""),
        ("remote_url: valkey://h:1", {"redis.url": "redis://h:1"}, ""),
        ("remote_url: redis-sentinel://h:26379", {"redis.url": "redis://h:26379", "redis.mode": "sentinel"}, ""),
        ("remote_url: s3://kv.s3.eu-west-1.amazonaws.com", {"s3.bucket": "kv"}, "s3.region"),
        ("remote_url: s3://kv.store.local", {"s3.bucket": "kv", "s3.endpoint": "https://store.local"}, "s3.region"),
        ("remote_url: fs://host:0/mnt/kv", {"disk.path": "/mnt/kv", "disk.shared": True}, ""),
        ("remote_url: mooncakestore://h:50051", {"mooncake.master": "h:50051"}, "segment"),
        ("remote_url: lm://host:65432", {}, "no tier for lm"),
        ("cache_policy: MRU", {}, "no MRU"),
        ("min_retrieve_tokens: 0", {}, ""),
        ("{}", {}, ""),
    ],
)
def test_single_keys(tmp_path: Path, line: str, settings: dict[str, object], remark: str) -> None:
    got, remarks = translated(tmp_path, line)
    assert got == settings and remark in remarks


@pytest.mark.parametrize("text", ["max_local_cpu_size: much", "chunk_size: 0", "- a list", "max_local_cpu_size: true"])
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        translated(tmp_path, text)


@given(
    st.dictionaries(
        st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1), st.integers() | st.booleans() | st.text(max_size=9)
    )
)
def test_keys_that_nobody_knows_are_all_named(
    tmp_path_factory: pytest.TempPathFactory, keys: dict[str, object]
) -> None:
    import yaml

    folder = tmp_path_factory.mktemp("lmcache")
    settings, remarks = translated(folder, yaml.safe_dump({f"x_{key}": value for key, value in keys.items()}))
    assert settings == {} and all(f"x_{key}: no counterpart" in remarks for key in keys)
