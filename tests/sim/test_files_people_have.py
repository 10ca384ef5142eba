"""Small trace files as people have them: each is read, or refused by one line that names the file, the line, the field and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmc.sim.cache_file import load_trace
from lmc.sim.formats import find_format, read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.trace import Trace
from tests.sim.trace_files import Write, refused


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Three Mooncake rows that share two trace blocks."""
    return [
        {"timestamp": 1000 * n, "input_length": 1324, "output_length": 10, "hash_ids": [0, 1, 10 + n], **changes}
        for n in range(3)
    ]


def chains(trace: Trace) -> list[list[int]]:
    return [trace.ids[a:b].tolist() for a, b in zip(trace.starts[:-1], trace.starts[1:], strict=True)]


SHARED = [[0, 1, 2], [0, 1, 3], [0, 1, 4]]


@pytest.mark.parametrize("name", [str, "{:064x}".format, "0x{:x}".format, lambda n: 2**64 - 1 - n, lambda n: -n])
def test_hashes_are_integers_or_texts(write: Write, name: Any) -> None:
    trace = read_trace(write(*[{**row, "hash_ids": [name(n) for n in row["hash_ids"]]} for row in rows()]))
    assert chains(trace) == SHARED


def test_hashes_in_two_forms_are_refused(write: Write) -> None:
    for first, second in ((1, "1"), ("1", 1)):
        message = refused(write(*rows(hash_ids=[first]), *rows(hash_ids=[second])))
        assert "trace.jsonl, line 4: 'hash_ids'" in message
    assert "'hash_ids'" in refused(write(*rows(hash_ids=[2**64])))


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + "\n".join(map(json.dumps, rows())),  # a byte order mark
        "\r\n".join(map(json.dumps, rows())) + "\r\n",
        json.dumps(rows()),
        json.dumps(rows(), indent=1),
        "\ufeff" + json.dumps(rows(), indent=1).replace("\n", "\r\n"),
        "\n".join(json.dumps(row, indent=2) for row in rows()),
        json.dumps(rows())[:-1] + " ]\n\n",
    ],
)
def test_a_file_may_have_a_mark_other_line_ends_or_be_one_document(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(text.encode())
    trace = load_trace(path, ReadOptions())
    assert (chains(trace), trace.timestamps_s.tolist(), trace.format) == (SHARED, [0.0, 1.0, 2.0], "mooncake")


def test_errors_in_a_document_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    lines = json.dumps([rows()[0], {**rows()[1], "input_length": "many"}], indent=0).splitlines()
    path.write_text("\n".join(lines))
    begins = [number for number, line in enumerate(lines, start=1) if line == "{"]
    assert f"trace.json, line {begins[1]}: 'input_length' is 'many'" in refused(path)
    path.write_text("\n".join([*lines[: begins[1]], "broken", *lines[begins[1] :]]))
    assert f"line {begins[1] + 1}: the text is not JSON" in refused(path)
    path.write_text("[1, 2]")
    assert "line 1: a JSON int is not an object" in refused(path)
    path.write_text("[\n{},\n{} {}]")
    assert "line 3: the JSON array" in refused(path, ReadOptions()) or "line 2" in refused(path)
    path.write_text("[" * 100_000)
    assert "line 1: the text is not JSON" in refused(path)


def test_lengths_may_be_floats_and_the_output_may_be_missing(write: Write) -> None:
    trace = read_trace(write(*rows(input_length=1324.0, output_length="7")))
    assert (trace.num_tokens, trace.output_tokens.tolist()) == (3 * 1324, [7, 7, 7])
    bare = [{key: value for key, value in row.items() if key != "output_length"} for row in rows()]
    assert read_trace(write(*bare)).output_tokens.tolist() == [0, 0, 0]
    assert "line 1: 'input_length' is 1324.5" in refused(write(*rows(input_length=1324.5)))


def test_times_may_be_dates_or_epochs_in_any_unit(write: Write) -> None:
    start = 1753780607.25
    for form in (
        lambda t: str(int(t * 1e9)),
        lambda t: int(t * 1e6),
        lambda t: t * 1e3,
        lambda t: {0: "2025-07-29T09:16:47.250Z", 1: "2025-07-29 09:16:48.250", 2: "2025-07-29T11:16:49.25+02:00"}[
            round(t - start)
        ],
    ):
        times = [{**row, "timestamp": form(start + n)} for n, row in enumerate(rows())]
        found = read_trace(write(*times)).timestamps_s
        assert found.tolist() == pytest.approx([start, start + 1, start + 2], abs=1e-4), found
    assert "line 1: 'timestamp' is 'soon'" in refused(write(*rows(timestamp="soon")))


def test_aiperf_rows_follow_each_other_by_delay(write: Write) -> None:
    def turn(session: str, **more: Any) -> dict[str, Any]:
        return {"session_id": session, "input_length": 1024, "output_length": 2, "hash_ids": [0, 1], **more}

    trace = read_trace(
        write(turn("a", timestamp=0), turn("a", delay=500), turn("b", timestamp=200), turn("a", delay=100))
    )
    assert trace.timestamps_s.tolist() == [0.0, 0.2, 0.5, 0.6]
    assert trace.sessions.tolist() == [0, 1, 0, 0]
    assert any("delay" in note for note in trace.notes)
    unstarted = write(turn("a", delay=100), turn("a", delay=100), turn("b", delay=50))
    assert read_trace(unstarted, ReadOptions(session_gap_s=10)).timestamps_s.tolist() == [0.1, 0.2, 10.05]
    assert "line 1: 'session_id' is missing" in refused(write({"delay": 1, "input_length": 1024, "hash_ids": [0, 1]}))


def test_rows_without_hashes_share_nothing_but_a_file_without_any_is_refused(write: Write) -> None:
    bare = {"timestamp": 1000, "input_length": 1100, "output_length": 26}
    trace = read_trace(write(rows()[0], bare, rows()[2]))
    assert (chains(trace), trace.num_tokens) == ([[0, 1, 2], [], [0, 1, 3]], 2 * 1324 + 1100)
    assert any("1 requests have no 'hash_ids' (first: line 2)" in note for note in trace.notes)
    assert "trace.jsonl, line 1: 'hash_ids' is missing" in refused(write(bare, bare))


def test_rows_without_times_arrive_together_but_not_only_some(write: Write) -> None:
    bare = [{key: value for key, value in row.items() if key != "timestamp"} for row in rows()]
    trace = read_trace(write(*bare))
    assert chains(trace) == SHARED and any("no timestamps" in note for note in trace.notes)
    assert "line 4: 'timestamp' is missing" in refused(write(*rows(), *bare))
    assert "line 4: 'timestamp' is there" in refused(write(*bare, *rows()))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"timestamp": 1, "hash_ids": [1, 2], "output_length": 3}, "'input_length'"),
        ({"timestamp": 1, "chunk_hashes": ["a"], "seq_len": 3}, "'chunk_size'"),
        ({"chat_id": 1, "timestamp": 1, "hash_ids": [1]}, "'input_length'"),
        ({"id": "a", "block_size": 64, "requests": []}, "'hash_id_scope'"),
    ],
)
def test_one_missing_field_is_named(write: Write, record: dict[str, Any], field: str) -> None:
    message = refused(write(record))
    assert f"{field} is missing" in message and "trace.jsonl, line 1" in message and "no known" not in message


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Every character is a token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    built = Tokenizer(models.WordLevel({"?": 0, **{chr(n): n for n in range(1, 128)}}, unk_token="?"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def read(write: Write, tokenizer: Path) -> Any:
    return lambda *records: read_trace(write(*records), ReadOptions(block_tokens=1, tokenizer=tokenizer))


CALL = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"city": "B"}'}}
ASKED = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]


