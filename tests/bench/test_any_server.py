"""`lmc bench --url`: any server of OpenAI's API, however strict, behind a key, an own certificate or a proxy."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from lmc.bench.arms import Launcher
from lmc.bench.client import Outcome, _read_stream
from lmc.bench.dialect import Dialect
from lmc.bench.machine import command_line
from lmc.bench.prompts import Request
from lmc.bench.records import ArmResult, read_records, read_results
from lmc.bench.workload import Arm, Engine
from lmc.cli import app
from tests.bench.strict_server import Strict, serving
from tests.services import make_certificate

SECRET = "sk-do-not-print-me"


def bench(url: str, model_folder: Path, out: Path, *more: str) -> Result:
    few = ["--requests", "4", "--prompt-tokens", "40", "--output-tokens", "3"]
    command = ["bench", "--url", url, "--model", "m", "--tokenizer", str(model_folder), "--out", str(out), *few, *more]
    return CliRunner().invoke(app, command)


def measured(result: Result, out: Path) -> ArmResult:
    assert result.exit_code == 0, (result.output, result.exception)
    [arm] = read_results(out).arms
    assert (arm.requests, arm.ok, arm.valid) == (6, 6, True)
    return arm


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.bench.selfcheck.LAG_MS", float("inf"))


@pytest.mark.parametrize(
    ("api", "newline", "tail"),
    [("completions", b"\n", b"data: [DONE]\n\n"), ("chat", b"\r\n", b""), ("chat", b"\n", b"data: [DONE]")],
)
def test_a_strict_server_is_measured(api: str, newline: bytes, tail: bytes, model_folder: Path, tmp_path: Path) -> None:
    server = Strict(newline=newline, tail=tail)
    with serving(server) as url:
        arm = measured(bench(url, model_folder, tmp_path, "--api", api), tmp_path)
    assert arm.output_tokens == 18
    assert "so output lengths differ" in " ".join(arm.notes)
    assert "outputs are not compared" in " ".join(arm.notes)
    assert arm.hit_tokens is None
    assert (arm.prompt_tokens == 6 * 40) == (api == "completions")
    assert "Of server not everything can be measured" in (tmp_path / "report.md").read_text()
    load = server.bodies[-6:]
    if api == "chat":
        assert all(body["messages"][0]["role"] == "user" and "max_tokens" not in body for body in load)
        assert len({body["messages"][0]["content"] for body in load}) == 4
    else:
        assert all(len(body["prompt"]) == 40 for body in load)


def test_a_server_that_takes_only_text(model_folder: Path, tmp_path: Path) -> None:
    server = Strict(ids=False)
    with serving(server) as url:
        arm = measured(bench(url, model_folder, tmp_path), tmp_path)
    assert all(isinstance(body["prompt"], str) for body in server.bodies)
    assert arm.notes[0].startswith("prompts are sent as text")
    assert arm.prompt_tokens == 6 * 7, "as the server counts"


def test_a_server_that_adds_a_bos_and_takes_what_engines_take(model_folder: Path, tmp_path: Path) -> None:
    server = Strict(bos=1, takes={"rid", "ignore_eos", "return_token_ids", "return_tokens_as_token_ids"})
    with serving(server) as url:
        arm = measured(bench(url, model_folder, tmp_path), tmp_path)
    assert any("adds a token to every prompt" in note for note in arm.notes)
    assert arm.prompt_tokens == 6 * 41
    assert "ignore_eos" in server.bodies[-1] and "logprobs" not in server.bodies[-1], "it did not name its tokens"
    server = Strict(bos=5)
    with serving(server) as url:
        result = bench(url, model_folder, tmp_path / "other")
    assert "another tokenizer" in str(result.exception)


def test_a_server_that_counts_nothing(model_folder: Path, tmp_path: Path) -> None:
    with serving(Strict(usage=False)) as url:
        arm = measured(bench(url, model_folder, tmp_path), tmp_path)
    assert any("does not count tokens" in note for note in arm.notes)
    assert (arm.output_tokens, arm.hit_tokens) == (18, None)


def test_nothing_is_reset_unless_asked(model_folder: Path, tmp_path: Path) -> None:
    server = Strict()
    with serving(server) as url:
        measured(bench(url, model_folder, tmp_path / "a"), tmp_path / "a")
        posted = {path for method, path in server.asked if method == "POST"}
        assert posted == {"/tokenize", "/v1/completions"}
        arm = measured(bench(url, model_folder, tmp_path / "b", "--reset"), tmp_path / "b")
    assert {"/flush_cache", "/reset_prefix_cache"} <= {path for _, path in server.asked}
    assert "refuses a reset" in {phase.name: phase.detail for phase in arm.phases}["verify empty"]


def test_a_key_is_sent_and_never_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Strict(key=SECRET)
    with serving(server) as url:
        refused = bench(url, model_folder, tmp_path)
        assert "refuses the key (HTTP 401); set LMC_BENCH_API_KEY" in str(refused.exception)
        monkeypatch.setenv("LMC_BENCH_API_KEY", SECRET)
        monkeypatch.setattr(sys, "argv", ["lmc", "bench", "--header", f"X-Key: {SECRET}", f"--header=X: {SECRET}"])
        result = bench(url, model_folder, tmp_path, "--header", f"X-Key: {SECRET}", "--concurrency", "2")
        measured(result, tmp_path)
    posts = [headers for (_, path), headers in zip(server.asked, server.headers, strict=True) if "completions" in path]
    assert all(headers["X-Key"] == SECRET for headers in posts[1:])
    pages = [headers for (_, path), headers in zip(server.asked, server.headers, strict=True) if path == "/metrics"]
    assert not any(SECRET in str(headers) for headers in pages), "only the API needs the key"
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET.encode() not in written
    assert SECRET not in result.output + caplog.text
    assert command_line() == "lmc bench --header ... --header=..."


def test_a_certificate_of_its_own(model_folder: Path, tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.private_key)
    with serving(Strict(), context) as url:
        assert "cannot reach" in str(bench(url, model_folder, tmp_path / "a").exception)
        measured(bench(url, model_folder, tmp_path / "b", "--ca", str(made.certificate)), tmp_path / "b")
    missing = bench("https://127.0.0.1:9", model_folder, tmp_path / "c", "--ca", str(tmp_path / "none.pem"))
    assert "cannot read certificates" in str(missing.exception)


def test_a_proxy_of_the_environment_is_used(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strict server takes absolute addresses, as a proxy gets them."""
    server = Strict()
    with serving(server) as url:
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        measured(bench("http://nowhere.invalid", model_folder, tmp_path), tmp_path)


