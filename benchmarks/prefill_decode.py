"""Prefill and decode split over two engines and one Redis, through examples/prefill_decode_router.py, on one core each.

    python -m benchmarks.prefill_decode --out reports/prefill-decode

First long prompts go through the router: the prefill engine computes and stores them, the decode engine loads them and answers. The same
prompts are then computed by the decode engine alone, which gives the time to first token without the split and the right answers. Then an
answer is streamed by the decode engine while a long prompt arrives, once through the router and once at the decode engine itself: how long
does the stream stand still? Exits with 1 when an answer differs or the decode engine computed what it could have loaded.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.replicas import BYPASS, ENGINE, check_answers, computed, tool_prompts
from lmc.bench.arms import Launcher, Server
from lmc.bench.client import Outcome, Target, complete, new_session
from lmc.bench.machine import describe_hardware, describe_software
from lmc.bench.prompts import Request, random_tokens
from lmc.bench.redis_server import started_redis
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Arm
from lmc.errors import RunError
from lmc.model import EMBEDDED, resolve_model
from lmc.report import Cell, Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from lmc.serve.ports import free_port

ROUTER = Path(__file__).parents[1] / "examples" / "prefill_decode_router.py"
LOCAL = "127.0.0.1"
CHUNK_TOKENS = 128
PROMPTS, LONGEST, OUTPUT_TOKENS = 5, 1500, 8
STREAM_PROMPT, STREAM_OUTPUT = 60, 160
INTO_THE_STREAM_S = 1.0
SPLIT, ALONE = "through the router", "at the decode engine itself"


@dataclass(frozen=True)
class Result:
    split: list[Outcome]
    alone: list[Outcome]
    gaps_s: dict[str, list[float]]  # the longest pause of each stream while a long prompt arrives
    usual_gap_s: float  # the median pause between two tokens
    wrong: list[str]


@asynccontextmanager
async def router(prefill: Server, decode: Server) -> AsyncIterator[str]:
    """Its address. Raises RunError when it does not answer."""
    port = free_port(LOCAL)
    command = [
        sys.executable,
        str(ROUTER),
        "--prefill",
        prefill.root_url,
        "--decode",
        decode.root_url,
        "--port",
        str(port),
    ]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                _, writer = await asyncio.open_connection(LOCAL, port)
                writer.close()
                break
            except OSError:
                await asyncio.sleep(0.1)
        else:
            raise RunError(f"{ROUTER} does not listen on port {port}")
        yield f"http://{LOCAL}:{port}/v1"
    finally:
        process.terminate()
        await process.wait()


async def longest_gap(
    http: aiohttp.ClientSession, stream: Target, request: Request, long: Target, prompt: Request
) -> list[float]:
    """Pauses between the stream's tokens while the long prompt is answered."""
    streaming = asyncio.create_task(complete(http, stream, request, "stream", time.perf_counter()))
    await asyncio.sleep(INTO_THE_STREAM_S)
    beside = await complete(http, long, prompt, "beside", time.perf_counter())
    outcome = await streaming
    if not (outcome.ok and beside.ok):
        raise RunError(f"the stream ended as {outcome.status}, the long prompt as {beside.status}")
    return [after - before for before, after in itertools.pairwise(outcome.token_times_s)]


async def run(rounds: int, model: str, scratch: Path) -> Result:
    folder = resolve_model(model)
    tokenizer = ModelTokenizer.load(folder)
    prompts = tool_prompts(folder, PROMPTS, 1, LONGEST, OUTPUT_TOKENS)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(started_redis(scratch))
        cache = {"host": {"capacity": "1GiB"}, "redis": {"url": redis}}
        launcher = Launcher(model, ENGINE, scratch)
        engines: list[Server] = []
        for core, name in enumerate(("prefill", "decode")):
            arm = Arm(cache=cache, env={"VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"})
            engines += await stack.enter_async_context(launcher.started(name, arm))
        prefill, decode = engines
        address = await stack.enter_async_context(router(prefill, decode))
        through = Target(address, decode.model)
        itself = Target(decode.base_url, decode.model, extra=BYPASS)
        http = await stack.enter_async_context(new_session(through))

        def fresh(tokens: int, output: int, *name: str | int) -> Request:
            return Request("fresh", 0, 0, random_tokens(tokenizer, tokens, "prefill-decode", *name), output)

        for target in (through, itself):  # warm up
            await complete(http, target, fresh(600, 4, "warm-up"), "warm-up", time.perf_counter())
        split = [await complete(http, through, prompt, prompt.id, time.perf_counter()) for prompt in prompts]
        for outcome in split:
            if not outcome.ok:
                raise RunError(f"{outcome.request.id} through the router: {outcome.status} {outcome.cause}")
        alone = [await computed(http, decode, prompt) for prompt in prompts]
        gaps: dict[str, list[float]] = {SPLIT: [], ALONE: []}
        usual: list[float] = []
        for number in range(rounds):
            for name, target in ((SPLIT, through), (ALONE, itself)):
                stream = fresh(STREAM_PROMPT, STREAM_OUTPUT, "stream", name, number)
                long = fresh(LONGEST, 1, "long", name, number)
                found = await longest_gap(http, itself, stream, target, long)
                gaps[name].append(max(found))
                usual += found
    wrong = check_answers(split, alone).differences
    return Result(split, alone, gaps, float(np.median(usual)), wrong)


