"""The sections of benchmarks.gpu_check: each answers one question about lmc on a real device, and yields its findings as flat mappings.

dry means: no device here. Threads stand for streams and sizes are tiny; what only a device can answer is skipped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lmc.cache.keys import Namespace
from lmc.cache.plan import BlockCopy, CopyReading, Plan, RequestCopies
from lmc.cache.transfer import cuda
from lmc.cache.transfer.backends import choose_backend
from lmc.cache.transfer.backends.auto import AutoBackend
from lmc.cache.transfer.backends.dma import DmaBackend
from lmc.cache.transfer.layout import KVLayout
from lmc.cache.transfer.pinned import Slab, gpu_numa_node, open_slab
from lmc.cache.transfer.planner import Descriptors, Direction, plan
from lmc.cache.transfer.runtimes import CudaRuntime, ThreadRuntime
from lmc.cache.transfer.streams import TransferStreams
from lmc.cache.worker.block_copies import BlockCopier
from lmc.cache.worker.worker import CacheWorker
from lmc.probe.transfer import PIECE_SIZES, probe_device
from tests.contracts.transfer import Engine, sglang_engine, vllm_engine

ROOT = Path(__file__).parents[1]
DEVICE = "cuda:0"
SKIPPED = {"skipped": "needs a GPU"}

Finding = dict[str, object]
Findings = Iterator[Finding]


def environment(dry: bool) -> Findings:
    """Driver, device attributes, huge pages, memory limits."""
    finding: Finding = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    for path in (
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ):
        with contextlib.suppress(OSError):
            finding[path] = Path(path).read_text().strip()
    finding["memlock"] = str(resource.getrlimit(resource.RLIMIT_MEMLOCK))
    if not dry:
        driver = cuda.load_driver()
        bus = driver.pci_bus_id(0)
        finding |= {"gpu": torch.cuda.get_device_name(0), "driver": driver.version, "batched_copies": driver.has_batch}
        finding |= {"host_pointers": driver.takes_host_pointers(0), "bus": bus, "numa_node": str(gpu_numa_node(bus))}
        query = "pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            finding["pcie"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        finding["ok"] = driver.takes_host_pointers(0)
    yield finding


def capture(dry: bool, *, relaxed: bool = True, engine_mode: str = "global") -> Findings:
    """Does pinning in the background end the CUDA graph captures of vLLM's start? Without the relaxed mode it is expected to."""
    if dry:
        yield SKIPPED
        return
    if not relaxed:
        cuda.CAPTURE_RELAXED = 0  # what lmc's thread asks for is then the mode that it has
    a, b = (torch.randn(1024, 1024, device=DEVICE) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        (a @ b).sum()  # cuBLAS must not allocate inside
    torch.cuda.synchronize()
    slab = open_slab(DEVICE, 12 << 10, 1 << 20)
    good, errors, longest = 0, [], 0.0
    started = time.perf_counter()
    while (slab.ready_slots < slab.num_slots or time.perf_counter() - started < 2) and len(errors) < 20:
        began = time.perf_counter()
        if began - started > 40:
            break
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode=engine_mode):
                c = a
                for _ in range(200):
                    c = (c @ b).clamp_(-1, 1)
            graph.replay()
            torch.cuda.synchronize()
            good += 1
        except RuntimeError as error:
            errors.append(str(error).splitlines()[0])
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
        longest = max(longest, time.perf_counter() - began)
    slab.wait(timeout=20)
    yield {
        "captures": good,
        "captures_failed": len(errors),
        "first_error": errors[0] if errors else "",
        "longest_capture_s": longest,
        "pinned_slots": slab.pinned_slots,
        "slots": slab.num_slots,
        "problem": slab.problem,
        "ok": not errors and slab.pinned_slots == slab.num_slots,
    }


