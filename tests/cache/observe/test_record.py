from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import orjson
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from lmc.cache.keys import KeyChain, hashed_name, root
from lmc.cache.observe.record import TraceRecorder, rotated
from lmc.cache.scheduler.cache import Identity
from lmc.errors import ConfigError
from lmc.sim.formats import read_trace
from tests.cache.instance import CHUNK_TOKENS, Instance, prompt, settings


def test_the_record_says_what_was_asked_and_what_was_found(tmp_path):
    trace = tmp_path / "trace.jsonl"
    instance = Instance(settings(record=trace))
    tokens = prompt(1, 50)
    instance.serve(tokens)
    instance.serve(tokens)
    instance.close()
    header, *lines = [orjson.loads(line) for line in trace.read_bytes().splitlines()]
    assert (header["format"], header["version"], header["chunk_tokens"]) == ("lmc-trace", 1, CHUNK_TOKENS)
    keys = KeyChain(root(instance.scheduler.namespace), CHUNK_TOKENS).extend(tokens)
    assert [line["chunks"] for line in lines] == [[key.hex()[:16] for key in keys]] * 2
    assert [line["tokens"] for line in lines] == [50, 50]
    assert lines[0]["hit_tokens"] == {"device": 0}
    assert lines[1]["hit_tokens"] == {"device": 0, "host": 48}
    assert 0 <= lines[0]["t"] <= lines[1]["t"]
    assert str(tokens[0]) not in [str(value) for value in lines[0].values()], "no token ids are written"


def test_a_record_holds_no_salt_and_yet_tells_tenants_apart(tmp_path):
    salts = ["my-very-secret-salt", 'a"b', "\ud800", "my-very-secret-salt", ""]
    names = []
    for file in ("one.jsonl", "other.jsonl"):
        instance = Instance(settings(record=tmp_path / file))
        for salt in salts:
            instance.serve(prompt(1, 20), Identity(tenant=hashed_name(salt)))
        instance.close()
        written = (tmp_path / file).read_bytes()
        assert not any(salt.encode(errors="ignore") in written for salt in salts if len(salt) > 3)
        names.append([orjson.loads(line)["tenant"] for line in written.splitlines()[1:]])
        assert (tmp_path / file).stat().st_mode & 0o077 == 0
    for found in names:
        assert found[0] == found[3] and found[4] == "" and len(set(found)) == 4
    assert not set(names[0]) & set(names[1]) - {""}  # a guess at a salt cannot be checked with another file


def test_the_record_holds_what_clients_tell_of_their_requests(tmp_path):
    trace = tmp_path / "trace.jsonl"
    instance = Instance(settings(record=trace))
    for told in ({"request_class": "tool", "session": "my session"}, {"session": "my session"}, {}):
        instance.serve(prompt(1, 20), Identity(**told))
    instance.close()
    assert b"my session" not in trace.read_bytes()
    lines = [orjson.loads(line) for line in trace.read_bytes().splitlines()[1:]]
    assert [line.get("class") for line in lines] == ["tool", None, None]
    assert lines[0]["session"] == lines[1]["session"] and "session" not in lines[2]
    read = read_trace(trace)
    assert (read.sessions.tolist(), read.class_names, read.classes.tolist()) == ([0, 0, -1], ("", "tool"), [1, 0, 0])


def test_a_record_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot write the trace"):
        Instance(settings(record=tmp_path / "absent" / "trace.jsonl"))


def recorder(path, limit=1 << 30, now=0.0, **changes):
    header = {"chunk_tokens": 8, "chunk_bytes": 64, "namespace": "n", **changes}
    return TraceRecorder(path, limit=limit, now=now, **header)


def ask(written, number, now=1.0):
    written.lookup(now, str(number), 16, [number.to_bytes(32, "big")], "", {})


def asked(path):
    return [int(line["request"]) for line in map(orjson.loads, path.read_bytes().splitlines()) if "request" in line]


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts the tests in the background has it ignored
from tests.cache.instance import Instance, prompt, settings
if os.fork():
    os.wait()  # the parent of the group, which is killed with it
instance = Instance(settings(record=sys.argv[1]))
for number in range(48):
    instance.serve(prompt(number, 20))
