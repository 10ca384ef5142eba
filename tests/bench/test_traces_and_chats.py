"""Prompts from traces (lmc's own record among them) and from files of chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc.bench.chats import read_chats
from lmc.bench.prompts import Conversation, build_prompts
from lmc.bench.records import read_records, read_results
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Workload
from lmc.cache.keys import ChunkKey, KeyChain
from lmc.cache.observe.record import TraceRecorder
from lmc.errors import TraceError, WorkloadError
from tests.bench.conftest import small_workload
from tests.bench.strict_server import Strict, serving
from tests.bench.test_any_server import bench

CHUNK = 16


def sessions(tokenizer: ModelTokenizer, path: Path, kind: str, **source: Any) -> list[Conversation]:
    part = {"source": {"kind": kind, "path": str(path), **source}, "output_tokens": 16}
    workload = Workload.model_validate(small_workload(bars=[], parts={"p": part}, engine={"context": 1 << 20}))
    return build_prompts(workload, tokenizer, Path()).parts["p"]


def common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def record(path: Path, prompts: list[list[int]]) -> None:
    """As lmc serve --record writes it."""
    path.unlink(missing_ok=True)  # a record goes on with the file that is there
    recorder = TraceRecorder(path, limit=1 << 30, chunk_tokens=CHUNK, chunk_bytes=1, namespace="n", now=0.0)
    for number, tokens in enumerate(prompts):
        keys = KeyChain(ChunkKey(bytes(32)), CHUNK).extend(tokens)
        recorder.lookup(number / 4, f"r{number}", len(tokens), keys, "", {})
    recorder.close()


PIECES = [[piece] * CHUNK for piece in range(4)]
prompts_of_pieces = st.lists(
    st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5), st.integers(0, CHUNK - 1)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts_of_pieces)
def test_lmc_s_own_record_is_replayed_with_the_prefixes_that_it_names(
    tokenizer: ModelTokenizer, tmp_path: Path, drawn: list[tuple[list[list[int]], int]]
) -> None:
    real = [[token for piece in pieces for token in piece] + [99] * tail for pieces, tail in drawn]
    record(tmp_path / "record.jsonl", real)
    made = [session[0].prompt.tolist() for session in sessions(tokenizer, tmp_path / "record.jsonl", "trace")]
    assert [len(prompt) for prompt in made] == [len(prompt) for prompt in real]
    for a, ours in zip(real, made, strict=True):
        for b, theirs in zip(real, made, strict=True):
            shared = common(a, b) // CHUNK * CHUNK
            assert common(ours, theirs) // CHUNK * CHUNK >= shared
            if a != b:
                assert common(ours, theirs) < shared + CHUNK, "no other chunk is shared"


def test_times_and_lengths_of_a_record(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    record(tmp_path / "r.jsonl", [[1] * 40, [1] * 70])
    requests = [session[0] for session in sessions(tokenizer, tmp_path / "r.jsonl", "trace")]
    assert [request.at_s for request in requests] == [0.0, 0.25]
    assert [request.output_tokens for request in requests] == [16, 16], "a record does not say them"
    scaled = sessions(tokenizer, tmp_path / "r.jsonl", "trace", tokens_per_block=4)
    assert [len(session[0].prompt) for session in scaled] == [10, 18]


def test_a_request_with_too_few_ids_keeps_its_length(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 5000, "output_length": 8, "hash_ids": [1, 2, 3]}
    rows = [row, row]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = (s[0].prompt.tolist() for s in sessions(tokenizer, tmp_path / "t.jsonl", "trace", block_tokens=512))
    assert len(one) == len(two) == 5000
    assert 1536 <= common(one, two) < 1600, "what no id names is each one's own"


def test_a_bailian_trace(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    row = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 40, "output_length": 9, "type": "text"}
    rows = [{**row, "turn": 1, "hash_ids": [1, 2, 3]}, {**row, "chat_id": 2, "turn": 1, "hash_ids": [1, 2, 4]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = (session[0] for session in sessions(tokenizer, tmp_path / "t.jsonl", "trace"))
    assert (len(one.prompt), one.output_tokens) == (40, 9)
    assert 32 <= common(one.prompt.tolist(), two.prompt.tolist()) < 36


@pytest.mark.parametrize("ids", ['["a", "b"]', "[]", "null", "[1.5]", "7"])
def test_ids_that_name_nothing_are_an_error_with_its_line(tokenizer: ModelTokenizer, tmp_path: Path, ids: str) -> None:
    good = '{"timestamp": 0, "input_length": 500, "output_length": 8, "hash_ids": [1]}\n'
    (tmp_path / "t.jsonl").write_text(good + good.replace("[1]", ids))
    try:
        made = sessions(tokenizer, tmp_path / "t.jsonl", "trace")
    except TraceError as error:
        assert "line 2" in str(error) and "\n" not in str(error)
    else:
        assert [len(session[0].prompt) for session in made] == [500, 500]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
RECORDS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "max_tokens": 5, "timestamp": 1.5},
    {
        "id": "x",
        "conversations": [
            {"from": "human", "value": "one"},
            {"from": "gpt", "value": "two"},
            {"from": "human", "value": "three"},
        ],
    },
    {
        "custom_id": "batch",
        "body": {
            "model": "m",
            "tools": [TOOL],
            "messages": [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "3"},
                {"role": "assistant", "content": "the answer"},
            ],
        },
    },
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_prompts_conversations_and_chats_with_tools(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    raw, talk, tools = sessions(tokenizer, write(tmp_path / "c.jsonl", RECORDS), "chats")
    assert tokenizer.decode(raw[0].prompt) == "Once upon a time"
    assert (raw[0].output_tokens, raw[0].at_s) == (5, 1.5)
    assert [tokenizer.decode(request.prompt) for request in talk] == [
        "<user>one\n<assistant>",
        "<user>one\n<assistant>two\n<user>three\n<assistant>",
    ]
    assert [request.id for request in talk] == ["p/1/0", "p/1/1"]
    assert tokenizer.decode(tools[0].prompt) == "<system>be short\n<user>ab\n<assistant>\n<tool>3\n<assistant>"
    assert tools[0].tools == (TOOL,)
    [[asked]] = read_chats(write(tmp_path / "d.jsonl", RECORDS[2:]))
    assert asked.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}, "as templates take it"


def test_a_template_sees_tools_and_calls(model_folder: Path, tmp_path: Path) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
    template += "{% for c in m.tool_calls %}{{ c.function.arguments.a }}{% endfor %};{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = ModelTokenizer.load(tmp_path)
    [[request]] = sessions(tokenizer, write(tmp_path / "c.jsonl", RECORDS[2:]), "chats")
    assert tokenizer.decode(request.prompt) == json.dumps([TOOL]) + "be short;ab;1;3;"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": ""}, "there is no prompt"),
        ({"messages": []}, "'messages' asks nothing"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": ["hello"]}, r"messages\[0\] is not a message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'; only text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "tool call without a function"),
        ({"prompt": "x", "tools": {}}, "'tools' is not a list"),
        ({"prompt": "x", "max_tokens": "9"}, "'max_tokens' is not a number"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\] has no text"),
    ],
)
def test_what_cannot_be_sent_is_an_error_with_its_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "c.jsonl", [{"prompt": "fine"}, record])
    with pytest.raises(WorkloadError, match=rf"c\.jsonl, line 2.*{message}") as told:
        list(read_chats(path))
    assert "\n" not in str(told.value)


def test_files_are_sent_to_a_running_server(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmc.bench.selfcheck.LAG_MS", float("inf"))
    server = Strict()
    with serving(server) as url:
        chats = write(tmp_path / "c.jsonl", RECORDS)
        result = bench(url, model_folder, tmp_path / "a", "--prompts", str(chats), "--api", "chat")
        assert result.exit_code == 0, (result.output, result.exception)
        bodies = server.bodies[-4:]
        assert [body["messages"][0]["content"] for body in bodies] == ["Once upon a time", "one", "one", "be short"]
        assert bodies[3]["tools"] == [TOOL]
        assert bodies[3]["messages"][2]["tool_calls"] == [CALL], "as the API takes it"
        record(tmp_path / "r.jsonl", [[1] * 40, [1] * 70])
        result = bench(url, model_folder, tmp_path / "b", "--trace", str(tmp_path / "r.jsonl"), "--speed", "5")
        assert result.exit_code == 0, (result.output, result.exception)
    assert [len(body["prompt"]) for body in server.bodies[-2:]] == [40, 70]
    assert read_results(tmp_path / "b").workload["load"] == {"kind": "trace", "speed": 5.0}
    assert [record.request_id for record in read_records(tmp_path / "b")] == ["file/0/0", "file/1/0"]
