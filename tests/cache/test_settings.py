from __future__ import annotations

import re
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig, chunk_tokens_for
from lmc.cache.settings import all_settings, explain, load_settings, markdown, show, value_of
from lmc.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "lmc.yaml"
    file.write_text(text)
    return file


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path):
    file = write(tmp_path, "policy: fifo\nio_threads: 2\nttl: 10s\nhost:\n  capacity: 1GiB\n")
    settings = load_settings(file, {"LMC_IO_THREADS": "3", "LMC_TTL": "20s"}, {"ttl": "30s", "policy": None})
    assert (settings.config.ttl, settings.config.io_threads, settings.config.policy) == (30.0, 3, "fifo")
    assert settings.config.host.capacity == 1 << 30
    assert settings.origins["ttl"] == "flag --ttl"
    assert settings.origins["io_threads"] == "environment LMC_IO_THREADS"
    assert settings.origins["host.capacity"] == f"file {file}"
    assert settings.origins["write"] == "default"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polcy: lru", "unknown setting 'polcy'; did you mean policy?"),
        ("disk: {pth: /x}", "unknown setting 'disk.pth'; did you mean disk.path?"),
        ("disk: 5", "disk must be a mapping"),
        ("policy: nope", "policy.*unknown eviction policy 'nope'; there are"),
        ("policy: ttl", "policy.*'ttl' is no longer an eviction policy; use fifo, .* the setting ttl"),
        ("host: {capacity: 0}", "host.capacity.*of no use"),
        ("host: {capacity: 120%}", "not a share"),
        ("host: {capacity: lots}", "not a size"),
        ("ttl: -1", "not negative"),
        ("write: sideways", "write.*'through', 'back' or 'around'"),
        ("ttl_mode: never", "ttl_mode.*'sliding' or 'fixed'"),
        ("tenant_quota: 0%", "not a share"),
        ("io_threads: 0", "io_threads.*greater than or equal to 1"),
        ("strict: perhaps", "strict.*boolean"),
        ("[1, 2]", "must hold a mapping"),
        ("a: b: c", "is not YAML"),
        ("redis: {url: 'unix:///x', mode: cluster}", "redis.mode cluster needs"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_an_unknown_variable_is_refused_and_other_programs_variables_are_not():
    with pytest.raises(ConfigError, match="LMC_DISK_PTH in the environment; did you mean LMC_DISK_PATH"):
        load_settings(None, {"LMC_DISK_PTH": "x"})
    load_settings(None, {"LMCACHE_X": "x", "LMC_DATA_DIR": "x", "LMC_BENCH_API_KEY": "x", "HOME": "x"})


SERVICE = {
    "LMC_PORT": "tcp://10.0.0.7:8000",
    "LMC_SERVICE_HOST": "10.0.0.7",
    "LMC_SERVICE_PORT": "8000",
    "LMC_SERVICE_PORT_HTTP": "8000",
    "LMC_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "LMC_PORT_8000_TCP_PROTO": "tcp",
    "LMC_PORT_8000_TCP_PORT": "8000",
    "LMC_PORT_8000_TCP_ADDR": "10.0.0.7",
    "LMC_REDIS_PORT": "tcp://10.0.0.8:6379",
    "LMC_REDIS_SERVICE_HOST": "10.0.0.8",
    "LMC_METRICS_PORT": "tcp://10.0.0.9:9400",  # named like a setting
}


def test_variables_of_a_kubernetes_service_are_no_settings(caplog):
    settings = load_settings(None, {**SERVICE, "LMC_POLICY": "fifo"})
    assert settings.config == CacheConfig(policy="fifo")
    [line] = [record.getMessage() for record in caplog.records]
    assert all(name in line for name in SERVICE) and "ignored" in line
    caplog.clear()
    assert load_settings(None, {"LMC_METRICS_PORT": "9400"}).config.metrics.port == 9400
    with pytest.raises(ConfigError, match="LMC_HOST_PORT"):
        load_settings(None, {"LMC_HOST_PORT": "9400"})
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    [
        "redis: 'redis://:hush@h'\n",
        "redis:\n  url: [redis://:hush@h]\n",
        "redis:\n  password: 'hush\n",
        "redis: {url: 'redis://:hush@h', mode: cluster: x}\n",
        "redis:\n  url: unix://:hush@/x\n  mode: cluster\n",
        "admin:\n  token: [hush]\n",
        "s3: {secret_access_key: {a: hush}}\n",
        "redis:\n  password: hush\n  port: hush\n",
    ],
)
def test_no_message_about_a_wrong_file_shows_a_secret(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text))
    assert "hush" not in str(caught.value)


def test_every_setting_is_explained():
    for setting in all_settings():
        text = explain(setting.key)
        assert setting.key in text and setting.variable in text and len(setting.meaning) > 4, setting.key
    with pytest.raises(ConfigError, match=r"did you mean host\.capacity"):
        explain("host.capcity")


def test_no_setting_is_untyped_or_of_a_wrong_default():
    config = CacheConfig()
    for setting in all_settings():
        assert setting.field.annotation not in (dict, object, None), setting.key
        assert value_of(config, setting.key) == setting.field.default or setting.key.endswith("capacity")


def test_the_configuration_page_is_current():
    """Write it anew with `lmc config explain --markdown > docs/configuration.md`."""
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown()
    documented = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", markdown(), re.MULTILINE))
    assert documented == {setting.key for setting in all_settings()}


def test_values_are_shown_as_in_a_file():
    assert [show(value) for value in (None, True, 3, "x")] == ["none", "true", "3", "x"]


def test_chunks_are_whole_blocks():
    assert chunk_tokens_for(CacheConfig(), 16) == 128
    assert chunk_tokens_for(CacheConfig(), 48) == 144
    assert chunk_tokens_for(CacheConfig(chunk_tokens=64), 16) == 64
    with pytest.raises(ConfigError, match="use 64 or 80"):
        chunk_tokens_for(CacheConfig(chunk_tokens=70), 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host: {capacity: 64}", "64 is 64 bytes, which hold no chunk; write a unit, as in 64GiB"),
        (
            "disk: {path: /kv, capacity: 100}",
            "disk.capacity: 100 is 100 bytes, which hold no chunk; write a unit, as in 100GiB",
        ),
        ("hosst: {capacity: 64GiB}", "unknown setting 'hosst'; did you mean host?"),
        ("host: {capacitty: 64GiB}", "unknown setting 'host.capacitty'; did you mean host.capacity?"),
        ("zzz: 1", "unknown setting 'zzz'; `lmc config explain` lists all"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "lmc.yaml").write_text(text)
    with pytest.raises(ConfigError) as told:
        load_settings(tmp_path / "lmc.yaml")
    assert said in str(told.value)


def test_a_variable_that_resembles_none_suggests_none() -> None:
    with pytest.raises(ConfigError, match="unknown setting LMC_FOO in the environment; `lmc config explain` lists all"):
        load_settings(None, {"LMC_FOO": "1"})
    with pytest.raises(ConfigError, match=r"LMC_HOST_CAPACTY in the environment; did you mean LMC_HOST_CAPACITY\?"):
        load_settings(None, {"LMC_HOST_CAPACTY": "1"})