print("served", flush=True)
instance.serve(prompt(99, 20))
import time
time.sleep(600)
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_group_loses_no_lookup(tmp_path, by):
    trace = tmp_path / "trace.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, trace], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"served\n"
    os.killpg(process.pid, by)
    process.wait()
    process.stdout.close()
    header, *lines = [orjson.loads(line) for line in trace.read_bytes().splitlines()]
    assert header["format"] == "lmc-trace" and len(lines) >= 48


def test_a_restart_goes_on_with_the_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    for run in range(3):
        written = recorder(path, now=1000.0 * run)  # another engine has another clock
        ask(written, run, now=1000.0 * run + 0.001)
        written.close()
        written.close()
    assert asked(path) == [0, 1, 2] and path.read_bytes().count(b"lmc-trace") == 1
    trace = read_trace(path)
    assert trace.num_requests == 3 and (trace.timestamps_s < 60).all()


def test_half_a_line_is_cut_off_before_the_file_goes_on(tmp_path):
    path = tmp_path / "trace.jsonl"
    written = recorder(path)
    ask(written, 1)
    written.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"t": 3, "request": "' + b"x" * 200_000)
    written = recorder(path)
    assert path.read_bytes() == whole
    ask(written, 2)
    written.close()
    assert asked(path) == [1, 2]


def test_another_file_is_left_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    for content in ('{"important": 1}\n', "text", "\n"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"data.jsonl is there and is not a record of lmc"):
            recorder(path)
        assert path.read_text() == content


@examples(max_examples=25, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 12), st.sampled_from([8, 16])), min_size=1, max_size=5),
    limit=st.sampled_from([1, 300, 600, 1 << 20]),
)
def test_full_files_and_other_chunks_begin_a_new_file_and_nothing_is_lost(tmp_path_factory, runs, limit):
    path = tmp_path_factory.mktemp("record") / "trace[1].jsonl"
    count = 0
    chunks = []
    for lookups, chunk_tokens in runs:
        written = recorder(path, limit, chunk_tokens=chunk_tokens)
        for _ in range(lookups):
            ask(written, count)
            chunks.append(chunk_tokens)
            count += 1
        written.close()
    files = [*rotated(path), path]
    assert [number for file in files for number in asked(file)] == list(range(count))
    for file in files:
        header = orjson.loads(file.read_bytes().split(b"\n")[0])
        assert all(chunks[number] == header["chunk_tokens"] for number in asked(file))
        assert file.stat().st_size < limit + 400 and file.stat().st_mode & 0o077 == 0
    last = orjson.loads(path.read_bytes().split(b"\n")[0])["chunk_tokens"]
    if last in chunks:
        assert read_trace(path).num_requests == chunks.count(last)


def test_two_processes_may_share_a_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    first, second = recorder(path, 500), recorder(path, 500, now=70.0)
    for number in range(0, 40, 2):
        ask(first, number)
        ask(second, number + 1, now=71.0)
    first.close()
    second.close()
    assert sorted(number for file in [*rotated(path), path] for number in asked(file)) == list(range(40))
    assert read_trace(path).num_requests == 40


def test_a_full_disk_costs_lines_and_not_the_engine(tmp_path, caplog):
    written = TraceRecorder(
        tmp_path / "trace.jsonl", limit=1 << 30, chunk_tokens=8, chunk_bytes=64, namespace="n", now=0.0
    )
    ask(written, 1)
    full = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(written._fd)
    os.dup2(full, written._fd)
    ask(written, 2)
    assert "lookups are missing" in caplog.text and "No space left" in caplog.text
    os.dup2(kept, written._fd)
    ask(written, 3)
    written.close()
    os.close(full)
    os.close(kept)
    assert asked(tmp_path / "trace.jsonl") == [1, 3]


def test_a_pipe_gets_every_line(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got = []
    reader = threading.Thread(target=lambda: got.extend(path.read_bytes().splitlines()))
    reader.start()
    written = recorder(path, limit=1)
    for number in range(5):
        ask(written, number)
    written.close()
    reader.join()
    assert [orjson.loads(line)["request"] for line in got[1:]] == list("01234")