def test_what_is_wrong_is_said_in_one_line(model_folder: Path, tmp_path: Path) -> None:
    def said(*command: str) -> str:
        result = CliRunner().invoke(app, ["bench", *command])
        assert result.exit_code and "\n" not in str(result.exception), result.output
        return str(result.exception)

    assert "give either a WORKLOAD file or --url" in said("--quiet")
    assert "--url needs --model" in said("--url", "http://127.0.0.1:9")
    assert "--rate goes with --url" in said("w.yaml", "--rate", "3")
    common = ["--model", "m", "--tokenizer", str(model_folder), "--out", str(tmp_path)]
    assert "a header is 'Name: value'" in said("--url", "http://127.0.0.1:9", *common, "--header", SECRET)
    two = ("--url", "a=http://x", "--url", "b=http://y", "--metrics", "http://z/metrics")
    assert "--metrics goes with one --url" in said(*two, *common)
    assert "two servers have the same name" in said("--url", "a=http://x", "--url", "a=http://y", *common)
    assert "arm server: cannot reach http://127.0.0.1:9/v1" in said("--url", "127.0.0.1:9", *common)
    with serving(Strict()) as url:
        assert "does not serve 'other'" in said("--url", url, *common, "--model", "other")


def test_two_servers_are_compared(model_folder: Path, tmp_path: Path) -> None:
    with serving(Strict()) as one, serving(Strict(ids=False)) as two:
        common = ["--model", "m", "--tokenizer", str(model_folder), "--out", str(tmp_path), "--requests", "6"]
        urls = ["--url", f"a={one}", "--url", f"b={two}"]
        result = CliRunner().invoke(app, ["bench", *urls, *common, "--prompt-tokens", "40", "--output-tokens", "2"])
    assert result.exit_code == 0, (result.output, result.exception)
    results = read_results(tmp_path)
    assert [arm.name for arm in results.arms] == ["a", "b"]
    assert {c.metric for c in results.comparisons} >= {"ttft_p50", "throughput"}
    assert {record.arm for record in read_records(tmp_path)} == {"a", "b"}


class Pieces:
    def __init__(self, pieces: list[bytes]) -> None:
        self.left = iter(pieces)
        self.content = self

    async def readany(self) -> bytes:
        return next(self.left, b"")


EVENTS: list[dict[str, Any]] = [
    {"choices": [{"text": "a", "finish_reason": None}]},
    {"choices": [{"delta": {"content": "b"}, "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}},
]


@given(
    st.lists(st.integers(0, 400), max_size=30),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_stream_is_read_however_it_is_cut(
    places: list[int], newline: bytes, done: bool, comments: bool, blank_at_end: bool
) -> None:
    lines = [b"data: " + json.dumps(event).encode() for event in EVENTS] + ([b"data: [DONE]"] if done else [])
    if comments:
        lines = [b": ping", *(b"event: message" + newline + line for line in lines)]
    stream = (newline * 2).join(lines) + (newline * 2 if blank_at_end else b"")
    bounds = sorted({0, len(stream), *(place for place in places if place < len(stream))})
    pieces = [stream[start:end] for start, end in itertools.pairwise(bounds)]
    outcome = Outcome(Request("p", 0, 0, np.arange(4, dtype=np.int32), 2), 0.0, 0.0)
    asyncio.run(_read_stream(Pieces(pieces), outcome, Dialect()))  # type: ignore[arg-type]
    assert (outcome.status, len(outcome.token_times_s), outcome.output_tokens) == ("ok", 2, 2)


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    outcome = Outcome(Request("p", 0, 0, np.arange(4, dtype=np.int32), 2), 0.0, 0.0)
    first = b"data: " + json.dumps(EVENTS[0]).encode() + b"\n\n"
    asyncio.run(_read_stream(Pieces([first]), outcome, Dialect()))  # type: ignore[arg-type]
    assert (outcome.status, outcome.cause) == ("disconnected", "the stream ended before [DONE]")


def test_the_key_does_not_reach_engines_that_bench_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMC_BENCH_API_KEY", SECRET)
    launcher = Launcher("m", Engine(env={"A": "1"}), tmp_path)
    environment = launcher.environment(Arm(env={"B": "2"}))
    assert (environment["A"], environment["B"]) == ("1", "2")
    assert SECRET not in environment.values()
