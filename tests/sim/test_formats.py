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

from lmc.cache.keys import KeyChain, Namespace, root
from lmc.cache.record import TraceRecorder
from lmc.errors import TraceError
from lmc.sim import stack
from lmc.sim.cache_file import load_trace
from lmc.sim.describe import describe, facts_json
from lmc.sim.formats import find_format, read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.trace import require_blocks

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


HEADER = {"format": "lmc-trace", "version": 1, "chunk_tokens": 128, "chunk_bytes": 5898240, "namespace": "abc"}


def lookup(t: float, chunks: list[str], tokens: int = 300, tenant: str = "") -> dict[str, Any]:
    hits = {"device": 0, "host": 128, "disk": 1}
    return {"t": t, "request": "r", "tokens": tokens, "chunks": chunks, "tenant": tenant, "hit_tokens": hits}


def test_own_record_is_read(write: Write) -> None:
    a, b, c = "00000000000000aa", "ffffffffffffffff", "8000000000000000"
    path = write(HEADER, lookup(0.5, [a, b]), lookup(0.7, [a, c], tenant="x"), lookup(0.8, [], tokens=9))
    trace = read_trace(path)
    assert find_format(path).name == "lmc"
    assert trace.ids.tolist() == [0, 1, 0, 2]
    assert (trace.block_tokens, trace.block_bytes, trace.num_tokens) == (128, 5898240, 609)
    assert (trace.tenant_names, trace.tenants.tolist()) == (("", "x"), [0, 1, 0])
    assert trace.recorded_hits == {"device": 0, "host": 384, "disk": 3}
    assert facts_json(describe(trace))["recorded_host_hit_percent"] == pytest.approx(100 * 384 / 609)


@pytest.mark.parametrize(
    "lines",
    [
        [{**HEADER, "version": 9}, lookup(0, [])],
        [{**HEADER, "chunk_tokens": 0}, lookup(0, [])],
        [HEADER, lookup(0, ["xyz"])],
        [HEADER, lookup(0, ["00"])],
        [HEADER, {**lookup(0, []), "hit_tokens": [1]}],
        [HEADER, {**lookup(0, []), "hit_tokens": {"host": "many"}}],
        [HEADER, '{"t": 1, "request"'],
    ],
)
def test_a_bad_own_record_is_refused(write: Write, lines: list[Any]) -> None:
    assert ", line " in refused(write(*lines))


def chat(chat_id: int, parent: int, hashes: list[int], kind: str = "text") -> dict[str, Any]:
    return {
        "chat_id": chat_id,
        "parent_chat_id": parent,
        "timestamp": chat_id / 2,
        "input_length": 16 * len(hashes) - 3,
        "output_length": 7,
        "type": kind,
        "turn": 1,
        "hash_ids": hashes,
    }


def test_bailian_links_chats_to_sessions_and_types_to_groups(write: Write) -> None:
    trace = read_trace(write(chat(1, -1, [5]), chat(2, -1, [6], "search"), chat(3, 1, [5, 7]), chat(4, 3, [5, 7, 8])))
    assert (trace.format, trace.block_tokens) == ("bailian", 16)
    assert trace.timestamps_s.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert trace.sessions.tolist() == [0, 1, 0, 0]
    assert (trace.tenant_names, trace.tenants.tolist()) == (("text", "search"), [0, 1, 0, 0])


def test_lmcache_log_is_read(write: Write) -> None:
    event = {
        "timestamp": 1711929600.5,
        "request_id": "r",
        "model_name": "m",
        "chunk_size": 256,
        "seq_len": 700,
        "dtypes": ["bfloat16", "int8"],
        "shapes": [[2, 256, 8], [256]],
        "chunk_hashes": ["0xaa", "0xbb"],
    }
    trace = read_trace(write(event, {**event, "chunk_hashes": ["0xaa"], "seq_len": 300}))
    assert (trace.format, trace.block_tokens, trace.block_bytes) == ("lmcache", 256, 2 * 256 * 8 * 2 + 256)
    assert (trace.ids.tolist(), trace.num_tokens) == ([0, 1, 0], 1000)
    assert "chunk_size 128 after 256" in refused(write(event, {**event, "chunk_size": 128}))
    other = read_trace(write(event, {**event, "model_name": "n"}))
    assert (other.num_unique, other.block_bytes, other.tenant_names) == (4, 0, ("m", "n"))