def test_chats_with_tool_calls_are_read(read: Any) -> None:
    other = json.loads(json.dumps(ASKED).replace('\\"B\\"', '\\"C\\"'))
    trace = read(
        {"messages": ASKED, "timestamp": 1}, {"messages": ASKED, "timestamp": 2}, {"messages": other, "timestamp": 3}
    )
    first, again, third = chains(trace)
    assert [trace.class_names[code] for code in trace.classes] == ["tool", "tool", "tool"]
    assert first == again
    same = next(index for index, (a, b) in enumerate(zip(first, third, strict=True)) if a != b)
    assert 60 < same < len(first) - 40  # the call's arguments are part of the prompt, and so is what follows
    with_tools = read({"messages": ASKED, "tools": [{"type": "function", "function": {"name": "w"}}]})
    assert with_tools.num_tokens > trace.input_tokens[0]


def test_chats_with_parts_are_read(read: Any) -> None:
    def chat(*parts: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": list(parts)}]}

    text = {"type": "text", "text": "look"}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BBBB"}}
    plain = read(chat(text), {"messages": [{"role": "user", "content": "look"}]})
    assert chains(plain)[0] == chains(plain)[1]
    trace = read(chat(image, text), chat(image, text), chat(other, text))
    first, again, third = chains(trace)
    assert first == again and first != third
    assert any("images" in note for note in trace.notes)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, "b"], "messages[1]"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [7]}], "messages[0].content[0]"),
    ],
)
def test_a_message_without_content_is_named(write: Write, tokenizer: Path, messages: Any, field: str) -> None:
    message = refused(write({"messages": messages}), ReadOptions(tokenizer=tokenizer))
    assert "trace.jsonl, line 1" in message and field in message


