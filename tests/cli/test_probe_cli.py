from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmc.cache.tiers.disk import DiskTier
from lmc.cli import app
from tests.contracts.tier import CHUNK_BYTES, CODED, key, kv_payload

SMALL = ["--device", "cpu", "--sizes", "4KiB,16KiB", "--total", "1MiB", "--repetitions", "2"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["probe", "transfer", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_json_is_one_object_with_the_rows() -> None:
    result = json.loads(run(*SMALL, "--json"))
    assert result["device"] == "cpu"
    measured = {(row["backend"], row["direction"], row["piece_bytes"]) for row in result["rows"]}
    expected = {
        (backend, way, size) for backend in ("host", "torch") for way in ("store", "load") for size in (4096, 16384)
    }
    assert expected <= measured
    for row in result["rows"]:
        assert row["gb_per_s"] > 0
        assert row["limit_gb_per_s"] > 0
    assert set(result["absent"]) == {"dma", "kernel", "staged"}


def test_the_table_names_backends_and_what_is_absent() -> None:
    shown = " ".join(run(*SMALL).split())
    for text in ("Transfers on cpu", "store", "load", "4.0 KiB", "16.0 KiB", "host", "torch", "Not measured: dma"):
        assert text in shown


def test_rows_and_picture_are_written(tmp_path: Path) -> None:
    run(*SMALL, "--csv", str(tmp_path / "rates.csv"), "--png", str(tmp_path / "rates.png"))
    lines = (tmp_path / "rates.csv").read_text().splitlines()
    assert lines[0] == "direction,piece,backend,rate (GB/s),limit (GB/s),share (%)"
    assert len(lines) >= 9
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "8"], "a piece of 8 bytes"),
        (["--sizes", "2MiB", "--total", "1MiB"], "a piece of 2097152 bytes"),
        (["--device", "cuda:99"], "there is no device cuda:99 here"),
        (["--device", "abacus"], "there is no device abacus here"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmc.cli import main

    monkeypatch.setattr("sys.argv", ["lmc", "probe", "transfer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith(f"lmc: {message}")
    assert "\n" not in shown


def chunk_files(folder: Path, compress: str) -> list[str]:
    tier = DiskTier(folder, replace(CODED, compress=compress))
    for number in range(3):
        tier.put(key(number), kv_payload(number))
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lease"]
    return [argument for path in files for argument in ("--chunk", str(path))]


def codec(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["probe", "codec", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(
    ("compress", "more"), [("lossless", []), ("lossless-max", []), ("none", ["--element", "bf16"])]
)
def test_the_codec_is_measured_on_stored_chunks(tmp_path: Path, compress: str, more: list[str]) -> None:
    found = codec(*chunk_files(tmp_path, compress), *more)
    assert (found["element"], found["chunks"], found["chunk_bytes"]) == ("bf16", 3, CHUNK_BYTES)
    assert [row["compress"] for row in found["rows"]] == ["lossless", "lossless-max"]
    for row in found["rows"]:
        assert 0.6 < row["ratio"] < 0.9 and row["encode_gb_per_s"] > 0 and row["decode_gb_per_s"] > 0
        assert row["pays_below_gb_per_s"] == pytest.approx(row["decode_gb_per_s"] * (1 - row["ratio"]))


def test_the_codec_is_measured_on_a_models_own_kv() -> None:
    result = CliRunner().invoke(
        app, ["probe", "codec", "--tokens", "128", "--repetitions", "1"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.stdout
    shown = " ".join(result.stdout.split())
    assert "Lossless compression of bf16 KV: smollm2-135m-instruct" in shown and "1 chunks of 2,949,120 bytes" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--element", "int4"], "element 'int4' is not known; choose one of bf16, fp16, fp32, fp8"),
        (["--chunk", "/nowhere"], "/nowhere: No such file or directory"),
        (["--text", "/nowhere"], "/nowhere"),
    ],
)
def test_a_codec_that_cannot_be_measured_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmc.cli import main

    monkeypatch.setattr("sys.argv", ["lmc", "probe", "codec", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    captured = capsys.readouterr()
    assert exit.value.code == 2 and message in captured.err and captured.err.count("\n") == 1