def test_a_folder_of_rotated_lmcache_logs_is_one_trace(tmp_path: Path) -> None:
    def lookup(t: float, *hashes: str) -> str:
        return (
            json.dumps({"timestamp": t, "chunk_size": 16, "seq_len": 16 * len(hashes), "chunk_hashes": hashes}) + "\n"
        )

    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "lookup.jsonl").write_text(
        lookup(30.0, "a", "b")
    )  # the running file sorts before those that were rotated away
    (folder / "lookup.jsonl.1.gz").write_bytes(gzip.compress((lookup(10.0, "a") + lookup(20.0, "a", "b")).encode()))
    (folder / ".hidden").write_text("no log")
    for read in (read_trace(folder), load_trace(folder, ReadOptions()), load_trace(folder, ReadOptions())):
        assert read.timestamps_s.tolist() == [10.0, 20.0, 30.0]
        assert read.ids.tolist() == [0, 0, 1, 0, 1]
    (folder / "lookup.jsonl").write_text(lookup(30.0, "b", "a"))
    with pytest.raises(TraceError, match=r"^lookup.jsonl, line 1: hash"):
        load_trace(folder, ReadOptions())
    (folder / "lookup.jsonl.1.gz").write_text("{}")
    with pytest.raises(TraceError, match=r"lookup.jsonl.1.gz, line 1"):
        read_trace(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TraceError, match="holds no file"):
        read_trace(empty)


def session(name: str, *requests: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "block_size": 64, "hash_id_scope": "local", "requests": list(requests)}


def step(t: float, runs: list[list[int]], tokens: int = 128) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": tokens, "out": 3, "hash_runs": runs}


def test_sessions_get_their_own_ids_and_a_start_time(write: Write) -> None:
    nested = {"t": 5.0, "type": "subagent", "requests": [step(0.0, [[9, 1]]), step(70.0, [[9, 2]])]}
    path = write(
        session("a", step(0.0, [[1, 2]]), nested, step(80.0, [[1, 1], [4, 2]])), session("b", step(0.0, [[1, 1]]))
    )
    trace = read_trace(path)
    assert (trace.format, trace.block_tokens) == ("kv-cache-tester", 64)
    assert trace.timestamps_s.tolist() == [0.0, 5.0, 60.0, 75.0, 80.0]
    assert trace.sessions.tolist() == [0, 0, 1, 0, 0]
    assert [trace.ids[a:b].tolist() for a, b in zip(trace.starts[:-1], trace.starts[1:], strict=True)] == [
        [0, 1],
        [2],
        [3],
        [2, 4],
        [0, 5, 6],
    ]
    assert read_trace(path, ReadOptions(session_gap_s=100.0)).timestamps_s[-1] == 100.0
    assert ", line 1" in refused(write(session("a", step(0.0, [[1, 2, 3]]))))


def test_ragpulse_components_become_chained_blocks(write: Write) -> None:
    def request(t: str, sys: list[int], passages: list[int], user: int) -> dict[str, Any]:
        ids = {"sys_prompt": sys, "passages_ids": passages, "history": [], "web_search": [], "user_input": [user]}
        return {"timestamp": t, "input_length": 40, "output_length": 1, "session_id": "s", "hash_ids": ids}

    for number, field, name, lengths in (
        (1, "sys_prompt_id", "sys_prompt", {1: 16}),
        (2, "passage_id", "passages", {1: 10, 2: 10}),
        (3, "history_id", "history", {}),
        (4, "user_input_id", "user_input", {1: 4}),
        (5, "web_search_id", "web_search", {}),
    ):
        write(*[{field: key, "token_length": size} for key, size in lengths.items()], name=f"{number}_{name}.jsonl")
    path = write(request("5", [1], [1, 2], 1), request("3", [1], [2, 1], 1), request("9", [1], [1, 2], 1), "")
    trace = read_trace(path)
    assert trace.format == "ragpulse"
    assert trace.timestamps_s.tolist() == [3.0, 5.0, 9.0]
    assert trace.ids.tolist() == [0, 1, 0, 2, 0, 2]
    assert (trace.block_tokens, trace.input_tokens.tolist()) == (16, [40, 40, 40])
    assert "line 1: passages_ids 7 has no length" in refused(write(request("5", [1], [7], 1)))


def test_ragpulse_without_companions_is_refused(write: Write) -> None:
    record = {
        "timestamp": "1",
        "input_length": 3,
        "output_length": 1,
        "session_id": "s",
        "hash_ids": {"sys_prompt": [1]},
    }
    assert "companion" in refused(write(record))


