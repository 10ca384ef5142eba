from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from lmc.bench.sources import read_rows, read_text
from lmc.bench.workload import FileSource, HubSource, PackageSource
from lmc.errors import WorkloadError

ROWS = [{"id": 1, "tools": {"a": [1, "x"]}}, {"id": 2, "tools": {"a": None, "b": {"deep": [{}]}}}]


def _rows(tmp_path: Path, **source: object) -> list[dict[str, object]]:
    return list(read_rows(FileSource(**source), tmp_path))  # type: ignore[arg-type]


def test_json_lines_of_any_shape_plain_and_compressed(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(text)
    assert _rows(tmp_path, path="a.jsonl") == ROWS
    assert _rows(tmp_path, path="a.jsonl.gz") == ROWS


def test_lines_with_unicode_separators_stay_one_row(tmp_path: Path) -> None:
    row = {"text": "one\u2028two\x0bthree\x85four"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert _rows(tmp_path, path="a.jsonl") == [row]


def test_json_document_is_exploded_to_rows(tmp_path: Path) -> None:
    document = {"data": [{"title": "t", "parts": [{"q": 1}, {"q": 2}]}, {"title": "u", "parts": [{"q": 3}]}]}
    (tmp_path / "a.json").write_text(json.dumps(document, indent=2))
    rows = _rows(tmp_path, path="a.json", format="json", explode=["data", "parts"])
    assert [(row["data"]["title"], row["parts"]["q"]) for row in rows] == [("t", 1), ("t", 2), ("u", 3)]  # type: ignore[index]
    with pytest.raises(WorkloadError, match="explode: the row has no list 'absent'"):
        _rows(tmp_path, path="a.json", format="json", explode=["absent"])


def test_json_list_is_one_row_per_element(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert _rows(tmp_path, path="a.json", format="json") == ROWS


def test_csv_and_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"q": ["a", "b"], "n": [1, 2]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    expected = [{"q": "a", "n": 1}, {"q": "b", "n": 2}]
    assert _rows(tmp_path, path="a.csv", format="csv") == expected
    assert _rows(tmp_path, path="a.parquet", format="parquet") == expected


def test_member_of_an_archive(tmp_path: Path) -> None:
    inner = tmp_path / "policy.md"
    inner.write_text("# Be kind\n\nAlways.\n")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(inner, "domain/policy.md")
    source = FileSource(path="a.tar.gz", member="domain/policy.md", format="text")
    assert read_text(source, tmp_path) == "# Be kind\n\nAlways.\n"
    with pytest.raises(WorkloadError, match="cannot unpack member 'domain/absent'"):
        _rows(tmp_path, path="a.tar.gz", member="domain/absent")


def test_package_data_is_found_without_importing_the_package() -> None:

    source = PackageSource(kind="package", package="bfcl_eval", path="data/BFCL_v4_live_multiple.json")
    first = next(iter(read_rows(source, Path())))
    assert {"question", "function"} <= set(first)
    assert "bfcl_eval" not in sys.modules
    with pytest.raises(WorkloadError, match="package 'no_such_package' is not installed"):
        list(read_rows(PackageSource(kind="package", package="no_such_package", path="x"), Path()))


def test_bad_files_name_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(WorkloadError, match=r"a\.jsonl:2: not JSON"):
        _rows(tmp_path, path="a.jsonl")
    (tmp_path / "b.jsonl").write_text("[1, 2]\n")
    with pytest.raises(WorkloadError, match=r"b\.jsonl:1: the row is a JSON int; it must be an object"):
        _rows(tmp_path, path="b.jsonl")
    with pytest.raises(WorkloadError, match="no such data file"):
        _rows(tmp_path, path="absent.jsonl")
    monkeypatch.delenv("SOME_DATA", raising=False)
    with pytest.raises(WorkloadError, match=r"environment variable \$SOME_DATA is not set"):
        _rows(tmp_path, path="$SOME_DATA/a.jsonl")


def test_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    assert _rows(tmp_path, path="a.jsonl") == []


def test_a_copy_of_a_hub_data_set_is_read_by_config_and_split(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("main-train", "main-test", "other-test"):
        pd.DataFrame({"question": [f"{name} {index}" for index in range(3)]}).to_parquet(copy / f"{name}.parquet")
    files = "{config_name: main, data_files: [{split: train, path: main-train.parquet}, {split: test, path: main-test.parquet}]}"
    other = "{config_name: other, data_files: [{split: test, path: other-test.parquet}]}"
    (copy / "README.md").write_text(f"---\nconfigs:\n- {files}\n- {other}\n---\n# A data set\n")
    for config, split in (("main", "train"), ("main", "test"), ("other", "test")):
        source = HubSource(kind="hub", dataset="copy", config=config, split=split)
        assert [row["question"] for row in read_rows(source, tmp_path)] == [f"{config}-{split} {i}" for i in range(3)]
    with pytest.raises(WorkloadError, match=r"data set copy: .*split"):
        list(read_rows(HubSource(kind="hub", dataset="copy", config="other", split="train"), tmp_path))


def test_a_hub_data_set_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from lmc.bench.sources import read_rows; from lmc.bench.workload import HubSource; from lmc.errors import WorkloadError\n"
        "try: list(read_rows(HubSource(kind='hub', dataset='some/data'), Path()))\n"
        "except WorkloadError as error: sys.exit(str(error))\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, timeout=120)
    assert done.returncode == 1
    assert "data set some/data: " in done.stderr
    assert "give the folder of a copy (hf download --repo-type dataset) as `dataset`" in done.stderr
