"""How fast the client of lmc bench is: python -m benchmarks.bench_client [--out reports/bench-client].

A mock server in its own process streams tokens over loopback, each in its own write, as fast as it is read. What counts is the client's own
CPU time, so that the server's core and other work on the machine don't: tokens and requests per second of one core. Send lag is wall time.
Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import uvloop

from lmc.bench.client import Outcome, Target
from lmc.bench.dialect import Dialect
from lmc.bench.load import Measured, run_load
from lmc.bench.machine import describe_hardware, describe_software
from lmc.bench.prompts import Request
from lmc.bench.schedule import Plan, Planned
from lmc.bench.selfcheck import check_client
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file

EVENT = b'data: {"id":"cmpl-1","object":"text_completion","model":"mock","choices":[{"index":0,"text":" word","logprobs":null}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class MockServer(asyncio.Protocol):
    """Just enough HTTP: reads a request, streams max_tokens events, one write each, and a usage event."""

    def __init__(self) -> None:
        self.received = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own class

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, gap, body = self.received.partition(b"\r\n\r\n")
        if not gap:
            return
        lowered = head.lower()
        length = int(lowered.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) < length:
            return
        self.received = body[length:]
        tokens = int(body[:length].split(b'"max_tokens":')[1].split(b",")[0])
        assert self.transport is not None
        self.transport.write(HEAD)
        self.stream(tokens, tokens)

    def stream(self, left: int, total: int) -> None:
        """One token per turn of the loop: the streams of all connections interleave."""
        assert self.transport is not None
        if self.transport.is_closing():
            return
        if left:
            self.transport.write(_chunk(EVENT))
            asyncio.get_running_loop().call_soon(self.stream, left - 1, total)
            return
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":%d}}\n\n' % total
        self.transport.write(_chunk(usage) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def serve(port: int) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(MockServer, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(run())


@dataclass(frozen=True)
class Result:
    name: str
    bar: str
    value: float
    unit: str
    met: bool
    values: list[float]


def plan(count: int, tokens: int, concurrency: int | None = None, rate: float | None = None) -> Plan:
    prompt = np.arange(8, dtype=np.int32)
    items = [
        Planned(Request("load", index, 0, prompt, tokens), None if rate is None else index / rate, None)
        for index in range(count)
    ]
    units = None if rate is not None else [[index] for index in range(count)]
    return Plan(items, units, concurrency, rate)


async def run(load: Plan, port: int) -> tuple[Measured, float]:
    """The load and the client's CPU seconds."""

    async def on_done(outcome: Outcome) -> bool:
        if not outcome.ok:
            sys.exit(f"a request failed: {outcome.status}: {outcome.cause}")
        return True

    target = Target(f"http://127.0.0.1:{port}/v1", "mock", 60.0, dialect=Dialect(token_ids=False))
    began = time.process_time()
    measured = await run_load(load, [target], "bench", on_done)
    return measured, time.process_time() - began


async def contest(port: int, rounds: int) -> list[Result]:
    await run(plan(200, 8, concurrency=16), port)  # connections, imports, caches
    tokens, requests, lags = [], [], []
    for _ in range(rounds):
        measured, cpu = await run(plan(600, 64, concurrency=64), port)
        assert sum(outcome.output_tokens for outcome in measured.outcomes) == 600 * 64
        tokens.append(600 * 64 / cpu)
        measured, cpu = await run(plan(2000, 1, concurrency=64), port)
        requests.append(2000 / cpu)
        measured, _ = await run(plan(2000, 1, rate=500.0), port)
        lags.append(check_client([measured]).send_lag_p99_ms)
    return [
        _at_least("streamed tokens, 64 a request", 40_000, "tokens/s of one core", tokens),
        _at_least("requests of one token", 1_500, "requests/s of one core", requests),
        _at_most("send lag p99 at 500 requests/s", 5.0, "ms", lags),
    ]


def _at_least(name: str, bar: float, unit: str, values: Sequence[float]) -> Result:
    value = statistics.median(values)
    return Result(name, f">= {bar:,.0f}", value, unit, value >= bar, list(values))


def _at_most(name: str, bar: float, unit: str, values: Sequence[float]) -> Result:
    value = statistics.median(values)
    return Result(name, f"<= {bar:g}", value, unit, value <= bar, list(values))


def table(results: Sequence[Result], rounds: int) -> Table:
    columns = [
        Column("what"),
        Column("median", "", 1),
        Column("unit"),
        Column("bar"),
        Column("met"),
        Column("worst", "", 1),
    ]
    rows = [
        [r.name, r.value, r.unit, r.bar, "yes" if r.met else "NO", (min if ">=" in r.bar else max)(r.values)]
        for r in results
    ]
    return Table("Client of lmc bench", columns, rows, f"{rounds} rounds; 64 connections; one process.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    server.start()
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            if time.monotonic() > deadline:
                sys.exit("the mock server did not start")
            time.sleep(0.05)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(contest(port, options.rounds))
    server.terminate()
    shown = table(results, options.rounds)
    print_table(shown)
    if options.out:
        machine = {**describe_hardware(), **describe_software()}
        command = f"python -m benchmarks.bench_client --rounds {options.rounds} --out {options.out}"
        page = Report("The client of lmc bench", command, [Section("Bars", "", [shown])], machine)
        write_file(options.out / "results.json", to_json({"results": [asdict(r) for r in results], "machine": machine}))
        write_file(options.out / "report.md", report_markdown(page))
    sys.exit(not all(result.met for result in results))


if __name__ == "__main__":
    main()
