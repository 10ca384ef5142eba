"""Host memory beside LMCache's server mode: python -m benchmarks.vs_lmcache [--out reports/vs-lmcache].

Both store prompts of 134 MB of KV and load them again, by turns in one run: LMCache through the server and the client that it ships, lmc
through a request's whole way (hash, look up, plan, copy, report), with memory of its own and through an `lmc node`. LMCache is installed
into an environment of its own, which takes minutes the first time. Exit code 1 when a bar is missed.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.host_path import CHUNK_TOKENS, HostPath, Shape
from benchmarks.node_process import node_process
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
PEER_BAR, MEMCPY_BAR, LOOKUP_BAR = 4.0, 0.9, 20.0
SLAB_REQUESTS = 8
NODE = "through a node"
WARM_UP = 14  # requests until LMCache's pool of 2 GB, or the slab, has been filled once


@dataclass(frozen=True)
class Row:
    what: str
    direction: str
    lmc: float  # GB/s
    memcpy: float
    share: float  # of memcpy; median of the turns
    peer: float | None = None
    memcpy_bar: float | None = MEMCPY_BAR

    @property
    def times(self) -> float | None:
        return self.lmc / self.peer if self.peer else None

    @property
    def reached(self) -> bool:
        return self.share >= (self.memcpy_bar or 0.0) and (self.times is None or self.times >= PEER_BAR)


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


@dataclass(frozen=True)
class Lookups:
    """Median seconds of a lookup of a whole prompt, the hash of its tokens included."""

    peer: float
    lmc: float
    node: float

    @property
    def reached(self) -> bool:
        return self.peer / self.node >= LOOKUP_BAR


def measure(peer: Peer, node: Path, rounds: int, requests: int, warm_up: int) -> tuple[list[Row], Lookups]:
    """Rows of the shape that both serve."""
    paths = [HostPath(SHARED, TOKENS, SLAB_REQUESTS), HostPath(SHARED, TOKENS, SLAB_REQUESTS, node)]
    for path in paths:
        for _ in range(warm_up):
            path.turn()
        path.lookups.clear()
    peer.serve(warm_up)
    times: list[list[list[float]]] = [[[], []] for _ in paths]
    limits: list[float] = []
    peers: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        peers.append(peer.serve(requests))
        time.sleep(0.5)  # its client's processes are gone
        for _ in range(requests):
            for path, mine in zip(paths, times, strict=True):
                for found, seconds in zip(mine, path.turn(), strict=True):
                    found.append(seconds)
            limits.append(paths[0].memcpy())
    for path in paths:
        path.close()
    theirs = [statistics.median(values) for values in zip(*peers, strict=True)]
    lookups = Lookups(theirs[2], *(statistics.median(path.lookups) for path in paths))
    found_rows = rows(SHARED, paths[0].num_bytes, times[0], limits, theirs[:2])
    for row in rows(SHARED, paths[0].num_bytes, times[1], limits, theirs[:2]):
        found_rows.append(replace(row, what=f"{row.what}, {NODE}", memcpy_bar=None))
    return found_rows, lookups


def measure_alone(shape: Shape, turns: int, warm_up: int) -> list[Row]:
    path = HostPath(shape, TOKENS, SLAB_REQUESTS)
    times: list[list[float]] = [[], []]
    limits: list[float] = []
    for turn in range(warm_up + turns):
        seconds, limit = path.turn(), path.memcpy()
        if turn >= warm_up:
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
    both = [row for row in found if row.peer is not None and NODE not in row.what]
    for number, (name, values) in enumerate(
        {
            f"LMCache {VERSION}, server mode": [row.peer or 0.0 for row in both],
            "memcpy": [row.memcpy for row in both],
            "lmc": [row.lmc for row in both],
            f"lmc {NODE}": [row.lmc for row in found if NODE in row.what],
        }.items()
    ):
        places = [index + (number - 1.5) * 0.21 for index in range(len(both))]
        axis.bar(places, values, 0.19, label=name, color=COLORS[number])
    axis.set_xticks(range(len(both)), [row.direction for row in both])
    axis.set_ylabel("GB/s")
    axis.legend(frameon=False)
    return to_figure(picture, "134 MB of KV in host memory", "Medians; higher is better.")


def as_report(found: list[Row], lookup: Lookups, rounds: int, requests: int) -> Report:
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
        f"Bars: {PEER_BAR:g} times LMCache; {MEMCPY_BAR:g} of memcpy, not {NODE}. {rounds} round(s) of {requests} prompts; medians.",
    )
    text = (
        f"Prompts of {TOKENS:,} tokens in chunks of {CHUNK_TOKENS}. lmc's time is a request's whole way in the engine's process: hash, "
        "look up, plan, copy, report; its blocks are in random order. LMCache's is what its own client (bench server, mode cpu, transfer "
        f"mode lmcache_driven) says of a store and a retrieve through its server; a lookup comes on top. Both "
        "checked all bytes, and their memory had been filled once before. All share the machine's cores, the node's process too."
    )
    asked = Table(
        "Lookup of a whole prompt",
        [
            Column("LMCache", "ms", 2),
            Column("lmc", "ms", 3),
            Column(f"lmc {NODE}", "ms", 3),
            Column(f"LMCache/lmc {NODE}"),
            Column("reached"),
        ],
        [[lookup.peer * 1e3, lookup.lmc * 1e3, lookup.node * 1e3, lookup.peer / lookup.node, lookup.reached]],
        f"Bar: {LOOKUP_BAR:g} times as quick {NODE}. lmc's times include the hash of all tokens.",
    )
    metadata = (
        {"command": "python -m benchmarks.vs_lmcache " + " ".join(sys.argv[1:])}
        | describe_hardware()
        | describe_software()
    )
    metadata["peer"] = f"LMCache {VERSION}"
    return Report(
        "lmc beside LMCache on a CPU", text, [Section("Result", items=[figure(found), table, asked])], metadata
    )


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
    parser.add_argument("--quick", action="store_true", help="few prompts: to see that it runs")
    parser.add_argument("--out", type=Path, help="write report.md, results.json and a picture here")
    options = parser.parse_args()
    rounds, requests, warm_up = (1, 1, 1) if options.quick else (options.rounds, options.requests, WARM_UP)
    commands = install(options.venv.absolute())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        node = stack.enter_context(node_process(SLAB_REQUESTS * SHARED.num_bytes(TOKENS)))
        peer = stack.enter_context(server(commands, folder))
        found, lookup = measure(peer, node, rounds, requests, warm_up)
    for shape in SHAPES[1:]:
        found += measure_alone(shape, rounds * requests, warm_up)
    report = as_report(found, lookup, rounds, requests)
    for item in report.sections[0].items:
        if isinstance(item, Table):
            print_table(item)
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(
            options.out / "results.json", to_json({"rows": found, "lookups_s": lookup, "metadata": report.metadata})
        )
        write_pictures(options.out, report)
    return 0 if all(row.reached for row in found) and lookup.reached else 1


if __name__ == "__main__":
    sys.exit(main())
