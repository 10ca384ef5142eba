"""Host memory beside LMCache's server mode: python -m benchmarks.vs_lmcache [--out reports/vs-lmcache].

Both store prompts of 134 MB of KV and load them again, by turns in one run: LMCache through the server and the client that it ships, lmc
through a request's whole way (hash, look up, plan, copy, report). LMCache is installed into an environment of its own, which takes minutes
the first time. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.host_path import CHUNK_TOKENS, HostPath, Shape
from lmc.bench.machine import describe_hardware, describe_software
from lmc.report import (
    COLORS,
    Column,
    Figure,
    Report,
    Section,
    Table,
    new_axes,
    print_table,
    report_markdown,
    to_figure,
    to_json,
    write_file,
    write_pictures,
)
from tests import services

VERSION = "0.5.6"
TOKENS = 4096
SHAPES = (Shape("16-token bf16 blocks", 16, 2), Shape("128-token fp32 blocks", 128, 4))
SHARED = SHAPES[0]  # what LMCache is measured with
PEER_BAR, MEMCPY_BAR = 4.0, 0.9
SLAB_REQUESTS = 8
WARM_UP = 14  # requests until LMCache's pool of 2 GB, or the slab, has been filled once


@dataclass(frozen=True)
class Row:
    what: str
    direction: str
    lmc: float  # GB/s
    memcpy: float
    share: float  # of memcpy; median of the turns
    peer: float | None = None

    @property
    def times(self) -> float | None:
        return self.lmc / self.peer if self.peer else None

    @property
    def reached(self) -> bool:
        return self.share >= MEMCPY_BAR and (self.times is None or self.times >= PEER_BAR)


def install(venv: Path) -> Path:
    """The folder of LMCache's commands."""
    commands = venv / "bin"
    if not (commands / "lmcache").exists():
        print(f"installing LMCache {VERSION} into {venv} (a few minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        index = os.environ.get("TORCH_CPU_INDEX")
        pip = [commands / "python", "-m", "pip", "install", "-q", *(["--extra-index-url", index] if index else [])]
        subprocess.run([*pip, "-r", Path(__file__).with_name("lmcache.txt")], check=True)
        subprocess.run([*pip, "--no-deps", f"lmcache=={VERSION}"], check=True)
    return commands


class Peer:
    """LMCache's server, and its own benchmark client."""

    def __init__(self, commands: Path, folder: Path, rpc: int, http: int) -> None:
        self._commands, self._folder = commands, folder
        self._rpc, self._http = f"tcp://{services.LOCAL}:{rpc}", f"http://{services.LOCAL}:{http}"
        self._served = 0

    def serve(self, requests: int) -> tuple[float, float, float]:
        """Median seconds of a store, a load and a lookup of that many new prompts, in the transfer mode that is quickest on a CPU."""
        out = self._folder / "result.json"
        shape = f"(2,{2 * TOKENS // SHARED.block_tokens},{SHARED.block_tokens},{SHARED.heads},{SHARED.head_size}):bfloat16:{SHARED.layers}"
        command = [self._commands / "lmcache", "bench", "server", "--rpc-url", self._rpc, "--url", self._http]
        command += ["--mode", "cpu", "--transfer-mode", "lmcache_driven", "--num-tokens", str(TOKENS)]
        command += ["--kvcache-shape-spec", shape, "--num-blocks", str(2 * TOKENS // SHARED.block_tokens)]
        command += ["--start", str(self._served), "--end", str(self._served + requests), "--interval", "0.05"]
        command += ["--format", "json", "--output", out, "-q"]
        self._served += requests
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=self._folder)
        if done.returncode or not out.exists():
            raise SystemExit(f"LMCache's client failed: {(done.stderr or done.stdout)[-2000:]}")
        found = json.loads(out.read_text())["metrics"]
        out.unlink()
        if found["results"]["checksum_ok"] != requests:
            raise SystemExit(f"LMCache gave back other bytes than were stored: {found['results']}")
        sections = ("cold_store", "warm_retrieve", "warm_lookup")
        store, load, lookup = (found[name][f"{name}_p50"] / 1e3 for name in sections)
        return store, load, lookup


@contextmanager
def server(commands: Path, folder: Path) -> Iterator[Peer]:
    rpc, http = services.free_port(), services.free_port()
    command = [commands / "lmcache", "server", "--host", services.LOCAL, "--port", str(rpc)]
    command += ["--http-host", services.LOCAL, "--http-port", str(http), "--l1-size-gb", "2"]
    command += ["--chunk-size", str(CHUNK_TOKENS), "--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    log = folder / "server.log"
    environment = os.environ | {"LMCACHE_TRACK_USAGE": "false"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=environment)
        try:
            services.wait_until(
                lambda: process.poll() is not None or _answers(f"http://{services.LOCAL}:{http}"), "LMCache", 90
            )
            if process.poll() is not None:
                raise SystemExit(f"LMCache's server ended: {log.read_text()[-2000:]}")
            yield Peer(commands, folder, rpc, http)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def measure(peer: Peer, rounds: int, requests: int) -> tuple[list[Row], float]:
    """Rows of the shape that both serve, and LMCache's lookup in seconds."""
    path = HostPath(SHARED, TOKENS, SLAB_REQUESTS)
    for _ in range(WARM_UP):
        path.turn()
    peer.serve(WARM_UP)
    times: list[list[float]] = [[], []]
    limits: list[float] = []
    peers: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        peers.append(peer.serve(requests))
        time.sleep(0.5)  # its client's processes are gone
        for _ in range(requests):
            for found, seconds in zip(times, path.turn(), strict=True):
                found.append(seconds)
            limits.append(path.memcpy())
    path.close()
    theirs = [statistics.median(values) for values in zip(*peers, strict=True)]
    return rows(SHARED, path.num_bytes, times, limits, theirs[:2]), theirs[2]


def measure_alone(shape: Shape, turns: int) -> list[Row]:
    path = HostPath(shape, TOKENS, SLAB_REQUESTS)
    times: list[list[float]] = [[], []]
    limits: list[float] = []
    for turn in range(WARM_UP + turns):
        seconds, limit = path.turn(), path.memcpy()
        if turn >= WARM_UP:
            times[0].append(seconds[0])
            times[1].append(seconds[1])
            limits.append(limit)
    path.close()
    return rows(shape, path.num_bytes, times, limits, None)


def rows(
    shape: Shape, size: int, times: list[list[float]], limits: list[float], theirs: list[float] | None
) -> list[Row]:
    limit = statistics.median(limits)
    return [
        Row(
            shape.name,
            direction,
            size / statistics.median(seconds) / 1e9,
            size / limit / 1e9,
            statistics.median(bare / ours for bare, ours in zip(limits, seconds, strict=True)),
            size / theirs[number] / 1e9 if theirs else None,
        )
        for number, (direction, seconds) in enumerate(zip(("store", "load"), times, strict=True))
    ]


def figure(found: list[Row]) -> Figure:
    picture, (axis,) = new_axes()
    both = [row for row in found if row.peer is not None]
    for number, (name, values) in enumerate(
        {
            f"LMCache {VERSION}, server mode": [row.peer or 0.0 for row in both],
            "memcpy": [row.memcpy for row in both],
            "lmc": [row.lmc for row in both],
        }.items()
    ):
        places = [index + (number - 1) * 0.27 for index in range(len(both))]
        axis.bar(places, values, 0.25, label=name, color=COLORS[number])
    axis.set_xticks(range(len(both)), [row.direction for row in both])
    axis.set_ylabel("GB/s")
    axis.legend(frameon=False)
    return to_figure(picture, "134 MB of KV in host memory", "Medians; higher is better.")


def as_report(found: list[Row], lookup: float, rounds: int, requests: int) -> Report:
    columns = [
        Column("blocks"),
        Column("direction"),
        Column("lmc", "GB/s"),
        Column("LMCache", "GB/s"),
        Column("memcpy", "GB/s"),
    ]
    columns += [Column("lmc/LMCache"), Column("lmc/memcpy"), Column("bars reached")]
    table = Table(
        "Store and load",
        columns,
        [[row.what, row.direction, row.lmc, row.peer, row.memcpy, row.times, row.share, row.reached] for row in found],
        f"Bars: {PEER_BAR:g} times LMCache, {MEMCPY_BAR:g} of memcpy. {rounds} rounds of {requests} prompts, by turns; medians.",
    )
    text = (
        f"Prompts of {TOKENS:,} tokens in chunks of {CHUNK_TOKENS}. lmc's time is a request's whole way in the engine's process: hash, "
        "look up, plan, copy, report; its blocks are in random order. LMCache's is what its own client (bench server, mode cpu, transfer "
        f"mode lmcache_driven) says of a store and a retrieve through its server; a lookup, {lookup * 1e3:.1f} ms, comes on top. Both "
        "checked all bytes, and their memory had been filled once before."
    )
    metadata = (
        {"command": "python -m benchmarks.vs_lmcache " + " ".join(sys.argv[1:])}
        | describe_hardware()
        | describe_software()
    )
    metadata["peer"] = f"LMCache {VERSION}"
    return Report("lmc beside LMCache on a CPU", text, [Section("Result", items=[figure(found), table])], metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).parents[1]
    parser.add_argument(
        "--venv",
        type=Path,
        default=Path(os.environ.get("LMC_VENV", here / ".venvs")) / "lmcache",
        help="where LMCache is, or is put",
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=5, help="prompts in each round")
    parser.add_argument("--out", type=Path, help="write report.md, results.json and a picture here")
    options = parser.parse_args()
    commands = install(options.venv.absolute())
    with tempfile.TemporaryDirectory() as folder, server(commands, Path(folder)) as peer:
        found, lookup = measure(peer, options.rounds, options.requests)
    for shape in SHAPES[1:]:
        found += measure_alone(shape, options.rounds * options.requests)
    report = as_report(found, lookup, options.rounds, options.requests)
    print_table(next(item for item in report.sections[0].items if isinstance(item, Table)))
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(
            options.out / "results.json", to_json({"rows": found, "lookup_s": lookup, "metadata": report.metadata})
        )
        write_pictures(options.out, report)
    return 0 if all(row.reached for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
