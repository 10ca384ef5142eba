"""`lmc serve` with the embedded model: the ready line, real answers, metrics, the recorded trace, a clean stop."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmc.bench.spans import client_id
from lmc.serve.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.compat]

MODEL = "smollm2-135m-instruct"
ENGINE = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "2048", "--no-enable-prefix-caching"]
LICENCE = (Path(__file__).parents[2] / "LICENSE").read_text()


@dataclass
class Served:
    process: subprocess.Popen[str]
    ready: str
    log: Path

    @property
    def url(self) -> str:
        return re.search(r"url=(\S+)", self.ready)[1]  # type: ignore[index]

    @property
    def metrics(self) -> str:
        return re.search(r"metrics=(\S+)", self.ready)[1]  # type: ignore[index]

    def complete(self, prompt: str, request_id: str = "", max_tokens: int = 8) -> dict[str, Any]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        headers = {"content-type": "application/json", **({"X-Request-Id": request_id} if request_id else {})}
        request = urllib.request.Request(f"{self.url}/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))


def start(log: Path, *arguments: str) -> Served:
    command = [sys.executable, "-m", "lmc", "serve", MODEL, "--port", str(free_port("127.0.0.1")), *arguments]
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*command, "--", *ENGINE],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready "):
            return Served(process, line, log)
    raise AssertionError(f"no ready line; exit code {process.wait()}; {log.read_text()[-2000:]}")


def stop(served: Served, number: signal.Signals) -> int:
    served.process.send_signal(number)
    assert served.process.stdout is not None
    served.process.stdout.read()
    served.process.stdout.close()
    return served.process.wait(60)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "trace.jsonl"


@pytest.fixture(scope="module")
def served(record: Path) -> Iterator[Served]:
    disk = record.parent / "disk"
    engine = start(
        record.parent / "log",
        "--disk-path",
        str(disk),
        "--disk-capacity",
        "1GiB",
        "--host-capacity",
        "512MiB",
        "--record",
        str(record),
    )
    yield engine
    if engine.process.poll() is None:
        stop(engine, signal.SIGTERM)


def test_the_ready_line_says_where_and_how_large(served: Served) -> None:
    assert served.url.startswith("http://127.0.0.1:")
    assert re.search(r'tiers="host 5\d\d\.\d MiB \(\d+ chunks\), disk 1\.0 GiB \([\d,]+ chunks\)"', served.ready)


def test_a_repeated_prompt_comes_from_the_cache(served: Served) -> None:
    prompt = LICENCE[:3000] + "\nSummary:"
    cold, warm = served.complete(prompt), served.complete(prompt)
    assert cold["choices"][0]["text"] == warm["choices"][0]["text"]
    tokens = cold["usage"]["prompt_tokens"]
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == (tokens - 1) // 128 * 128


def test_both_metrics_pages_count_the_hit(served: Served) -> None:
    own = urllib.request.urlopen(served.metrics).read().decode()
    hits = float(re.search(r'^lmc_hit_tokens_total\{tier="host"\} (\S+)', own, re.MULTILINE)[1])  # type: ignore[index]
    assert hits > 0
    deadline = time.monotonic() + 20
    pattern = r'^vllm:lmc_hit_tokens_total\{[^}]*tier="host"[^}]*\} (\S+)'
    while time.monotonic() < deadline:
        served.complete("One more short prompt, so that the engine steps.")
        page = urllib.request.urlopen(served.url.removesuffix("/v1") + "/metrics").read().decode()
        if found := re.search(pattern, page, re.MULTILINE):
            assert float(found[1]) == hits
            if importlib.util.find_spec(
                "vllm.v1.metrics.cache_hit_source"
            ):  # else vLLM never asks where a hit came from
                source = r'^vllm:prompt_tokens_cached_by_source_total\{[^}]*source="host"[^}]*\} (\S+)'
                assert float(re.search(source, page, re.MULTILINE)[1]) == hits  # type: ignore[index]
            return
        time.sleep(1)
    raise AssertionError("vLLM's metrics never showed the hit")


def test_a_request_s_span_is_found_by_the_id_that_its_client_sent(served: Served) -> None:
    prompt, hits = LICENCE[1000:4000] + "\nSummary:", 0
    for number, request_id in enumerate(("lmc/0/part/0/0", "lmc/0/part/0/1")):
        usage = served.complete(prompt, request_id)["usage"]
        page = json.load(urllib.request.urlopen(served.metrics.removesuffix("/metrics") + "/requests"))
        span = {client_id(span["request"]): span for span in page["requests"]}[request_id]
        hits = usage["prompt_tokens_details"]["cached_tokens"] if number else hits
        assert (span["tokens"], span["hit_tokens"].get("host", 0)) == (usage["prompt_tokens"], hits)
        assert span["asked_s"] <= span["answered_s"] <= span["admitted_s"] <= page["now_s"]
        assert (span["load_bytes"] > 0, span["load_seconds"] > 0) == (hits > 0, hits > 0)
    assert hits > 0


def test_what_the_last_request_left_to_write_is_written_while_the_engine_is_idle(served: Served) -> None:
    def stats() -> dict[str, Any]:
        return dict(json.load(urllib.request.urlopen(served.metrics.removesuffix("/metrics") + "/stats")))

    before = stats()["tiers"]["disk"]["chunks"]
    served.complete(LICENCE[2000:5000] + "\nSummary:", max_tokens=1)  # the step that stores is the last one
    deadline = time.monotonic() + 60
    while (now := stats())["pending_operations"] or now["tiers"]["disk"]["chunks"] == before:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


def test_a_clean_stop_ends_with_0_and_leaves_a_trace_that_sim_reads(served: Served, record: Path) -> None:
    assert stop(served, signal.SIGTERM) == 0
    result = subprocess.run(
        [sys.executable, "-m", "lmc", "sim", str(record), "--policy", "lru", "--capacity-blocks", "inf", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    row = json.loads(result.stdout)["rows"][0]
    assert row["hit_tokens"] > 0
    assert row["total_tokens"] > row["hit_tokens"]


def test_the_engines_exit_code_is_passed_on(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lmc", "serve", MODEL, "--port", str(free_port("127.0.0.1")), "--", "--no-such-option"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "--no-such-option" in result.stderr
