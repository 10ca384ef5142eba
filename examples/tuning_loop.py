"""The loop from traffic to settings: serve and record, tune on the record, serve what was tuned, and measure it against the prediction.

    python examples/tuning_loop.py --memory 256MiB --disk 1GiB --out loop
    python examples/tuning_loop.py --model MODEL --traffic trace.jsonl --memory 64GiB --out loop -- --max-model-len 8192

Each step is one lmc command, which is printed before it runs. Without --traffic, the traffic is made up: sessions that share a start and
take turns, one request at a time. In production your users are the traffic: keep the first command running for a day, and go on with its
record.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas
import yaml

TURNS, SESSIONS, BLOCK_TOKENS, GAP_MS = 3, 6, 512, 2000
START_SECONDS = 900


def main() -> None:
    asked, engine = arguments()
    out = asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    record, tuned, cost = out / "record.jsonl", out / "lmc.yaml", out / "cost.yaml"
    record.unlink(missing_ok=True)
    traffic = asked.traffic or made_up_traffic(out / "traffic.jsonl")
    bench = ["--model", asked.model, "--output-tokens", str(asked.output_tokens)]
    bench += [] if asked.traffic else ["--concurrency", "1"]  # else at the traffic's own times
    serve = ["serve", asked.model, "--port", str(asked.port), "--ready-file", str(out / "ready")]

    # 1. Serve and record. In production this is the service as it is today, with --record.
    options = ["--host-capacity", asked.memory, "--record", str(record)]
    with running([*serve, *options, "--", *engine], out) as (url, metrics):
        many = ["--requests", str(asked.requests)]
        measure(out / "recorded", *bench, "--url", url, "--metrics", metrics, "--trace", str(traffic), *many)
        kv_tokens = own_kv_tokens(url)

    # 2. Tune on the record: settings within the budget, and what they promise.
    options = ["--memory", asked.memory, "--disk", asked.disk, "--disk-path", str(out / "disk")]
    promised = json.loads(lmc("sim", "tune", str(record), *options, "-o", str(tuned), "--json"))

    # 3. Predict the hits of each tier, the engine's own prefix cache among them.
    cost.write_text(yaml.safe_dump(cost_model(out / "recorded", kv_tokens)))
    predicted = json.loads(lmc("sim", "replay", str(record), "--config", str(tuned), "--cost", str(cost), "--json"))

    # 4. Serve what was tuned, and 5. measure it on the same requests.
    with running([*serve, "--config", str(tuned), "--", *engine], out) as (url, metrics):
        many = ["--requests", str(sum(1 for _ in record.open()) - 1)]
        arm = measure(out / "tuned", *bench, "--url", url, "--metrics", metrics, "--trace", str(record), *many)
    show(out, promised, predicted, arm)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--traffic", type=Path, help="a trace with block ids, such as lmc's record or Mooncake's")
    parser.add_argument("--requests", type=int, default=SESSIONS * TURNS, help="of the traffic")
    parser.add_argument("--output-tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--disk", default="0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=Path("loop"))
    parser.add_argument("engine", nargs="*", help="arguments for the engine, after --")
    asked = parser.parse_args()
    return asked, asked.engine


def made_up_traffic(file: Path) -> Path:
    """Sessions with one start in common; each turn adds a block to its session, and all sessions take turns."""
    with file.open("w") as lines:
        for turn in range(TURNS):
            for session in range(SESSIONS):
                own = [1 + session * TURNS + block for block in range(turn + 1)]
                request = {"timestamp": (turn * SESSIONS + session) * GAP_MS, "output_length": 4, "hash_ids": [0, *own]}
                request["input_length"] = BLOCK_TOKENS * (turn + 2)
                lines.write(json.dumps(request) + "\n")
    return file


@contextmanager
def running(arguments: list[str], out: Path) -> Iterator[tuple[str, str]]:
    """lmc serve until it is no longer needed; gives the addresses of its API and of its metrics."""
    ready = out / "ready"
    print("$ lmc", shlex.join(arguments), "&", flush=True)
    with (out / "engine.log").open("a") as log:
        server = subprocess.Popen([sys.executable, "-m", "lmc", *arguments], stdout=log, stderr=log)
    try:
        end = time.monotonic() + START_SECONDS
        while not ready.exists():
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"the engine did not start; see {out / 'engine.log'}")
            time.sleep(0.2)
        line = ready.read_text()
        print(line, end="", flush=True)
        [addresses] = re.findall(r"url=(\S+) metrics=(\S+)", line)
        yield addresses
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def lmc(*arguments: str) -> str:
    print("$ lmc", shlex.join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "lmc", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"lmc {arguments[0]} failed with exit code {done.returncode}")
    return done.stdout


def measure(out: Path, *arguments: str) -> dict[str, Any]:
    """The results of lmc bench for one server. Where it calls them INVALID, its reasons are printed and the hits are used all the same."""
    command = ["bench", *arguments, "--out", str(out), "--quiet"]
    print("$ lmc", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "lmc", *command], check=False)
    arm: dict[str, Any] = json.loads((out / "results.json").read_text())["arms"][0]
    for problem in arm["problems"]:
        print(f"INVALID: {problem}")
    return arm


def own_kv_tokens(url: str) -> int:
    """Tokens that the engine's own KV space holds, from vLLM's metrics."""
    page = urllib.request.urlopen(url.removesuffix("/v1") + "/metrics").read().decode()
    [info] = re.findall(r"^vllm:cache_config_info\{(.*)\}", page, re.MULTILINE)
    sizes = dict(re.findall(r'(\w+)="([^"]*)"', info))
    return int(sizes["num_gpu_blocks"]) * int(sizes["block_size"])


def cost_model(folder: Path, kv_tokens: int) -> dict[str, Any]:
    """The engine as the first run saw it: seconds for each token that was computed, and the room in its own KV space."""
    seen = pandas.read_parquet(folder / "requests.parquet")
    computed = (seen["prompt_tokens"] - seen["cached_tokens"]).sum()
    token_s = seen["service_ttft_ms"].sum() / 1e3 / computed
    return {
        "prefill": {"token": f"{token_s * 1e6:.3f}us"},
        "tiers": {"host": {"bandwidth": "2GB/s"}, "disk": {"bandwidth": "500MB/s", "latency": "1ms"}},
        "engine": {"kv_tokens": kv_tokens, "max_num_seqs": 16},
    }


def show(out: Path, promised: dict[str, Any], predicted: dict[str, Any], arm: dict[str, Any]) -> None:
    """Predicted beside measured, in % of the prompt tokens."""
    requests = pandas.read_parquet(out / "tuned" / "requests.parquet").sort_values("intended_s")
    second = requests.iloc[len(requests) // 2 :]
    low, high = (100 * bound for bound in promised["interval"])
    lines = [("hits of the second half, by lmc sim tune", 100 * promised["expected_hit_rate"], share(second))]
    for tier in {**predicted["hit_tokens"], **arm["hit_tokens_by_tier"]}:
        ours = 100 * predicted["hit_tokens"].get(tier, 0) / predicted["total_tokens"]
        lines.append((f"hits in {tier}, by lmc sim replay", ours, of(arm["hit_tokens_by_tier"].get(tier, 0), arm)))
    total = 100 * sum(predicted["hit_tokens"].values()) / predicted["total_tokens"]
    lines.append(("hits in all tiers, by lmc sim replay", total, of(arm["hit_tokens"], arm)))
    print(f"\n{'% of prompt tokens':<42}{'predicted':>10}{'measured':>10}")
    for what, ours, measured in lines:
        print(f"{what:<42}{ours:>10.1f}{measured:>10.1f}")
    print(f"95 % interval of the promise: {low:.1f} to {high:.1f}")
    print(f"settings: {out / 'lmc.yaml'}; reports: {out / 'recorded'}, {out / 'tuned'}")


def share(requests: pandas.DataFrame) -> float:
    return float(100 * requests["cached_tokens"].sum() / requests["prompt_tokens"].sum())


def of(tokens: int, arm: dict[str, Any]) -> float:
    return 100 * tokens / int(arm["prompt_tokens"])


if __name__ == "__main__":
    main()