def test_prompts_shorter_than_a_trace_block_are_refused_with_a_remedy(write: Write, tokenizer: Path) -> None:
    path = write({"prompt": "ab"}, {"prompt": "abc"})
    message = refused(path, ReadOptions(tokenizer=tokenizer))
    assert "trace.jsonl, line 2" in message and "of 3;" in message and "--block-tokens" in message


def test_openai_batch_files_are_read(read: Any) -> None:
    def request(url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": "r", "method": "POST", "url": url, "body": {"model": "m", **body}}

    trace = read(
        request("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=3),
        request("/v1/completions", prompt="hello"),
        request("/v1/responses", input=[{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]),
    )
    assert trace.format == "prompts"
    first, second, third = chains(trace)
    assert first == third and len(second) == len("hello")


def test_sharegpt_conversations_become_one_request_for_each_answer(tmp_path: Path, tokenizer: Path) -> None:
    turns = [("human", "a"), ("gpt", "bcd"), ("human", "e"), ("gpt", "f")]
    document = [
        {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]},
        {"id": "y", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "zz"}]},
        {"id": "empty", "conversations": []},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(document))
    trace = read_trace(path, ReadOptions(block_tokens=1, tokenizer=tokenizer))
    first, second, third = chains(trace)
    assert second[: len(first)] == first == third and len(second) > len(first)
    assert (trace.output_tokens.tolist(), trace.sessions.tolist()) == ([3, 1, 2], [0, 0, 1])
    document[1]["conversations"] = [{"from": "human"}]
    path.write_text(json.dumps(document, indent=1))
    message = refused(path, ReadOptions(tokenizer=tokenizer))
    assert "sharegpt.json, line 2" in message and "conversations[0]" in message


def test_burstgpt_has_arrivals_but_no_hits(write: Write) -> None:
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    path = write(
        "\ufeff" + head, "5,ChatGPT,472,18,490,Conversation log", '45,"GPT-4",1087,230,1317,API log', name="b.csv"
    )
    trace = read_trace(path)
    assert (find_format(path).name, trace.num_tokens, trace.output_tokens.tolist()) == ("burstgpt", 1559, [18, 230])
    assert (trace.timestamps_s.tolist(), trace.tenant_names) == ([5.0, 45.0], ("ChatGPT", "GPT-4"))
    newer = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    trace = read_trace(write(newer, "5,7,1,m,4,1,5,x", "6,7,1,m,4,1,5,x", "6,8,1,m,4,1,5,x", name="b.csv"))
    assert trace.sessions.tolist() == [0, 0, 1]
    assert "b.csv, line 2: 'Request tokens' is 'x'" in refused(write(head, "5,ChatGPT,x,18,490,log", name="b.csv"))
    assert "b.csv, line 2: 2 cells" in refused(write(head, "5,ChatGPT", name="b.csv"))
