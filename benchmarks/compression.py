"""What lossless compression of KV wins: python -m benchmarks.compression [--tokens 2048] [--out reports/compression].

1. Ratio and speed of each code on the KV of the embedded model, which reads real text, in each kind of number.
2. Where the bits are: the entropy of exponents, signs and mantissas, by layer, and given the channel and the token before.
3. Loads from an object store whose network is throttled: a prefix on as many threads as io_threads says, raw and compressed in turns;
   medians of the rounds.

Exit code 1 when a bar is missed: the ratio of bf16, and for a load that it is quicker by the ratio, within a tenth. The store of part 3 is
this file's, because a real one of exactly that bandwidth does not exist here; the tier and its client are the real ones.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.config import CacheConfig
from lmc.cache.keys import ChunkKey, Element
from lmc.cache.sections import Compress, S3Config
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.s3 import S3Tier
from lmc.model import EMBEDDED, resolve_model
from lmc.probe.codec import CHUNK_TOKENS, CodecProbe, model_chunks, probe_codec, read_text
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file

ELEMENTS: tuple[Element, ...] = ("bf16", "fp16", "fp32", "fp8")
RATIO_BARS: dict[Compress, float] = {"lossless": 0.76, "lossless-max": 0.68}  # on bf16
BANDWIDTHS = (200e6, 1e9)
SLACK = 1.1  # of the ratio
IO_THREADS: int = CacheConfig.model_fields["io_threads"].default
_PIECE = 256 << 10
_HEADS, _DIM, _LAYERS = 3, 64, 30  # of the embedded model


@dataclass(frozen=True)
class Loads:
    """Of all chunks together; the medians of the rounds."""

    bandwidth: float
    compress: Compress
    ratio: float  # stored bytes / raw bytes
    seconds: float
    of_raw: float  # its time / the time of raw chunks
    reached: bool | None


class Link:
    """A network of one bandwidth that all connections share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free = 0.0
        self._lock = threading.Lock()

    def carry(self, num_bytes: int) -> None:
        """Return when so many bytes are through."""
        with self._lock:
            self._free = max(self._free, time.perf_counter()) + num_bytes / self._bytes_per_s
            until = self._free
        if (left := until - time.perf_counter()) > 0:
            time.sleep(left)


