from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lmc.sim import stack
from lmc.sim.formats import read_trace
from lmc.sim.formats.base import ReadOptions
from tests.sim.trace_files import Write, refused


def line(timestamp: float = 0, length: int = 1024, hashes: Any = (0, 1)) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": 1, "hash_ids": list(hashes)}


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
    assert trace.ids.tolist() == [0, 1, 0, 2]
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
        ([line(), {**line(), "output_length": 0.5}], "line 2"),
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
    assert "no request has a trace block" in refused(write(line(hashes=[])))
    assert "0 tokens" in refused(write(line(length=0)))
    assert "no known trace format" in refused(write({"hello": 1}))
    assert "No such file" in refused(tmp_path / "absent.jsonl")
    write(line())
    assert "Is a directory" in refused(tmp_path)  # only LMCache's logs are read by the folder


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_damaged_compressed_file_is_refused(write: Write, compress: Callable[[bytes], bytes]) -> None:
    path = write(*[line(hashes=range(index * 9, index * 9 + 9)) for index in range(500)])
    whole = compress(path.read_bytes())
    for damaged in (whole[:-400], whole[:200], whole[:40] + bytes(40) + whole[80:]):
        path.write_bytes(damaged)
        assert "damaged" in refused(path)


def test_zstd_files_of_several_frames_are_read_whole(write: Write) -> None:
    path = write(line(), line(1))
    text = path.read_bytes()
    cut = len(text) // 3
    path.write_bytes(zstandard.compress(text[:cut]) + zstandard.compress(text[cut:]))
    assert read_trace(path).timestamps_s.tolist() == [0.0, 0.001]


@pytest.mark.data
def test_delivered_traces_have_their_known_sizes() -> None:
    folder = Path(os.environ.get("LMC_DATA_DIR", "../shared/data"))
    if not folder.is_dir():
        pytest.skip("the data folder is not there; set LMC_DATA_DIR")
    sessions = read_trace(folder / "kv-cache-tester_692distinct_runs.jsonl.gz")
    assert (sessions.num_requests, sessions.num_blocks, sessions.num_unique) == (46_218, 85_405_325, 3_195_527)
    curve = stack.hit_curve(stack.profile(sessions))
    assert round(curve.at(math.inf)[0] / curve.total_blocks, 4) == 0.9626
    assert round(curve.at(math.inf)[1] / curve.total_tokens, 4) == 0.9623
    components = read_trace(folder / "ragpulse" / "0_trace.jsonl.gz")
    assert (components.num_requests, components.sessions.max() + 1) == (7_106, 3_990)
    arrivals = read_trace(folder / "AzureLLMInferenceTrace_conv.csv.gz")
    assert (arrivals.num_requests, arrivals.num_tokens) == (19_366, 22_361_870)