def tests(dry: bool) -> Findings:
    """The project's tests that need a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=5",
        "--tb=short",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-9000:], done.stderr[-2000:])
    yield {"last_line": (done.stdout.strip().splitlines() or [""])[-1], "ok": done.returncode == 0}


def pageable(dry: bool) -> Findings:
    """Batched copies of memory that is not pinned yet: are the bytes right, and does the call hold the engine's thread?"""
    if dry:
        yield SKIPPED
        return
    dma, stream = DmaBackend(cuda.load_driver()), torch.cuda.Stream()
    size, piece = 256 << 20, 64 << 10
    host = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    blocks = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    busy = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    places = np.arange(size // piece, dtype=np.uint64) * np.uint64(piece)
    sizes = np.full(len(places), piece, dtype=np.uint64)
    for direction in (Direction.LOAD, Direction.STORE):
        wanted = host.copy()
        pair = [np.uint64(host.ctypes.data) + places, np.uint64(blocks.data_ptr()) + places]
        if direction is Direction.STORE:
            blocks.copy_(torch.from_numpy(wanted))
            host[:] = 0
            pair.reverse()
        torch.cuda.synchronize()
        multiply(busy, 100)
        stream.wait_stream(torch.cuda.current_stream())
        started = time.perf_counter()
        dma.execute(Descriptors(pair[0], pair[1], sizes, direction), stream.cuda_stream)
        queued = time.perf_counter() - started
        torch.cuda.synchronize()
        done = time.perf_counter() - started
        got = blocks.cpu().numpy() if direction is Direction.LOAD else host
        right = bool((got == wanted).all())
        yield {
            "direction": str(direction),
            "call_ms": queued * 1e3,
            "until_done_ms": done * 1e3,
            "right": right,
            "ok": right,
        }


def fence(dry: bool) -> Findings:
    """A prefill step that stores, as vLLM calls lmc: does a fence of the blocks that are handed out cost the step anything?"""
    layers, blocks, tokens, content = (2, 64, 256, 8) if dry else (32, 4096, 8192, 256)
    slab, _, copier = make_copier(
        kv("LBNHC", layers, 8, 16, content, blocks, dry).layout, 4 * tokens // 128 + 8, 8, dry
    )
    busy = torch.randn(256, 256) if dry else torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    copies = [request(copier.layout, tokens, 8, seed, seed * tokens // 128) for seed in range(4)]
    variants: dict[str, Callable[[], None] | None] = {
        "no stores": None,
        "stores, no fence": lambda: None,
        "stores, fence of blocks that none reads": lambda: copier.fence({0}),
        "stores, fence of any block": copier.fence,
    }
    for turn in range(2):
        for variant, before in variants.items():
            multiply(busy, 2 if dry else 130)  # about 200 ms on an H100
            synchronize(dry)
            started, submitting = time.perf_counter(), 0.0
            for step in range(4):
                if before is not None:
                    before()
                multiply(busy, 2 if dry else 130)
                if before is not None:
                    began = time.perf_counter()
                    copier.store(copies[step])
                    submitting += time.perf_counter() - began
                copier.ended()
            synchronize(dry, compute_only=True)
            seconds = time.perf_counter() - started
            copier.drain()
            copier.ended()
            if turn:
                yield {"variant": variant, "step_ms": seconds / 4e-3, "store_submit_ms": submitting / 4e-3}
    copier.close()
    slab.close()


SHAPES = {  # (order, layers, heads, tokens of a block, content, blocks)
    "8B, TP 1, layers apart (64 KiB pieces)": ("LBNHC", 32, 8, 16, 256, 2048),
    "8B, TP 1, blocks whole (2 MiB pieces)": ("BLNHC", 32, 8, 16, 256, 2048),
    "70B, TP 8, layers apart (8 KiB pieces)": ("LBNHC", 80, 1, 16, 256, 2048),
    "MLA, blocks of 64 (72 KiB pieces)": ("LBHNC", 61, 1, 64, 576, 512),
}


def rates(dry: bool) -> Findings:
    """Rates of real layouts by backend, beside one large copy in the same run."""
    limits = {direction: bare_rate(direction, dry) for direction in ("store", "load")}
    yield {"shape": "one copy of 512 MiB", **{f"{name}_gb_s": rate for name, rate in limits.items()}}
    for shape, (order, layers, heads, tokens, content, blocks) in SHAPES.items():
        moved = 512 if dry else 8192
        if dry:
            layers, content, blocks = 2, 8, 64
        per_chunk = max(1, 128 // tokens)
        engine = kv(order, layers, heads, tokens, content, blocks, dry)
        for name in ("auto",) if dry else ("auto", "dma", "kernel", "staged"):
            slab, backend, copier = make_copier(engine.layout, moved // tokens // per_chunk + 8, per_chunk, dry, name)
            copies = request(engine.layout, moved, per_chunk, 1)
            for what in ("store", "load"):
                runs = [run_batch(copier, what, copies, dry) for _ in range(6)][1:]
                rate = runs[0][1].num_bytes / statistics.median(batch.seconds for _, batch in runs) / 1e9
                failed = any(batch.failed for _, batch in runs)
                yield {
                    "shape": shape,
                    "backend": name,
                    "direction": what,
                    "gb_s": rate,
                    "share": None if dry else rate / limits[what],
                    "host_ms": statistics.median(host for host, _ in runs) * 1e3,
                    "chosen": ", ".join(sorted({key[0] for key in backend.chosen})),
                    "ok": not failed,
                }
            copier.close()
            slab.close()
        del engine


def quiesce(dry: bool) -> Findings:
    """SGLang's reset while a store reads, and loads on lmc's own thread: are the bytes right?"""
    layers, page, dim, pages = (2, 4, 16, 64) if dry else (32, 64, 128, 256)
    device = "cpu" if dry else DEVICE
    engine = sglang_engine(
        torch.bfloat16, layers=layers, num_blocks=pages, page=page, heads=2 if dry else 8, dim=dim, device=device
    )
    slab, _, copier = make_copier(engine.layout, pages, 1, dry)
    names = Namespace("sglang", "m", "", "bf16", engine.layout.fingerprint, page)
    worker = CacheWorker(names, 0, slab, copier, {}, lambda: CopyReading({}, {}, 1, 0, ""), part=0, io_threads={})
    counter = SimpleNamespace(complete=lambda *_: None, fail=lambda *_: None, finish=lambda _: True)
    side = sglang_copies().Copies(worker, counter)
    count = pages - 2
    many = RequestCopies("r", tuple(BlockCopy(slot, b"k", slot, (slot + 1,)) for slot in range(count)))
    for memory in engine.memory:
        memory.fill_(0x11)
    synchronize(dry)
    side.start_store(Plan(stores=[many]), True, [])
    side.quiesce()
    for memory in engine.memory:
        memory.fill_(0xEE)  # the next request's pass
    synchronize(dry)
    copier.drain()
    wrong = sum(bool((np.frombuffer(slab.view(slot), dtype=np.uint8) != 0x11).any()) for slot in range(count))
    yield {"what": "reset while a store reads", "slots": count, "wrong": wrong, "ok": wrong == 0}
    for slot in range(count):
        np.frombuffer(slab.view(slot), dtype=np.uint8)[:] = 0x33
    arrived: list[int] = []
    thread = threading.Thread(target=copier.load_each_layer, args=([many], arrived.append))
    thread.start()
    thread.join(30)
    synchronize(dry)
    held = [memory.cpu().numpy().reshape(pages, -1)[1 : count + 1] for memory in engine.memory]
    wrong = sum(bool((one != 0x33).any()) for one in held)
    done = len(arrived) == layers
    yield {"what": "load on a thread of lmc's", "slots": count, "wrong": wrong, "ok": done and wrong == 0}
    side.close()
    worker.close()


def calibration(dry: bool) -> Findings:
    """Does pinning change what the calibration measures, and how long does it hold up tiny kernels?"""
    if dry:
        yield SKIPPED
        return
    engine, tiny = kv("LBNHC", 4, 8, 16, 256, 64, dry), torch.zeros(1 << 20, device=DEVICE)

    def measured(when: str) -> Finding:
        model = choose_backend(engine.layout)._model
        assert model is not None
        return {"when": when, "seconds": model.seconds, "rates": model.describe()}

    yield measured("before, as lmc does")
    slab = open_slab(DEVICE, 24 << 10, 1 << 20)
    yield measured("while memory is pinned")
    started, times = time.perf_counter(), [0.0]
    while slab.ready_slots < slab.num_slots and time.perf_counter() - started < 40:
        began = time.perf_counter()
        tiny.add_(1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    yield {"when": "pinning", "gib": slab.ready_slots / 1024, "seconds": time.perf_counter() - started,
           "worst_tiny_kernel_ms": max(times) * 1e3, "problem": slab.problem, "ok": slab.pinned_slots == slab.num_slots}  # fmt: skip
    yield measured("after")
    slab.close()


def first_call(dry: bool) -> Findings:
    """Host time of the first copies in serving: nothing should be compiled or loaded in them."""
    if dry:
        yield SKIPPED
        return
    engine = kv("LBNHC", 8, 1, 16, 256, 1024, dry)
    slab, backend, _ = make_copier(engine.layout, 64, 8, dry)
    stream = torch.cuda.Stream()
    slots = np.array([slab.address(0)], dtype=np.uint64)
    copies = plan(engine.layout, np.arange(8, 16, dtype=np.int64), slots, Direction.LOAD)
    for name, one in backend._backends.items():
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            one.execute(copies, stream.cuda_stream)
            times.append((time.perf_counter() - started) * 1e3)
        yield {"backend": name, "first_ms": times[0], "later_ms": times[-1], "ok": times[0] < 10 * max(times[-1], 0.1)}
    torch.cuda.synchronize()
    slab.close()


def interference(dry: bool) -> Findings:
    """How much a large copy beside it slows compute, by backend."""
    if dry:
        yield SKIPPED
        return
    engine = kv("LBNHC", 32, 8, 16, 256, 4096, dry)
    busy = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    wide = torch.randn(1 << 28, device=DEVICE, dtype=torch.bfloat16)
    works: dict[str, Callable[[], object]] = {
        "matrix products": lambda: multiply(busy, 40),
        "memory-bound": lambda: [wide.mul_(1.0) for _ in range(60)],
    }
    for name in ("dma", "kernel", "staged"):
        slab, _, copier = make_copier(engine.layout, 4096 // 8 + 8, 8, dry, name)
        copies = request(engine.layout, 32768, 8, 1)
        run_batch(copier, "store", copies, dry)
        for what in ("store", "load"):
            start = copier.store if what == "store" else copier.load_in_background
            for label, work in works.items():
                times: dict[bool, list[float]] = {False: [], True: []}
                for turn in range(6):
                    beside = bool(turn % 2)
                    torch.cuda.synchronize()
                    if beside:
                        start(copies)
                    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    began.record()
                    work()
                    ended.record()
                    ended.synchronize()
                    times[beside].append(began.elapsed_time(ended))
                    copier.drain()
                    copier.ended()
                alone, slowed = (statistics.median(times[beside]) for beside in (False, True))
                yield {"backend": name, "direction": what, "work": label, "alone_ms": alone, "beside_ms": slowed,
                       "slower_percent": (slowed / alone - 1) * 100}  # fmt: skip
        copier.close()
        slab.close()


def probe(dry: bool) -> Findings:
    """What `lmc probe transfer` measures: every backend by piece size."""
    sizes = PIECE_SIZES[:2] if dry else PIECE_SIZES
    options = {"total_bytes": 1 << 20, "repetitions": 2} if dry else {}
    rows = probe_device("cpu" if dry else DEVICE, sizes, **options).rows
    for row in rows:
        yield {"direction": row.direction, "piece": row.piece_bytes, "backend": row.backend, "gb_s": row.gb_per_s,
               "limit_gb_s": row.limit_gb_per_s, "share": row.share}  # fmt: skip


def flags(dry: bool) -> Findings:
    """Batched copies with the hint to overlap with compute beside those without."""
    if dry:
        yield SKIPPED
        return
    driver, size = cuda.load_driver(), 512 << 20
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    blocks = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    busy = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    stream, plain = torch.cuda.Stream(), cuda.CopyAttributes
    for piece in (8 << 10, 64 << 10):
        line = np.arange(size // piece, dtype=np.uint64) * np.uint64(piece)
        pair = (
            np.uint64(host.data_ptr()) + line,
            np.uint64(blocks.data_ptr()) + np.random.default_rng(0).permutation(line),
        )
        sizes = np.full(len(line), piece, dtype=np.uint64)
        for direction, order in (("load", cuda.SOURCE_ANY_ORDER), ("store", cuda.SOURCE_IN_STREAM_ORDER)):
            src, dst = pair if direction == "load" else pair[::-1]
            for flag in (0, 1):
                cuda.CopyAttributes = partial(plain, flags=flag)  # type: ignore[misc, assignment]
                hosts, copying, computing = [], [], []
                for _ in range(4):
                    torch.cuda.synchronize()
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
                    events[0].record(stream)
                    began = time.perf_counter()
                    driver.copy(src, dst, sizes, order, stream.cuda_stream)
                    hosts.append(time.perf_counter() - began)
                    events[1].record(stream)
                    events[2].record()
                    multiply(busy, 20)
                    events[3].record()
                    torch.cuda.synchronize()
                    copying.append(events[0].elapsed_time(events[1]))
                    computing.append(events[2].elapsed_time(events[3]))
                yield {"direction": direction, "piece": piece, "flags": flag, "host_ms": statistics.median(hosts) * 1e3,
                       "gb_s": size / statistics.median(copying) / 1e6, "compute_ms": statistics.median(computing)}  # fmt: skip


def kv(order: str, layers: int, heads: int, tokens: int, content: int, blocks: int, dry: bool) -> Engine:
    return vllm_engine(
        order,
        torch.bfloat16,
        layers=layers,
        num_blocks=blocks,
        heads=heads,
        tokens=tokens,
        content=content,
        device="cpu" if dry else DEVICE,
    )


def make_copier(
    layout: KVLayout, slots: int, per_chunk: int, dry: bool, name: str = "auto"
) -> tuple[Slab, AutoBackend, BlockCopier]:
    """As lmc puts them together, with all memory ready."""
    backend = choose_backend(layout, name=name, is_pinned=lambda addresses: slab.is_pinned(addresses))
    slab = open_slab(layout.device, slots, layout.block_bytes * per_chunk)
    slab.wait(timeout=120)
    streams = TransferStreams(ThreadRuntime() if dry else CudaRuntime(DEVICE), backend)
    return slab, backend, BlockCopier(layout, slab, backend, streams)


def request(layout: KVLayout, tokens: int, per_chunk: int, seed: int, first_slot: int = 0) -> RequestCopies:
    """Chunks of scattered blocks; block 0 is none of them."""
    count = tokens // layout.block_tokens
    ids = np.random.default_rng(seed).permutation(layout.num_blocks - 1)[:count] + 1
    rows = ids[: count // per_chunk * per_chunk].reshape(-1, per_chunk).tolist()
    return RequestCopies(
        f"r{seed}", tuple(BlockCopy(index, b"k", first_slot + index, tuple(row)) for index, row in enumerate(rows))
    )


def run_batch(copier: BlockCopier, what: str, copies: RequestCopies, dry: bool) -> tuple[float, Any]:
    """Host seconds of the call, and the batch when it has ended."""
    synchronize(dry)
    started = time.perf_counter()
    (copier.store if what == "store" else copier.load_in_background)(copies)
    seconds = time.perf_counter() - started
    copier.drain()
    (batch,) = copier.ended()
    return seconds, batch


def bare_rate(direction: str, dry: bool) -> float | None:
    """GB/s of one large copy between pinned and device memory."""
    if dry:
        return None
    host = torch.empty(512 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE)
    target, source = (host, device) if direction == "store" else (device, host)
    found = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        found.append(host.numel() / start.elapsed_time(end) / 1e6)
    return statistics.median(found[1:])


def multiply(matrix: torch.Tensor, times: int) -> None:
    for _ in range(times):
        matrix @ matrix


def synchronize(dry: bool, compute_only: bool = False) -> None:
    if not dry:
        torch.cuda.current_stream().synchronize() if compute_only else torch.cuda.synchronize()


def sglang_copies() -> Any:
    """The module alone: its package would import SGLang."""
    path = ROOT / "lmc/cache/connectors/sglang/copies.py"
    spec = importlib.util.spec_from_file_location("lmc_sglang_copies", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


Section = Callable[[bool], Findings]

SECTIONS: Sequence[tuple[str, float, Section]] = (  # (name, seconds at most, section), what must not be missed first
    ("environment", 40, environment),
    ("capture", 60, capture),
    ("capture-not-relaxed", 60, partial(capture, relaxed=False)),
    ("capture-thread-local", 60, partial(capture, engine_mode="thread_local")),
    ("tests", 130, tests),
    ("pageable", 40, pageable),
    ("fence", 60, fence),
    ("rates", 100, rates),
    ("quiesce", 30, quiesce),
    ("calibration", 60, calibration),
    ("first-call", 40, first_call),
    ("interference", 60, interference),
    ("probe", 90, probe),
    ("flags", 40, flags),
)