def serve_store(bytes_per_s: float, port: Connection) -> None:
    """An object store in memory that answers over a link of that bandwidth; it sends its port, and serves until it is killed."""
    link = Link(bytes_per_s)
    objects: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self._head(200, 0)

        def do_GET(self) -> None:
            found = objects.get(self.path)
            self._head(404 if found is None else 200, len(found or b""))
            for start in range(0, len(found or b""), _PIECE):
                piece = memoryview(found or b"")[start : start + _PIECE]
                link.carry(len(piece))
                self.wfile.write(piece)

        def _head(self, status: int, length: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def throttled_store(bytes_per_s: float) -> Iterator[str]:
    """The store in a process of its own; yields its address."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_store, args=(bytes_per_s, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.kill()
        process.join()


def measure_loads(bandwidth: float, chunks: Sequence[bytes], rounds: int) -> list[Loads]:
    keys = [ChunkKey(bytes([number]) * 32) for number in range(len(chunks))]
    raw = TierScope("benchmark", 0, "benchmark", len(chunks[0]), element="bf16")
    codes: tuple[Compress, ...] = ("none", "lossless", "lossless-max")
    times: dict[Compress, list[float]] = {code: [] for code in codes}
    with throttled_store(bandwidth) as address, ThreadPoolExecutor(IO_THREADS) as pool:
        config = S3Config(bucket="chunks", endpoint=address, access_key_id="a", secret_access_key="b", timeout=60.0)
        tiers = {
            code: S3Tier(config.model_copy(update={"prefix": code}), replace(raw, compress=code)) for code in codes
        }
        stored = {
            code: sum(tier.put(key, memoryview(chunk)).stored_bytes for key, chunk in zip(keys, chunks, strict=True))
            for code, tier in tiers.items()
        }
        slots = [memoryview(bytearray(len(chunk))) for chunk in chunks]
        for number in range(rounds + 1):
            for code, tier in tiers.items():
                started = time.perf_counter()
                list(pool.map(tier.get, keys, slots))
                if number:  # the first round opens the connections
                    times[code].append(time.perf_counter() - started)
                assert all(slot == chunk for slot, chunk in zip(slots, chunks, strict=True))
    medians = {code: statistics.median(times[code]) for code in codes}
    found = []
    for code in codes:
        of_raw = medians[code] / medians["none"]
        ratio = stored[code] / stored["none"]
        reached = None if code != "lossless" else of_raw <= ratio * SLACK
        found.append(Loads(bandwidth, code, ratio, medians[code], of_raw, reached))
    return found


def entropy(values: npt.NDArray[np.generic]) -> float:
    """Bits per value."""
    counts = np.unique(values, return_counts=True)[1] / values.size
    return float(-(counts * np.log2(counts)).sum())


def bits_table(chunks: Sequence[bytes]) -> Table:
    """Of bf16 KV: (chunk, layer, keys or values, head, token, channel)."""
    shape = (len(chunks), _LAYERS, 2, _HEADS, CHUNK_TOKENS, _DIM)
    words = np.concatenate([np.frombuffer(chunk, np.uint16) for chunk in chunks]).reshape(shape)
    tops = ((words >> 7) & 255).astype(np.int16)
    lows = (words & 127) | ((words >> 8) & 128)
    per_layer = [entropy(tops[:, layer, kind]) for layer in range(_LAYERS) for kind in range(2)]
    per_channel = [
        entropy(tops[:, layer, kind, head, :, channel])
        for layer in range(0, _LAYERS, 3)
        for kind in range(2)
        for head in range(_HEADS)
        for channel in range(_DIM)
    ]
    rows: list[list[str | float]] = [
        ["sign and mantissa", entropy(lows)],
        ["exponent", entropy(tops)],
        ["exponent, given layer and keys or values (mean)", statistics.mean(per_layer)],
        ["the same, least of a layer", min(per_layer)],
        ["the same, most of a layer", max(per_layer)],
        ["exponent, given the channel too (mean of every third layer)", statistics.mean(per_channel)],
        ["exponent less that of the token before in its channel", entropy(np.diff(tops, axis=4))],
        [
            "exponent less the median of its channel in the chunk",
            entropy(tops - np.median(tops, axis=4, keepdims=True)),
        ],
    ]
    return Table(
        "Bits of information in the 8 bits", [Column("part"), Column("entropy", "bits", 2)], [list(row) for row in rows]
    )


def as_report(probes: Sequence[CodecProbe], bits: Table, loads: Sequence[Loads], missed: Sequence[str]) -> Report:
    columns = [
        Column("KV"),
        Column("compress"),
        Column("ratio", "", 3),
        Column("encode", "GB/s"),
        Column("decode", "GB/s"),
    ]
    codes = Table(
        "Codes",
        [*columns, Column("loads sooner below", "GB/s")],
        [
            [probe.element, row.compress, row.ratio, row.encode_gb_per_s, row.decode_gb_per_s, row.pays_below_gb_per_s]
            for probe in probes
            for row in probe.rows
        ],
        f"{probes[0].chunks} chunks of {CHUNK_TOKENS} tokens of {EMBEDDED}. Rates are raw bytes per second of CPU time; medians.",
    )
    table = Table(
        "Loads over a throttled network",
        [Column("bandwidth", "MB/s", 0), Column("compress"), Column("ratio", "", 3), Column("load", "ms", 0),
         Column("time of raw", "", 3), Column("within a tenth of the ratio")],
        [[one.bandwidth / 1e6, one.compress, one.ratio, one.seconds * 1e3, one.of_raw, one.reached] for one in loads],
        f"All chunks of the prompt on {IO_THREADS} threads through the S3 tier, by turns; medians of the rounds.",
    )  # fmt: skip
    summary = f"Bars missed: {'; '.join(missed)}." if missed else "All bars are met."
    command = "python -m benchmarks.compression " + " ".join(sys.argv[1:])
    metadata = {"command": command.strip()} | describe_hardware() | describe_software()
    return Report("Lossless compression of KV", summary, [Section("Results", "", [codes, bits, table])], metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens that the model reads")
    parser.add_argument("--text", type=Path, help="text that it reads; default: a part of Python's documentation")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    folder, text = resolve_model(EMBEDDED), read_text(options.text)
    chunks = {element: model_chunks(folder, text, element, options.tokens) for element in ELEMENTS}
    probes = [probe_codec(EMBEDDED, element, chunks[element]) for element in ELEMENTS]
    loads = [one for bandwidth in BANDWIDTHS for one in measure_loads(bandwidth, chunks["bf16"], options.rounds)]
    missed = [f"{row.compress} of bf16" for row in probes[0].rows if row.ratio > RATIO_BARS[row.compress]]
    missed += [f"{one.compress} at {one.bandwidth / 1e6:.0f} MB/s" for one in loads if one.reached is False]
    report = as_report(probes, bits_table(chunks["bf16"]), loads, missed)
    for item in report.sections[0].items:
        if isinstance(item, Table):
            print_table(item)
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(
            options.out / "results.json", to_json({"codes": probes, "loads": loads, "metadata": report.metadata})
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
