from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cli import app

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