def ttft_s(outcomes: Sequence[Outcome]) -> float:
    return float(np.median([(outcome.first_s or np.nan) - outcome.sent_s for outcome in outcomes]))


def computed_in_vain(split: Sequence[Outcome]) -> int:
    """Tokens that the decode engine computed although the prefill engine had stored their chunk."""
    stored = [(len(outcome.request.prompt) - 1) // CHUNK_TOKENS * CHUNK_TOKENS for outcome in split]
    return sum(stored) - sum(outcome.cached_tokens or 0 for outcome in split)


def as_report(result: Result, command: str) -> Report:
    tokens = sum(len(outcome.request.prompt) for outcome in result.split)
    loaded = sum(outcome.cached_tokens or 0 for outcome in result.split)
    split, alone = ttft_s(result.split), ttft_s(result.alone)
    paused = {name: float(np.median(gaps)) for name, gaps in result.gaps_s.items()}
    first = Table(
        "Prompts through the router",
        [Column("figure"), Column("value"), Column("unit")],
        [
            ["prompts", len(result.split), ""],
            ["their tokens", tokens, "tokens"],
            ["of these loaded by the decode engine", loaded, "tokens"],
            ["computed there although stored", computed_in_vain(result.split), "tokens"],
            ["answers that differ from those without the cache", len(result.wrong), ""],
            ["TTFT p50 through the router", split * 1e3, "ms"],
            ["TTFT p50 of the decode engine alone", alone * 1e3, "ms"],
            ["ratio", split / alone, ""],
        ],
        "Through the router the prompt is computed once, on the prefill engine's core, and moves through Redis: the split costs a "
        "little time to first token. Both engines have one core.",
    )
    rows: list[list[Cell]] = [
        [name, len(result.gaps_s[name]), 1e3 * gap, gap / result.usual_gap_s] for name, gap in paused.items()
    ]
    second = Table(
        "A stream while a long prompt arrives",
        [
            Column("the long prompt goes"),
            Column("streams"),
            Column("longest pause", "ms", 0),
            Column("in usual pauses", "", 1),
        ],
        rows,
        f"Medians; a long prompt has {LONGEST:,} tokens. The usual pause between two tokens is {1e3 * result.usual_gap_s:.0f} ms.",
    )
    summary = (
        "What a split is for: the streams of the decode engine go on while another engine computes long prompts. "
        f"The longest pause is {paused[SPLIT] / paused[ALONE]:.2f} of what it is without the split."
    )
    metadata = {"command": command} | describe_hardware() | describe_software()
    sections = [Section("Prompts", "", [first]), Section("Streams", "", [second])]
    return Report("Prefill and decode on two engines", summary, sections, metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="streams of each kind")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--scratch", type=Path, help="keep logs here")
    parser.add_argument("--out", type=Path, default=Path("reports/prefill-decode"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmc-split-") as folder:
        result = asyncio.run(run(options.rounds, options.model, options.scratch or Path(folder)))
    report = as_report(result, f"python -m benchmarks.prefill_decode --rounds {options.rounds}")
    for section in report.sections:
        for table in section.items:
            assert isinstance(table, Table)
            print_table(table)
    for wrong in result.wrong:
        print(wrong, file=sys.stderr)
    write_file(options.out / "report.md", report_markdown(report))
    figures = {
        "ttft_s": {SPLIT: ttft_s(result.split), ALONE: ttft_s(result.alone)},
        "cached_tokens": [outcome.cached_tokens for outcome in result.split],
        "prompt_tokens": [len(outcome.request.prompt) for outcome in result.split],
        "longest_gaps_s": result.gaps_s,
        "usual_gap_s": result.usual_gap_s,
        "wrong": result.wrong,
    }
    write_file(options.out / "results.json", to_json({"figures": figures, "metadata": report.metadata}))
    return int(bool(result.wrong) or computed_in_vain(result.split) > 0)


if __name__ == "__main__":
    sys.exit(main())
