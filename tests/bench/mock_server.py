"""An OpenAI-compatible server that only pretends: exact prefix caching by 128-token blocks, metrics, a stream per request.

Takes the arguments of `lmc serve`. Faults and speed come from arguments after `--`: --us-per-token N, --fault NAME.
Faults: wrong-token, tie, wrong-hits, wrong-tier, http-500, die, stall, no-usage, warm (starts with a warm counter),
bad-tokenizer (counts a token more), other-vocabulary, no-start.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml
from aiohttp import web

BLOCK = 128
TOKEN_BYTES = 1000  # loaded at 1 GB/s
LOOKUP_S = 0.002
CLOCK_AHEAD_S = 1000.0  # its clock is another one
VOCAB = 49000


class Cache:
    """Block chains seen so far, in memory and perhaps in a file that survives."""

    def __init__(self, file: Path | None) -> None:
        self.memory: set[str] = set()
        self.file = file
        self.disk: set[str] = set(json.loads(file.read_text())) if file is not None and file.is_file() else set()

    def lookup(self, tokens: list[int]) -> tuple[int, int]:
        """(host tokens, disk tokens) of the prefix hit; the last token is always computed. Stores the prompt."""
        host = disk = 0
        if self.file is not None and self.file.is_file():
            self.disk |= set(json.loads(self.file.read_text()))  # another instance may have written
        chain = hashlib.sha256()
        hitting = True
        for index in range(len(tokens) // BLOCK):
            chain.update(json.dumps(tokens[index * BLOCK : (index + 1) * BLOCK]).encode())
            name = chain.hexdigest()
            if (index + 1) * BLOCK >= len(tokens):
                hitting = False
            if hitting and name in self.memory:
                host += BLOCK
            elif hitting and name in self.disk:
                disk += BLOCK
            else:
                hitting = False
            self.memory.add(name)
            self.disk.add(name)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(sorted(self.disk)))
        return host, disk


class Mock:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        config = yaml.safe_load(args.config.read_text()) if args.config else None
        self.cache: Cache | None = None
        if config is not None:
            path = (config.get("disk") or {}).get("path")
            self.cache = Cache(Path(path) / "index.json" if path else None)
        self.own = Cache(None) if "--enable-prefix-caching" in args.rest else None
        self.kept: list[dict[str, object]] = []
        self.counts = dict.fromkeys(("queries", "device", "lookups", "host", "disk", "served"), 0)
        if args.fault == "warm":
            self.counts["queries"] = 512

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.args.model}]})

    async def metrics(self, request: web.Request) -> web.Response:
        c, own = self.counts, self.own is not None
        lines = [
            f'vllm:cache_config_info{{block_size="{BLOCK}",enable_prefix_caching="{own}",num_gpu_blocks="100000"}} 1.0',
            f"vllm:prefix_cache_queries_total {c['queries']}",
            f"vllm:prefix_cache_hits_total {c['device']}",
        ]
        if self.cache is not None:
            lines += [
                f"lmc_lookup_tokens_total {c['lookups']}",
                f'lmc_hit_tokens_total{{tier="host"}} {c["host"]}',
                f'lmc_hit_tokens_total{{tier="disk"}} {c["disk"]}',
                "lmc_pending_operations 0",
                f'lmc_slots_used{{tier="host"}} {len(self.cache.memory)}',
                f'lmc_slots_used{{tier="disk"}} {len(self.cache.disk)}',
                'lmc_slots{tier="host"} 100000',
                'lmc_slots{tier="disk"} 100000',
            ]
        return web.Response(text="\n".join(lines) + "\n")

    async def spans(self, request: web.Request) -> web.Response:
        if self.cache is None:
            return web.Response(status=404)
        kept = [] if request.query.get("newest") == "0" else self.kept
        return web.json_response({"now_s": time.monotonic() + CLOCK_AHEAD_S, "requests": kept})

    async def tokenize(self, request: web.Request) -> web.Response:
        if self.args.fault != "other-vocabulary":
            return web.Response(status=404)
        return web.json_response({"tokens": [1, 2, 3]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt: list[int] = body["prompt"]
        self.counts["served"] += 1
        if not request.headers.get("X-Request-Id", "").startswith("before/"):
            if self.args.fault == "http-500":
                return web.Response(status=500, text="out of luck")
            if self.args.fault == "die" and self.counts["served"] > 4:
                os._exit(3)
            if self.args.fault == "stall":
                await asyncio.sleep(3600)
        asked = time.monotonic() + CLOCK_AHEAD_S
        cached = self.hit(prompt)
        self.kept.append(
            {
                "request": f"cmpl-{request.headers['X-Request-Id']}-0-0123abcd",
                "tokens": len(prompt),
                "hit_tokens": {"device": 0, "host": cached},
                "miss": "never_stored" if cached < (len(prompt) - 1) // BLOCK * BLOCK else None,
                "asked_s": asked,
                "answered_s": asked + LOOKUP_S,
                "admitted_s": asked + LOOKUP_S,
                "load_bytes": cached * TOKEN_BYTES,
                "load_seconds": cached * TOKEN_BYTES / 1e9,
            }
        )
        await asyncio.sleep(self.args.us_per_token * 1e-6 * (len(prompt) - cached))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        seed = hashlib.sha256(json.dumps(prompt).encode()).digest()
        for index in range(body["max_tokens"]):
            token, gap = seed[index % 32], 0.5
            if self.args.fault in ("wrong-token", "tie") and index == 1:
                token += 1
            if index == 1 and prompt[0] % 2 == 0:
                gap = 0.0005
            logprobs = {
                "tokens": [f"token_id:{token}"],
                "top_logprobs": [{f"token_id:{token}": -0.1, "token_id:49001": -0.1 - gap}],
            }
            choice = {"index": 0, "text": "x", "logprobs": logprobs if "logprobs" in body else None}
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(0)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]}
        if self.args.fault == "bad-tokenizer":
            usage["prompt_tokens"] += 1
        if self.args.fault != "no-usage":
            usage["prompt_tokens_details"] = {"cached_tokens": cached}  # type: ignore[assignment]
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def hit(self, prompt: list[int]) -> int:
        device = host = disk = 0
        if self.own is not None:
            self.counts["queries"] += len(prompt)
            device, _ = self.own.lookup(prompt)
            self.counts["device"] += device
        if self.cache is not None:
            self.counts["lookups"] += len(prompt)
            host, disk = self.cache.lookup(prompt)
            if self.args.fault == "wrong-hits":
                host = max(0, host - BLOCK)
            if self.args.fault == "wrong-tier":
                host, disk = disk, host
            self.counts["host"] += host
            self.counts["disk"] += disk
        return device + host + disk


def parse(argv: list[str]) -> argparse.Namespace:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--engine")
    parser.add_argument("--port", type=int)
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--config", type=Path)
    args = parser.parse_args(argv[:split])
    extra = argparse.ArgumentParser(allow_abbrev=False)
    extra.add_argument("--us-per-token", type=float, default=0.0)
    extra.add_argument("--fault", default="")
    known, args.rest = extra.parse_known_args(argv[split + 1 :])
    args.us_per_token, args.fault = known.us_per_token, known.fault
    return args


async def serve(args: argparse.Namespace) -> None:
    if args.fault == "no-start":
        sys.stderr.write("lmc: no room for weights\n")
        sys.exit(1)
    mock = Mock(args)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", mock.models)
    app.router.add_get("/metrics", mock.metrics)
    app.router.add_get("/requests", mock.spans)
    app.router.add_post("/tokenize", mock.tokenize)
    app.router.add_post("/v1/completions", mock.complete)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", args.port).start()
    state = ""
    if args.fault == "no-cache":
        sys.stderr.write("lmc: no room for the host tier\n")
        state = " cache=FAILED (see the log above)"
    sys.stdout.write(f"ready url=http://127.0.0.1:{args.port}/v1{state}\n")
    sys.stdout.flush()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(parse(sys.argv[1:])))
