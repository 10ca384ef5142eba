"""Kinds of streams: CUDA's, through torch, or a thread that does its work in order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from lmc.cache.transfer.streams import Event, Runtime, Stream

# torch leaves its stream and event classes untyped, hence Any for them below.


class CudaEvent:
    def __init__(self, event: Any) -> None:
        self.event = event

    def query(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaStream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def run(self, queue_copies: Callable[[int], None]) -> None:
        queue_copies(self._stream.cuda_stream)

    def record(self) -> Event:
        event = _cuda().Event(enable_timing=True)
        event.record(self._stream)
        return CudaEvent(event)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)


class CudaRuntime:
    def __init__(self, device: str) -> None:
        self._device = device

    def new_stream(self) -> Stream:
        return CudaStream(_cuda().Stream(self._device))

    def compute_stream(self) -> Stream:
        return CudaStream(_cuda().current_stream(self._device))

    def own_thread(self) -> None:
        from lmc.cache.transfer.cuda import CAPTURE_RELAXED, load_driver

        load_driver().exchange_capture_mode(CAPTURE_RELAXED)


def _cuda() -> Any:
    import torch

    return torch.cuda


class ThreadEvent:
    def __init__(self) -> None:
        self._set = threading.Event()
        self._time = 0.0

    def set(self) -> None:
        self._time = time.perf_counter()
        self._set.set()

    def query(self) -> bool:
        return self._set.is_set()

    def synchronize(self) -> None:
        self._set.wait()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, ThreadEvent)
        return self._time - earlier._time


class ThreadStream:
    """A thread; it ends with the process, or when its stream is closed."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, queue_copies: Callable[[int], None]) -> None:
        self._work.put(lambda: queue_copies(0))

    def record(self) -> Event:
        event = ThreadEvent()
        self._work.put(event.set)
        return event

    def wait_for(self, event: Event) -> None:
        self._work.put(event.synchronize)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class CallerStream:
    """The engine's own thread, on the CPU. It finishes each piece of work before it gives the next one."""

    def run(self, queue_copies: Callable[[int], None]) -> None:
        queue_copies(0)

    def record(self) -> Event:
        event = ThreadEvent()
        event.set()
        return event

    def wait_for(self, event: Event) -> None:
        event.synchronize()


class ThreadRuntime:
    def __init__(self) -> None:
        self._streams: list[ThreadStream] = []

    def new_stream(self) -> Stream:
        stream = ThreadStream(f"lmc-transfer-{len(self._streams)}")
        self._streams.append(stream)
        return stream

    def compute_stream(self) -> Stream:
        return CallerStream()

    def own_thread(self) -> None:
        """Threads capture nothing."""

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


def run_now(runtime: Runtime, queue_copies: Callable[[int], None]) -> None:
    """Run on a fresh stream behind the compute stream, and wait for it. Raises what queue_copies raises."""
    stream = runtime.new_stream()
    stream.wait_for(runtime.compute_stream().record())
    try:
        stream.run(queue_copies)
    finally:
        stream.record().synchronize()
