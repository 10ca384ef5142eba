"""What is done to the tiers of a running engine from outside, one thing after another, until it is told to stop."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import redis

from tests import services

ACTS = (
    "redis killed and started again",
    "redis that does not answer",
    "disk that does not answer",
    "file replaced by a FIFO",
    "files swapped",
    "file with a flipped bit",
    "values of Redis swapped",
    "value of Redis with a flipped bit",
)


class Tormentor:
    """A redis-server of its own and the folder of a disk tier; done counts what was done."""

    def __init__(self, folder: Path, seed: int, every_s: float) -> None:
        """every_s: seconds between two acts, in the mean."""
        self.disk = folder / "disk"
        self.hung = folder / "hung"  # while it exists, calls to the disk tier do not return
        self.done: Counter[str] = Counter()
        self._folder = folder
        self._every = every_s
        self._choose = random.Random(seed)
        self._port = services.free_port()
        self._server = ExitStack()
        self._running: services.RedisServer | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def redis_url(self) -> str:
        return f"redis://{services.LOCAL}:{self._port}/0"

    def start_redis(self) -> None:
        self._running = self._server.enter_context(services.redis_server(self._folder, port=self._port))

    def begin(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """All is well again when this returns."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.hung.unlink(missing_ok=True)

    def close(self) -> None:
        self.stop()
        self._server.close()

    def _work(self) -> None:
        acts = [self._forge_redis, self._forge_disk, self._pause_redis, self._hang_disk, self._fifos, self._kill_redis]
        while not self._stopped.is_set():
            for act in acts:
                if self._stopped.wait(self._every * self._choose.uniform(0.5, 1.5)):
                    break
                with suppress(FileNotFoundError, redis.RedisError):  # the cache was quicker, or the server is away
                    act()
            self._choose.shuffle(acts)

    def _kill_redis(self) -> None:
        assert self._running is not None
        self._running.kill()
        self.done["redis killed and started again"] += 1
        self._stopped.wait(self._every)
        self._server.close()
        self.start_redis()

    def _pause_redis(self) -> None:
        assert self._running is not None
        self._running.pause()
        self.done["redis that does not answer"] += 1
        self._stopped.wait(2 * self._every)
        self._running.resume()

    def _hang_disk(self) -> None:
        self.hung.touch()
        self.done["disk that does not answer"] += 1
        self._stopped.wait(3 * self._every)
        self.hung.unlink()

    def _fifos(self) -> None:
        for file in self._some_files(3):
            file.unlink()
            os.mkfifo(file)
            self.done["file replaced by a FIFO"] += 1

    def _forge_disk(self) -> None:
        """Values swapped between two names, and a bit flipped."""
        for one, other in _pairs(self._some_files(4)):
            first, second = one.read_bytes(), other.read_bytes()
            one.write_bytes(second)
            other.write_bytes(first)
            self.done["files swapped"] += 1
        for file in self._some_files(2):
            file.write_bytes(_flipped(file.read_bytes(), self._choose))
            self.done["file with a flipped bit"] += 1

    def _forge_redis(self) -> None:
        assert self._running is not None
        with self._running.client() as client:
            keys = sorted(client.scan_iter(count=1000))
            if len(keys) < 4:
                return
            for one, other in _pairs(self._choose.sample(keys, 4)):
                first, second = client.get(one), client.get(other)
                if first is not None and second is not None:
                    client.mset({one: second, other: first})
                    self.done["values of Redis swapped"] += 1
            for key in self._choose.sample(keys, 2):
                value = client.get(key)
                if value:
                    client.set(key, _flipped(bytes(value), self._choose))
                    self.done["value of Redis with a flipped bit"] += 1

    def _some_files(self, count: int) -> list[Path]:
        files = sorted(file for file in self.disk.glob("v*/*/r*/??/*") if file.is_file())
        return self._choose.sample(files, min(count, len(files)))


Found = TypeVar("Found")


def _pairs(found: Sequence[Found]) -> Iterator[tuple[Found, Found]]:
    return zip(found[::2], found[1::2], strict=False)


def _flipped(data: bytes, choose: random.Random) -> bytes:
    place = choose.randrange(len(data)) if data else 0
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :] if data else data


@contextmanager
def tormented(folder: Path, seed: int, every_s: float) -> Iterator[Tormentor]:
    tormentor = Tormentor(folder, seed, every_s)
    try:
        tormentor.start_redis()
        yield tormentor
    finally:
        tormentor.close()
