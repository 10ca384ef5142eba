"""A real SGLang server, started by `lmc serve` and asked over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.engines.scenario import TOKEN
from tests.services import free_port

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
START_SECONDS = 480


class SglangServer:
    """settings None: SGLang alone. Prompts and outputs are token ids."""

    def __init__(self, model: str | Path, folder: Path, *arguments: str, settings: dict[str, object] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._log = (folder / "engine.log").open("wb")
        command = [sys.executable, "-m", "lmc", "serve", str(model), "--engine", "sglang", "--port", str(self.port)]
        if settings is None:
            command += ["--no-cache"]
        else:
            file = folder / "cache.yaml"
            file.write_text(yaml.safe_dump(_nested({"strict": True, **settings})))
            command += ["--config", str(file)]
        command += ["--", "--skip-tokenizer-init", "--max-total-tokens", "16384", "--random-seed", "1", *arguments]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **ENVIRONMENT, "LMC_ADMIN_TOKEN": TOKEN},
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        watchdog = threading.Timer(START_SECONDS, self.kill)
        watchdog.start()
        self.ready = self._wait_ready()
        watchdog.cancel()
        self._drain = threading.Thread(target=self._read_on, daemon=True)
        self._drain.start()

    def __enter__(self) -> SglangServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, tokens: list[int], *, max_tokens: int = 6, wishes: dict[str, object] | None = None, **more: Any
    ) -> dict[str, Any]:
        """tokens, logprobs, device (cached tokens in SGLang), loaded (those from lmc), explanation (if wished for), seconds."""
        sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
        if wishes is not None:
            sampling["custom_params"] = {"lmc": wishes}
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, **more}
        started = time.perf_counter()
        answer = json.loads(self.post("/generate", body))
        seconds = time.perf_counter() - started
        meta = answer["meta_info"]
        details = meta.get("cached_tokens_details") or {"device": meta["cached_tokens"], "host": 0}
        return {
            "tokens": [token for _, token, *_ in meta["output_token_logprobs"]],
            "logprobs": [logprob for logprob, *_ in meta["output_token_logprobs"]],
            "device": details["device"],
            "loaded": details["host"],
            "explanation": meta.get("lmc"),
            "seconds": seconds,
        }

    def flush(self) -> None:
        """Empty SGLang's own cache. It refuses while the last request is not quite over."""
        end = time.monotonic() + 30
        while True:
            try:
                self.post("/flush_cache", {})
            except urllib.error.HTTPError as error:
                if error.code != 400 or time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=180) as answer:
            content: bytes = answer.read()
        return content

    def metric(self, name: str, **labels: str) -> float:
        """0 if there is no such sample."""
        with urllib.request.urlopen(self.ready["metrics"], timeout=10) as answer:
            text = answer.read().decode()
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        sample = re.escape(f"{name}{{{inside}}}" if inside else name)
        found = re.search(rf"^{sample} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until lmc has no copy under way, twice in a row: a copy that ends may start another."""
        end, quiet = time.monotonic() + seconds, 0
        while quiet < 2:
            assert time.monotonic() < end, "copies are still under way"
            quiet = quiet + 1 if self.metric("lmc_pending_operations") == 0 else 0
            time.sleep(0.1)

    def close(self) -> None:
        """Stop it as a user would."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        """End it and all its processes at once."""
        self._process.kill()
        self._process.wait()
        for pid in _engine_pids(self.port):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
        self._log.close()

    def _wait_ready(self) -> dict[str, str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ready "):
                return dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))
        self._process.wait()
        log = Path(self._log.name).read_text(errors="replace").splitlines()[-30:]
        raise AssertionError("SGLang did not start:\n" + "\n".join(line[:300] for line in log))

    def _read_on(self) -> None:
        assert self._process.stdout is not None
        for _ in self._process.stdout:
            pass


def _engine_pids(port: int) -> list[int]:
    """The engine, which outlives a killed `lmc serve`, leads a process group of its own; its port tells it."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"sglang.launch_server" in words and str(port).encode() in words:
                pids.append(int(entry.name))
    return pids


def _nested(settings: dict[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, value in settings.items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            child = node.setdefault(part, {})
            assert isinstance(child, dict)
            node = child
        node[leaf] = value
    return tree
