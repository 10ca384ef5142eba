from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cache.sections import Compress
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import derive_auth_key
from lmc.cache.tiers.namespaces import LEASE
from lmc.cli.cache import app
from tests.contracts.tier import CODED, SCOPE, key, kv_payload, payload


@pytest.fixture
def chunk(tmp_path: Path) -> Path:
    DiskTier(tmp_path, SCOPE).put(key(1), payload(1))
    [path] = (found for found in tmp_path.rglob("*") if found.is_file() and found.name != LEASE)
    return path


def inspect(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_sound_chunk(chunk: Path) -> None:
    code, text = inspect(chunk)
    assert code == 0
    for said in (f"{chunk}: ok", SCOPE.namespace, key(1).hex(), SCOPE.layout, "39.1 KiB", "1 files, 0 damaged"):
        assert said in text


def test_a_folder_as_json(chunk: Path, tmp_path: Path) -> None:
    code, text = inspect("--json", tmp_path)
    record, namespace = (json.loads(line) for line in text.splitlines())
    assert (namespace["label"], namespace["chunks"]) == (SCOPE.namespace, 1)
    assert code == 0
    assert record["problem"] is None
    assert (record["key"], record["payload_bytes"]) == (key(1).hex(), len(payload(1)))


@pytest.mark.parametrize("compress", ["lossless", "lossless-max"])
def test_a_compressed_chunk_shows_its_ratio(tmp_path: Path, compress: Compress) -> None:
    DiskTier(tmp_path, replace(CODED, compress=compress)).put(key(1), kv_payload(1))
    code, text = inspect("--json", tmp_path)
    record = json.loads(text.splitlines()[0])
    assert (code, record["problem"], record["checked"]) == (0, None, True)
    assert (record["compress"], record["element"], record["raw_bytes"]) == (compress, "bf16", len(kv_payload(1)))
    assert record["ratio"] == record["payload_bytes"] / record["raw_bytes"] < 0.9
    code, text = inspect(tmp_path)
    assert code == 0 and f"{compress} of bf16: {record['ratio']:.3f} of 39.1 KiB" in text
    path = Path(record["file"])
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    code, text = inspect(tmp_path)
    assert code == 1 and "payload does not match its checksum" in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw[1:], "the payload has 39999 bytes instead of 40000"),
        (lambda raw: raw[:-1], "not a chunk of lmc, or not all of one"),
        (lambda raw: bytes([raw[0] ^ 1]) + raw[1:], "payload does not match its checksum"),
        (lambda raw: raw[:40_100] + b"x" + raw[40_101:], "footer does not match its checksum"),
        (lambda raw: raw[:40_000] + b"x" + raw[40_001:], "not a chunk of lmc"),
        (lambda raw: raw[:40_008] + b"\x09" + raw[40_009:], "the footer is of version 9"),
        (lambda raw: raw[:50], "the footer has 50 bytes"),
        (lambda raw: b"", "the footer has 0 bytes"),
    ],
)
def test_a_damaged_chunk(chunk: Path, damage: object, said: str) -> None:
    chunk.write_bytes(damage(chunk.read_bytes()))  # type: ignore[operator]
    code, text = inspect(chunk)
    assert code == 1
    assert said in text
    assert "1 files, 1 damaged" in text
    assert inspect("--json", chunk)[0] == 1


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "absent")])
    assert "no such file or folder" in str(result.exception)


def test_namespaces_are_listed_with_what_they_take(tmp_path: Path) -> None:
    old = DiskTier(tmp_path, replace(SCOPE, namespace="old"))
    old.put(key(1), payload(1))
    old.close()
    living = DiskTier(tmp_path, SCOPE)
    code, text = inspect(tmp_path)
    assert code == 0
    assert "namespace old: 1 chunks, 43.1 KiB, last used 20" in text
    assert f"namespace {SCOPE.namespace}: 0 chunks, 0 B, in use" in text
    _, text = inspect("--json", tmp_path)
    assert '{"label":"old","chunks":1,"num_bytes":44096,' in text
    living.close()


def test_a_sealed_chunk_is_checked_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a key that nobody guesses")
    (tmp_path / "other").write_text("another that nobody guesses")
    sealed = replace(SCOPE, auth_key=derive_auth_key("a key that nobody guesses"))
    DiskTier(tmp_path / "disk", sealed).put(key(1), payload(1))
    code, text = inspect(tmp_path / "disk")
    assert code == 0 and "sealed with an auth_key; give --auth-key-file" in text
    code, text = inspect(tmp_path / "disk", "--auth-key-file", tmp_path / "key")
    assert code == 0 and ": ok" in text
    code, text = inspect(tmp_path / "disk", "--auth-key-file", tmp_path / "other")
    assert code == 1 and "not sealed with this cache's auth_key" in text
