from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from lmc.errors import TraceError
from lmc.sim.formats import find_format, read_trace
from lmc.sim.formats.base import ReadOptions

Write = Callable[..., Path]


def line(timestamp: float = 0, length: int = 1024, hashes: Any = (0, 1)) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": 1, "hash_ids": list(hashes)}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_lines(*lines: Any, name: str = "trace.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
        return path

    return write_lines


def refused(path: Path, options: ReadOptions | None = None) -> str:
    with pytest.raises(TraceError) as caught:
        read_trace(path, options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_mooncake_ids_become_dense_and_chained(write: Write) -> None:
    trace = read_trace(write(line(0, 1000, [5, 900]), line(2500, 1030, [5, 900, 7]), line(3000, 10, [8])))
    assert trace.format == "mooncake"
    assert trace.ids.tolist() == [0, 1, 0, 1, 2, 3]
    assert trace.starts.tolist() == [0, 2, 5, 6]
    assert trace.parents.tolist() == [-1, 0, 1, -1]
    assert trace.timestamps_s.tolist() == [0.0, 2.5, 3.0]
    assert (trace.block_tokens, trace.num_tokens, trace.output_tokens.tolist()) == (512, 2040, [1, 1, 1])


def test_sparse_ids_are_numbered_too(write: Write) -> None:
    trace = read_trace(write(line(hashes=[2**60, 17]), line(hashes=[2**60, 1])))
    assert trace.ids.tolist() == [0, 1, 0, 2] or trace.ids.tolist() == [0, 1, 0, 2]
    assert trace.parents.tolist() == [-1, 0, 0]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compression_is_found_by_content(write: Write, compress: Callable[[bytes], bytes]) -> None:
    path = write(line(), line())
    path.write_bytes(compress(path.read_bytes()))
    assert read_trace(path).num_requests == 2


def test_blank_lines_and_a_missing_line_end_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(json.dumps(line()) + "\n\n" + json.dumps(line()))
    assert read_trace(path).num_requests == 2


def test_another_block_size_is_found_from_the_lengths(write: Write) -> None:
    trace = read_trace(write(line(0, 60, range(4)), line(0, 33, [0, 1, 9])))
    assert trace.block_tokens == 16
    assert "16 tokens" in trace.notes[0]


def test_lengths_that_fit_no_block_size_are_noted(write: Write) -> None:
    trace = read_trace(write(line(0, 60, range(4)), line(0, 5000, [0, 1])))
    assert trace.block_tokens == 512
    assert "--block-tokens" in trace.notes[0]


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        ([line(), "{broken"], "line 2"),
        ([line(), "[1, 2]"], "line 2"),
        ([line(), line(hashes=[0, "a"])], "line 2"),
        ([line(), line(hashes=[0.5])], "line 2"),
        ([line(), {**line(), "hash_ids": 3}], "line 2"),
        ([line(), {**line(), "input_length": -1}], "line 2"),
        ([line(), {**line(), "input_length": True}], "line 2"),
        ([line(), {**line(), "timestamp": "soon"}], "line 2"),
        ([line(), {"timestamp": 0, "input_length": 3, "hash_ids": []}], "line 2"),
        ([line(5), "", line(4)], "line 3"),
        ([line(hashes=[0, 1]), line(hashes=[1, 0])], "line 2"),
        ([line(hashes=[0, 1, 0], length=1500)], "line 1"),
    ],
)
def test_a_bad_line_is_named(write: Write, lines: list[Any], place: str) -> None:
    message = refused(write(*lines))
    assert "trace.jsonl" in message and place in message


def test_remedies_for_disorder_and_unchained_hashes_work(write: Write) -> None:
    path = write(line(5, hashes=[3, 4]), line(4, hashes=[1, 2]), line(4, hashes=[2, 1]))
    assert "--sort" in refused(path)
    assert "--rechain" in refused(path, ReadOptions(sort=True))
    trace = read_trace(path, ReadOptions(sort=True, rechain=True))
    assert trace.timestamps_s.tolist() == [0.004, 0.004, 0.005]
    assert trace.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert trace.parents.tolist() == [-1, 0, -1, 2, -1, 4]
    assert trace.notes == ("requests were sorted by time",)


def test_empty_and_unknown_files_are_refused(write: Write, tmp_path: Path) -> None:
    assert "empty" in refused(write())
    assert "no request with a block" in refused(write(line(hashes=[])))
    assert "no known trace format" in refused(write({"hello": 1}))
    assert "No such file" in refused(tmp_path / "absent.jsonl")
    assert "Is a directory" in refused(tmp_path)


def test_a_cut_compressed_file_is_refused(write: Write) -> None:
    path = write(*[line(hashes=range(index * 9, index * 9 + 9)) for index in range(500)])
    path.write_bytes(gzip.compress(path.read_bytes())[:-400])
    assert "damaged" in refused(path)


HEADER = {"format": "lmc-trace", "version": 1, "chunk_tokens": 128, "chunk_bytes": 5898240, "namespace": "abc"}


def lookup(t: float, chunks: list[str], tokens: int = 300, tenant: str = "") -> dict[str, Any]:
    hits = {"device": 0, "host": 0, "disk": 0}
    return {"t": t, "request": "r", "tokens": tokens, "chunks": chunks, "tenant": tenant, "hit_tokens": hits}


def test_own_record_is_read(write: Write) -> None:
    a, b, c = "00000000000000aa", "ffffffffffffffff", "8000000000000000"
    path = write(HEADER, lookup(0.5, [a, b]), lookup(0.7, [a, c], tenant="x"), lookup(0.8, [], tokens=9))
    trace = read_trace(path)
    assert find_format(path).name == "lmc"
    assert trace.ids.tolist() == [0, 1, 0, 2]
    assert (trace.block_tokens, trace.block_bytes, trace.num_tokens) == (128, 5898240, 609)
    assert (trace.tenant_names, trace.tenants.tolist()) == (("", "x"), [0, 1, 0])


@pytest.mark.parametrize(
    "lines",
    [
        [{**HEADER, "version": 9}, lookup(0, [])],
        [{**HEADER, "chunk_tokens": 0}, lookup(0, [])],
        [HEADER, lookup(0, ["xyz"])],
        [HEADER, lookup(0, ["00"])],
        [HEADER, '{"t": 1, "request"'],
    ],
)
def test_a_bad_own_record_is_refused(write: Write, lines: list[Any]) -> None:
    assert ", line " in refused(write(*lines))