def test_azure_has_arrivals_but_no_hits(write: Write) -> None:
    rows = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:47.1805900,8,1",
    ]
    trace = read_trace(write(*rows, name="trace.csv"))
    assert (trace.format, trace.num_requests, trace.num_blocks, trace.num_tokens) == ("azure", 2, 0, 382)
    assert trace.timestamps_s[1] - trace.timestamps_s[0] == pytest.approx(0.5)
    with pytest.raises(TraceError, match="hits cannot be simulated"):
        require_blocks(trace)
    assert "line 3" in refused(write(*rows[:2], "soon,1,1"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[UNK]", *"abcdefgh"])}
    built = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_prompts_are_cut_by_the_tokenizer(write: Write, tokenizer: Path) -> None:
    path = write(
        {"timestamp": 1760428221546118, "input": "a b c d e", "output": "f g", "session_id": "x"},
        {"timestamp": 1760428222546118, "input": "a b c f", "output": "", "session_id": "x"},
    )
    trace = read_trace(path, ReadOptions(block_tokens=2, tokenizer=tokenizer))
    assert trace.format == "prompts"
    assert (trace.ids.tolist(), trace.input_tokens.tolist(), trace.output_tokens.tolist()) == (
        [0, 1, 0, 2],
        [5, 4],
        [2, 0],
    )
    assert trace.timestamps_s[1] - trace.timestamps_s[0] == pytest.approx(1.0)
    assert "--tokenizer" in refused(path)
    assert "is not there" in refused(path, ReadOptions(tokenizer=path.parent / "absent.json"))


def test_chats_are_laid_out_before_they_are_cut(write: Write, tokenizer: Path) -> None:
    path = write({"messages": [{"role": "user", "content": "a b"}]})
    trace = read_trace(path, ReadOptions(block_tokens=1, tokenizer=tokenizer / "tokenizer.json"))
    assert trace.num_requests == 1 and any("ChatML" in note for note in trace.notes)
    assert "no text content" in refused(write({"messages": [{"role": "user"}]}), ReadOptions(tokenizer=tokenizer))


def stored(hashes: list[Any], parent: Any, **more: Any) -> dict[str, Any]:
    fields = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "block_size": 16}
    return {**fields, "token_ids": [], **more}


def test_vllm_events_become_requests(write: Write) -> None:
    path = write(
        {"ts": 0.0, "events": [stored([1, 2], None), stored([3], 2)]},  # one request, in two steps
        {"ts": 0.5, "events": [["BlockStored", [4], 3, [], 16, None, "GPU"], stored([9], None, medium="CPU")]},
        {"ts": 9.0, "events": [stored([5], 4)]},  # a later turn
        {"ts": 9.5, "events": [stored([6], 2), {"type": "AllBlocksCleared"}]},  # a fork
        {"ts": 9.6, "events": [stored([8], 7)]},  # its start was not logged
    )
    trace = read_trace(path)
    assert (trace.format, trace.block_tokens) == ("vllm-events", 16)
    assert [trace.ids[a:b].tolist() for a, b in zip(trace.starts[:-1], trace.starts[1:], strict=True)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 5],
        [6, 7],
    ]
    assert trace.timestamps_s.tolist() == [0.0, 9.0, 9.5, 9.6]
    assert any("1 chains start before the log" in note for note in trace.notes)
    assert read_trace(write({"ts": 1.0, **stored(["ab"], None)})).num_blocks == 1
    assert "no BlockStored" in refused(write({"ts": 0.0, "events": []}))


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


def test_what_the_cache_records_is_what_sim_reads(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    chain = KeyChain(root(Namespace("vllm", "m", "r", "float16", "l", 4)), 4)
    recorder = TraceRecorder(path, chunk_tokens=4, chunk_bytes=640, namespace="n", now=100.0)
    first = list(chain.extend(range(9)))
    recorder.lookup(100.5, "a", 9, first, "t", {"host": 0})
    recorder.lookup(103.0, "b", 14, chain.extend(range(14)), "t", {"host": 8})
    recorder.close()
    trace = read_trace(path)
    assert trace.ids.tolist() == [0, 1, 0, 1, 2]
    assert trace.timestamps_s.tolist() == [0.5, 3.0]
    assert (trace.block_tokens, trace.block_bytes, trace.recorded_hits) == (4, 640, {"host": 8})
    assert stack.hit_curve(stack.profile(trace)).at(math.inf) == (2, 8)
