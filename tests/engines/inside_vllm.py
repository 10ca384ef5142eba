"""What a test does inside a vLLM engine's process: break copies, slow them down, watch bytes and samples."""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
from dataclasses import asdict
from typing import Any

from tests.engines.traffic import spoil


def _fail_next_load(_: Any, rank: int) -> None:
    """In the process of each rank: the next load of this one leaves garbage and reports an error."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from lmc.cache.transfer.planner import Direction

    worker = get_kv_transfer_group()._worker.worker
    if worker._rank != rank:
        return
    backend = worker.copier.backend
    copy = backend.execute

    def broken(descriptors: Any, *arguments: Any) -> None:
        if descriptors.direction is Direction.LOAD:
            backend.execute = copy
            spoil(descriptors)
        copy(descriptors, *arguments)

    backend.execute = broken


class InsideVllm:
    """The engine's objects. Any: vLLM ships no types, and what is replaced here is private."""

    llm: Any
    loads_left: list[int] | None = None  # of fail_loads(): good ones, then bad ones

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def connector(self) -> Any:
        return self.core.scheduler.connector

    @property
    def cache(self) -> Any:
        return self.connector._scheduler.scheduler

    @property
    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker.worker

    def steps_in_flight(self) -> int:
        """How many steps the engine plans before it must have the output of the first of them."""
        return int(self.core.batch_queue_size)

    def has_amx(self) -> bool:
        import torch

        return bool(torch.cpu._is_amx_tile_supported())

    def sleep_and_lose_the_kv_memory(self) -> None:
        """The hooks in vLLM's order; both may come more than once."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector = get_kv_transfer_group()
        assert connector.supports_sleep_mode(None)
        connector.unregister_kv_caches()
        connector.unregister_kv_caches()
        layout = self.worker.copier.layout
        for region in layout.regions:
            for block in range(layout.num_blocks):
                ctypes.memset(region.base + block * region.stride, 0x5A, region.size)
        connector.restore_kv_caches()
        connector.restore_kv_caches()

    def watch_loads(self) -> None:
        """From now on copying_threads() tells which threads copied between blocks and slots."""
        copier, self.copied_by = self.worker.copier, set()
        copy = copier._copy

        def noted(*args: Any) -> Any:
            self.copied_by.add(threading.current_thread().name)
            return copy(*args)

        copier._copy = noted

    def copying_threads(self) -> list[str]:
        return sorted(self.copied_by)

    def namespace(self) -> dict[str, Any]:
        return asdict(self.cache.namespace)

    def groups(self) -> list[list[Any]]:
        """Of lmc's order: kind, tokens of a block, span."""
        return [[group.kind, group.block_tokens, group.span] for group in self.cache._parts.groups]

    def fail_loads(self, count: int, after: int = 0) -> None:
        """From now on loads fail half way, the first `after` excepted: some bytes are garbage, then the copy reports an error."""
        from lmc.cache.transfer.planner import Direction

        is_first = self.loads_left is None
        self.loads_left = [after, count]
        if not is_first:
            return
        backend = self.worker.copier.backend
        copy = backend.execute

        def broken(descriptors: Any, *arguments: Any) -> None:
            loading, left = descriptors.direction is Direction.LOAD, self.loads_left or [0, 0]
            if loading and left[0] > 0:
                left[0] -= 1
            elif loading and left[1] > 0:
                left[1] -= 1
                spoil(descriptors)
            copy(descriptors, *arguments)

        backend.execute = broken

    def hang_disk_while(self, marker: str) -> None:
        """From now on the disk tier's calls that read or write a file do not return while the marker exists.

        It stands for the kernel: no file system here can be made to hang without being root on its machine.
        """
        from lmc.cache.tiers import file_read
        from lmc.cache.tiers.disk import DiskTier

        def hung(call: Any) -> Any:
            def wait(*arguments: Any) -> Any:
                while os.path.exists(marker):  # noqa: PTH110  quicker than a Path's
                    time.sleep(0.02)
                return call(*arguments)

            return wait

        file_read.open_to_read = hung(file_read.open_to_read)
        DiskTier._write = hung(DiskTier._write)  # type: ignore[method-assign]

    def limit_files(self, num_bytes: int) -> None:
        """The kernel refuses to make any file of this process longer, as it does on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    def until_nothing_hangs(self) -> None:
        """Step until the calls that hung have ended too."""
        deadline = time.monotonic() + 60
        while self.cache.directory.num_open:
            assert time.monotonic() < deadline, "operations never ended"
            self.core.step_fn()
            time.sleep(0.001)

    def fail_next_load(self, rank: int) -> None:
        """The same for the next load only, of one rank of several."""
        self.llm.collective_rpc(_fail_next_load, args=(rank,))

    def leave_out(self, group: int | None) -> None:
        """From now on loads copy nothing of this KV group (of lmc's order); None: they copy all again."""
        from lmc.cache.transfer.planner import Direction

        copier = self.worker.copier
        if len(copier._layouts) == 1:
            execute = type(copier.backend).execute.__get__(copier.backend)

            def no_load(descriptors: Any, *arguments: Any) -> None:
                if descriptors.direction is not Direction.LOAD:
                    execute(descriptors, *arguments)

            copier.backend.execute = execute if group is None else no_load
            return
        plan = type(copier)._plan_groups.__get__(copier)
        left_out = group

        def incomplete(chunks: Any, direction: Any) -> Any:
            kept = [chunk for chunk in chunks if direction is not Direction.LOAD or chunk.group != left_out]
            assert len(kept) < len(chunks) or direction is not Direction.LOAD, "nothing was left out"
            return plan(kept, direction)

        copier._plan_groups = plan if group is None else incomplete

    def load_by_layer(self) -> None:
        """From now on copies run on threads, as on a device's streams; loads go layer by layer, slowly: a missing wait shows."""
        from lmc.cache.transfer.planner import Direction
        from lmc.cache.transfer.runtimes import ThreadRuntime
        from lmc.cache.transfer.streams import TransferStreams
        from lmc.cache.worker import block_copies

        block_copies.LAYER_BYTES = 1
        old = self.worker.copier
        copy = old.backend.execute

        self.store_delay = 0.0

        def slow(descriptors: Any, *arguments: Any) -> None:
            time.sleep(0.02 if descriptors.direction is Direction.LOAD else self.store_delay)
            copy(descriptors, *arguments)

        old.backend.execute = slow
        streams = TransferStreams(ThreadRuntime(), old.backend)
        self.worker.copier = block_copies.BlockCopier(old.layout, old._slab, old.backend, streams)
        self.by_layer: list[float] = []  # seconds that start_load_kv took for each pass that loads by layer
        start = self.worker.copier.start_layers

        def timed(requests: Any) -> bool:
            started = time.perf_counter()
            if start(requests):
                self.by_layer.append(time.perf_counter() - started)
                return True
            return False

        self.worker.copier.start_layers = timed

    def delay_stores(self, seconds: float) -> None:
        """After load_by_layer(): a store reads its blocks so much later."""
        self.store_delay = seconds

    def loads_by_layer(self) -> list[float]:
        return self.by_layer

    def abort_while_loading(self, prompt: list[int]) -> None:
        """Abort a request whose chunks are being loaded slowly."""
        from vllm import SamplingParams

        from lmc.cache.transfer.planner import Direction

        backend = self.worker.copier.backend
        copy = backend.execute

        def slow(descriptors: Any, *arguments: Any) -> None:
            if descriptors.direction is Direction.LOAD:
                time.sleep(0.5)
            copy(descriptors, *arguments)

        backend.execute = slow
        engine = self.llm.llm_engine
        internal = engine.add_request("abandoned", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=50))
        engine.step()
        engine.abort_request([internal], internal=True)
        while engine.has_unfinished_requests() or self.core.scheduler.has_requests():
            engine.step()
        backend.execute = copy

    def crash_cache(self) -> None:
        """The next lookup hits a fault in lmc itself."""

        def broken(*_: Any) -> None:
            raise ZeroDivisionError("injected")

        self.cache.directory.lookup = broken

    def watch_bytes(self) -> None:
        """From now on, keep the block bytes of every store, and compare what a load leaves in the blocks with them."""
        from lmc.cache.transfer.planner import Direction

        copier, kept = self.worker.copier, {}
        copy = copier._copy
        self.compared, self.different = 0, 0

        def read(block: int) -> bytes:
            return b"".join(ctypes.string_at(address, size) for address, size in copier.layout.ranges(block))

        def watched(batch: Any, request: Any) -> None:
            copy(batch, request)
            for chunk in request.chunks:
                for index, block in enumerate(chunk.blocks):
                    if block < 0:
                        continue
                    if batch.direction is Direction.STORE:
                        kept[chunk.key, index] = read(block)
                    elif (chunk.key, index) in kept:
                        now = read(block)
                        self.compared += len(now)
                        self.different += now != kept[chunk.key, index]

        copier._copy = watched

    def watched(self) -> dict[str, int]:
        return {"compared_bytes": self.compared, "different_blocks": self.different}

    def count_samples(self) -> None:
        """From now on, count the tokens that the model chose."""
        self.sampled = 0
        update = self.core.scheduler.update_from_output

        def counted(plan: Any, output: Any) -> Any:
            self.sampled += sum(len(tokens) for tokens in output.sampled_token_ids)
            return update(plan, output)

        self.core.scheduler.update_from_output = counted

    def samples(self) -> int:
        return self.sampled

    def throttle_disk(self, bytes_per_s: float) -> None:
        """From now on the disk tier's threads read so many bytes a second together.

        It stands for a slow disk: nobody can slow down a real one here without being root on its machine.
        """
        from lmc.cache.tiers.disk import DiskTier

        is_first = not hasattr(self, "disk_rate")
        self.disk_rate = bytes_per_s
        if not is_first:
            return
        read, lock = DiskTier.get, threading.Lock()
        free = 0.0

        def slow(tier: Any, key: Any, out: memoryview) -> Any:
            nonlocal free
            moved = read(tier, key, out)
            with lock:
                free = max(free, time.perf_counter()) + len(out) / self.disk_rate
                left = free - time.perf_counter()
            if left > 0:
                time.sleep(left)
            return moved

        DiskTier.get = slow  # type: ignore[method-assign]

    def expected_seconds(self, new: int) -> float | None:
        """What a prompt of so many tokens is expected to take, by what passes were measured to take."""
        seconds: float | None = self.cache.directory.speeds.computing(0, new)
        return seconds

    def load_as(self, arm: str) -> None:
        """From now on hits are loaded always, never, or as `load: auto` chooses by what it measured itself; "forget": it forgets that."""
        from lmc.cache.directory.speeds import Speeds

        class Slow(Speeds):
            """Nothing is loaded as quickly as it is computed."""

            def loading(self, tier: str, chunks: int, now: float) -> float:
                return 1e9

            def computing(self, position: int, new: int) -> float:
                return 0.0

            def to_be_tried(self, tier: str, now: float) -> bool:
                return False

        if arm == "forget" or not hasattr(self, "measured"):
            self.measured = Speeds()
        if arm != "forget":
            self.cache.directory.speeds = {"auto": self.measured, "never": Slow(), "always": Speeds()}[arm]
            load = "always" if arm == "always" else "auto"
            self.cache.config = self.cache.config.model_copy(update={"load": load})
