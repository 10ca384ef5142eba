"""`lmc serve` on a node: two data-parallel engines that share it, a stop that loses no write, and a pod with little memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmc.serve.ports import free_port
from tests.cache.instance import chunk_files, prompt
from tests.services import LOCAL

pytestmark = pytest.mark.engine

ENGINE = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "2048", "--block-size", "32"]
ENGINE += ["--no-enable-prefix-caching", "--skip-tokenizer-init"]
MIB = 1 << 20


@dataclass
class Served:
    process: subprocess.Popen[str]
    ready: str
    log: Path
    model: str

    def complete(self, tokens: Sequence[int]) -> dict[str, Any]:
        url = re.search(r"url=(\S+)", self.ready)
        assert url is not None
        body = {"model": self.model, "prompt": [token % 500 for token in tokens], "max_tokens": 1, "temperature": 0}
        request = urllib.request.Request(
            f"{url[1]}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return dict(json.load(answer))

    def stats(self, engine: int = 0) -> dict[str, Any]:
        where = re.search(r"metrics=http://(\S+):(\d+)/metrics", self.ready)
        assert where is not None
        with urllib.request.urlopen(f"http://{where[1]}:{int(where[2]) + engine}/stats", timeout=60) as answer:
            return dict(json.load(answer))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextmanager
def serve(
    model: Path, log: Path, *arguments: str, engine: Sequence[str] = (), group: Path | None = None
) -> Iterator[Served]:
    """lmc serve until it is ready; in a control group if one is given."""
    command = [sys.executable, "-m", "lmc", "serve", str(model), "--port", str(free_port(LOCAL)), *arguments]
    join = f"echo $$ > {group}/cgroup.procs; " if group is not None else ""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    with log.open("w") as sink:
        process = subprocess.Popen(
            ["sh", "-c", f'{join}exec "$@"', "sh", *command, "--", *ENGINE, *engine],
            stdout=subprocess.PIPE,
            stderr=sink,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready "):
                break
        else:
            raise AssertionError(
                f"no ready line; exit code {process.wait()}; {''.join(lines)[-2000:]}{log.read_text()[-2000:]}"
            )
        with ThreadPoolExecutor(1) as drain:
            rest = drain.submit(process.stdout.read)
            yield Served(process, line, log, str(model))
            if process.poll() is None:
                process.terminate()
                process.wait(120)
            log.write_text("".join(lines) + rest.result() + log.read_text())
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(120)
        process.stdout.close()


def test_two_engines_share_a_node_and_a_stop_loses_no_write(tiny_llama: Path, tmp_path: Path) -> None:
    disk, record = tmp_path / "disk", tmp_path / "trace.jsonl"
    arguments = ["--host-capacity", "512MiB", "--disk-path", str(disk), "--disk-capacity", "1GiB"]
    arguments += ["--record", str(record), "--chunk-tokens", "32"]
    parallel = ["--data-parallel-size", "2", "--kv-cache-memory-bytes", str(256 * MIB)]
    os.environ["LMC_IO_THREADS"] = "1"
    try:
        with serve(tiny_llama, tmp_path / "log", *arguments, engine=parallel) as served:
            assert "engines=2" in served.ready
            with ThreadPoolExecutor(4) as clients:
                list(clients.map(served.complete, (prompt(seed, 1900) for seed in range(8))))
            both = [served.stats(engine) for engine in (0, 1)]
            assert served.stop() == 0
    finally:
        del os.environ["LMC_IO_THREADS"]
    assert all(stats["totals"]["requests"] > 0 for stats in both)  # each counts its own
    assert sum(stats["totals"]["requests"] for stats in both) == 8
    for tier, capacity in (("host", 512 * MIB), ("disk", 1 << 30)):
        slots = [stats["tiers"][tier]["capacity"] for stats in both]
        assert slots[0] == slots[1] and 0.9 * capacity < sum(slots) * both[0]["chunk_bytes"] <= capacity
    assert len(chunk_files(disk)) == 8 * 59
    assert not list(disk.rglob("tmp/*"))
    requests = []
    for file in (record, tmp_path / "trace.dp1.jsonl"):
        header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert header["format"] == "lmc-trace"
        requests += lines
    assert len(requests) == 8
    log = (tmp_path / "log").read_text()
    assert log.count("lmc: host memory: 256.0 MiB of this engine") == 2


@pytest.fixture
def pod() -> Iterator[Path | None]:
    """A control group of 2.5 GiB; None where this machine lets none be made."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"lmc-pod-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(2560 * MIB))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    yield None


def test_a_pod_of_two_and_a_half_gib_starts_with_the_defaults(
    tiny_llama: Path, tmp_path: Path, pod: Path | None
) -> None:
    with serve(tiny_llama, tmp_path / "log", group=pod) as served:
        tokens = prompt(1, 1900)
        served.complete(tokens)
        assert served.complete(tokens)["usage"]["prompt_tokens_details"]["cached_tokens"] > 1700
        assert served.stop() == 0
    log = (tmp_path / "log").read_text()
    assert (str(pod) if pod is not None else "are free here") in log  # whose limit was taken
