"""Each trace format with a reader of its own; what all share is in test_formats.py."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmc.cache.keys import KeyChain, Namespace, root
from lmc.cache.observe.record import TraceRecorder
from lmc.errors import TraceError
from lmc.sim import stack
from lmc.sim.cache_file import load_trace
from lmc.sim.describe import describe, facts_json
from lmc.sim.formats import find_format, read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.trace import require_blocks
from tests.sim.trace_files import Write, refused

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
    with pytest.raises(TraceError, match="has no file"):
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
    assert any("1 chains began before the log" in note for note in trace.notes)
    assert read_trace(write({"ts": 1.0, **stored(["ab"], None)})).num_blocks == 1
    assert "no BlockStored" in refused(write({"ts": 0.0, "events": []}))


def test_what_the_cache_records_is_what_sim_reads(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    chain = KeyChain(root(Namespace("vllm", "m", "r", "float16", "l", 4)), 4)
    recorder = TraceRecorder(path, limit=1 << 30, chunk_tokens=4, chunk_bytes=640, namespace="n", now=100.0)
    first = list(chain.extend(range(9)))
    recorder.lookup(100.5, "a", 9, first, "t", {"host": 0})
    recorder.lookup(103.0, "b", 14, chain.extend(range(14)), "t", {"host": 8})
    recorder.close()
    trace = read_trace(path)
    assert trace.ids.tolist() == [0, 1, 0, 1, 2]
    assert trace.timestamps_s.tolist() == [0.5, 3.0]
    assert (trace.block_tokens, trace.block_bytes, trace.recorded_hits) == (4, 640, {"host": 8})
    assert stack.hit_curve(stack.profile(trace)).at(math.inf) == (2, 8)


def classes(path: Path) -> list[str]:
    trace = read_trace(path)
    return [trace.class_names[code] for code in trace.classes]


def test_files_tell_the_class_of_requests(write: Write) -> None:
    own = [{**lookup(0.5, ["00000000000000aa"]), "class": "tool", "session": "s"}, lookup(0.7, [])]
    assert classes(write(HEADER, *own, name="own.jsonl")) == ["tool", ""]
    assert read_trace(write(HEADER, *own, name="own.jsonl")).sessions.tolist() == [0, -1]
    assert classes(write(chat(1, -1, [5]), chat(2, -1, [6], "search"), name="b.jsonl")) == ["text", "search"]
    line = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1]}
    assert classes(write(line, {**line, "class": "user"}, name="mooncake.jsonl")) == ["", "user"]
    agent = session("a", {**step(0.0, [[1, 1]]), "stop": "tool_use"}, step(1.0, [[1, 1]]))
    assert classes(write(agent, name="agents.jsonl")) == ["tool_use", ""]
    assert "'class' is 3" in refused(write({**line, "class": 3}, name="bad.jsonl"))
