"""Starts the processes with Mooncake Store clients, and talks to them.

All tiers of a process that have the same settings share a client that moves chunks. A call that it does not answer in time, and a load that
failed under way, cost it its life: only then is it certain that nothing is written any more into the slot of that load. The next call
starts another one. The memory that is contributed to the store (mooncake.segment) is a second process's, so none of it is lost by that.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmc.cache.sections import MooncakeConfig
from lmc.cache.tiers import mooncake_client
from lmc.cache.tiers.lent import LentMemory
from lmc.cache.tiers.mooncake_client import MESSAGE_BYTES, NAMES_PER_MESSAGE

_log = logging.getLogger(__name__)

START_SECONDS = 30.0  # that connecting may take: the client asks the master several times
LONGEST_CALL = 10.0  # seconds beyond the time-out; the library itself gives a transfer up after 30
_CLOSE_SECONDS = 5.0
_SETUP_TRIES = 1  # the library's own; the breaker decides when to try again
_LEAST_SEGMENT = 16 << 20
_WITHOUT_METADATA = "P2PHANDSHAKE"
_LINES_KEPT = 20
_NO_ERROR = "metadata not found"  # which a client that is new always says
_GLOG_ERROR = re.compile(r"E\d{4} [\d:.]+ +\d+ [^\]]+\] (.*)")


_NO_MEMORY = LentMemory(-1, 0, 0)  # stands for one that is not used


class ClientFailed(OSError):
    """The client's process cannot be started, has ended, or did not answer and was ended."""


class Region(NamedTuple):
    """A piece of memory as the client knows it."""

    memory: int
    start: int
    size: int


@dataclass
class Line:
    """A connection for one thread at a time."""

    wire: socket.socket
    scratch: memoryview
    seconds: float  # after which a call counts as one that never ends
    in_step: bool = True  # no answer may still come

    def call(self, action: object, name: object, regions: Sequence[Region] = ()) -> int:
        """What the library answers. Raises ClientFailed."""
        self.ask(action, name, regions)
        return self.answer()

    def ask(self, action: object, name: object, regions: Sequence[Region] = ()) -> None:
        """Have a call made, while this thread does something else until it takes the answer. Raises ClientFailed."""
        self._send([action, name, regions])

    def answer(self) -> int:
        """Raises ClientFailed."""
        answer = self._receive()
        assert isinstance(answer, int)
        return answer

    def exist(self, names: Sequence[str]) -> list[int]:
        """1, 0 or a negative code for each name. Raises ClientFailed."""
        found: list[int] = []
        for start in range(0, len(names), NAMES_PER_MESSAGE):
            self.ask("exist", names[start : start + NAMES_PER_MESSAGE])
            answer = self._receive()
            assert isinstance(answer, list)
            found += answer
        return found

    def _send(self, call: object) -> None:
        self.wire.settimeout(self.seconds)
        self.in_step = False
        try:
            self.wire.send(json.dumps(call).encode())
        except OSError as error:  # a time-out, too, of a client that reads nothing
            raise ClientFailed(f"the client cannot be asked: {error}") from None

    def _receive(self) -> object:
        try:
            answer = self.wire.recv(MESSAGE_BYTES)
        except TimeoutError:
            raise ClientFailed(f"the client has not answered for {self.seconds:g} s, and is started anew") from None
        except OSError:  # it ended with our question unread
            answer = b""
        if not answer:
            raise ClientFailed("the client's process has ended")
        self.in_step = True
        return json.loads(answer)


class _Process:
    """One life of the client."""

    def __init__(self, config: MooncakeConfig, segment: int) -> None:
        """Returns when it is connected to the master. Raises ClientFailed."""
        self.pid = os.getpid()  # of the process that has started it; one that was forked has no part in it
        self._said: deque[str] = deque(maxlen=_LINES_KEPT)
        self._asking = threading.Lock()
        self._ending = threading.Lock()
        self._ended = False
        self._seconds = config.timeout + LONGEST_CALL
        self._ended_by_itself = False
        self._lent: list[LentMemory] = []
        self._idle: dict[int, list[Line]] = {}
        milliseconds = str(max(1, round(config.timeout * 1000)))
        environment = os.environ | {
            "MC_RPC_TIMEOUT_MS": milliseconds,
            "MC_RPC_CONNECT_TIMEOUT_MS": milliseconds,
            "MC_STORE_CLIENT_SETUP_RETRIES": str(_SETUP_TRIES),
            "MC_STORE_CLIENT_METRIC": "0",
            "GLOG_minloglevel": "1",
        }
        try:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise ClientFailed(f"the client cannot be reached: {error.strerror}") from error
        # -P: the folder of the script has modules that are named like packages.
        command = [sys.executable, "-P", str(Path(mooncake_client.__file__)), str(theirs.fileno())]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    process_group=0,  # the interrupt of a terminal is for the engine, which ends it in order
                )
        except OSError as error:
            self._control.close()
            raise ClientFailed(f"the client's process cannot be started: {error.strerror}") from error
        self._listener = threading.Thread(target=self._listen, name="lmc-mooncake", daemon=True)
        with ExitStack() as unless_connected:
            unless_connected.callback(self.end)
            try:
                self._listener.start()
            except (RuntimeError, MemoryError):
                raise ClientFailed("a thread cannot be started; raise the limit of processes") from None
            self._connect(config, segment)
            unless_connected.pop_all()

    @property
    def usable(self) -> bool:
        return self.pid == os.getpid() and self._process.poll() is None

    def lend(self, memories: Sequence[LentMemory]) -> None:
        """Map those of them that it has not mapped yet. Raises ClientFailed."""
        if len(memories) == len(self._lent):
            return
        with self._asking:
            for memory in memories[len(self._lent) :]:
                problem = self._give(memory.size, [memory.descriptor])
                if problem:
                    _log.warning("lmc: mooncake tier: host memory cannot be lent, so chunks are copied: %s", problem)
                self._lent.append(_NO_MEMORY if problem else memory)

    @contextmanager
    def line(self, scratch_bytes: int) -> Iterator[Line]:
        """A connection with so much scratch memory. Raises ClientFailed."""
        idle = self._idle.setdefault(scratch_bytes, [])
        try:
            line = idle.pop()
        except IndexError:
            line = self._open_line(scratch_bytes)
        try:
            yield line
        finally:
            if line.in_step:
                idle.append(line)

    def region(self, data: memoryview) -> Region | None:
        """Where data is, if it is in memory that was lent."""
        address = np.frombuffer(data, np.uint8).ctypes.data
        for number, memory in enumerate(self._lent):
            if memory.address <= address and address + len(data) <= memory.address + memory.size:
                return Region(number, address - memory.address, len(data))
        return None

    def close(self) -> None:
        """Have it sign off from the master, and end."""
        self._control.shutdown(socket.SHUT_WR)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        self.end()

    def end(self) -> None:
        """Returns when it touches no memory any more. May be called by every thread whose call has failed."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            if self.pid == os.getpid():
                self._ended_by_itself = self._process.poll() is not None
                self._process.kill()
                self._process.wait()
            self._control.close()

    @property
    def how_it_ended(self) -> str:
        """For an error line; empty unless it ended by itself."""
        return f" with {self._process.returncode}: {self.complaint()}" if self._ended_by_itself else ""

    def _connect(self, config: MooncakeConfig, segment: int) -> None:
        assert config.master is not None
        setup = [
            config.hostname or address_towards(config.master),
            config.metadata or _WITHOUT_METADATA,
            max(segment, _LEAST_SEGMENT) if segment else 0,
            0,  # memory for calls that are not made here
            config.protocol,
            config.devices,
            config.master,
        ]
        answer = self._tell({"setup": setup}, [], START_SECONDS)
        if "missing" in answer:
            raise ClientFailed(
                f"the client cannot be loaded: {answer['missing']}; install libibverbs1 librdmacm1 libnuma1 libcurl4 liburing2"
            )
        if answer["code"] != 0:
            with suppress(subprocess.TimeoutExpired):  # it takes the library back, which may wait for the master
                self._process.wait(_CLOSE_SECONDS)
            self._listener.join(1.0)
            said = self.complaint() or f"code {answer['code']}"
            remedy = "; install the client of the master's version" if "ersion mismatch" in said else ""
            raise ClientFailed(f"cannot connect to the master or the metadata server: {said}{remedy}")

    def _open_line(self, scratch_bytes: int) -> Line:
        with ExitStack() as unless_open, ExitStack() as opened:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                unless_open.callback(ours.close)
                opened.callback(theirs.close)
                descriptor = os.memfd_create("lmc-mooncake", os.MFD_CLOEXEC)
                opened.callback(os.close, descriptor)
                os.ftruncate(descriptor, scratch_bytes)
                scratch = memoryview(mmap.mmap(descriptor, scratch_bytes))
            except OSError as error:
                raise ClientFailed(f"there is no memory or descriptor for a connection: {error.strerror}") from error
            with self._asking:
                problem = self._give(scratch_bytes, [descriptor, theirs.fileno()])
            if problem:
                raise ClientFailed(f"the client cannot use {scratch_bytes} bytes of memory: {problem}")
            unless_open.pop_all()
            return Line(ours, scratch, self._seconds)

    def _give(self, size: int, descriptors: list[int]) -> str:
        return str(self._tell({"bytes": size}, descriptors, self._seconds)["problem"])

    def _tell(self, message: object, descriptors: list[int], seconds: float) -> dict[str, object]:
        self._control.settimeout(seconds)
        try:
            socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)
            answer = self._control.recv(MESSAGE_BYTES)
        except TimeoutError:
            raise ClientFailed(f"the client has not answered for {seconds:g} s") from None
        except OSError:  # it ended with our message unread, or another thread has ended it
            answer = b""
        if not answer:
            raise ClientFailed("the client's process has ended")
        found = json.loads(answer)
        assert isinstance(found, dict)
        return found

    def _listen(self) -> None:
        """Keep the last lines that the library writes, which say why it fails."""
        assert self._process.stderr is not None
        with self._process.stderr as said:
            for line in said:
                self._said.append(line.decode(errors="replace").rstrip())

    def complaint(self) -> str:
        """The first error: others follow from it."""
        errors = [found[1] for line in self._said if (found := _GLOG_ERROR.match(line)) and _NO_ERROR not in found[1]]
        return errors[0] if errors else (self._said[-1] if self._said else "")


class SharedClient:
    """The client of all tiers with the same settings. It is started by the first call, and anew by the call after it has failed."""

    def __init__(self, config: MooncakeConfig, segment: int) -> None:
        """segment: bytes to contribute to the store."""
        self.users = 0
        self._config = config
        self._segment = segment
        self._lent: list[LentMemory] = []  # only ever appended to: a process knows them by number
        self._process: _Process | None = None
        self._holder: _Process | None = None  # of the segment
        self._starting = threading.Lock()

    def lend(self, memory: LentMemory) -> None:
        """Let chunks in this memory be moved without a copy. It stays mapped, so no other memory ever has its addresses."""
        if not any(memory.address == other.address for other in self._lent):
            self._lent.append(memory._replace(descriptor=os.dup(memory.descriptor)))

    @contextmanager
    def connected(self) -> Iterator[_Process]:
        """Raises ClientFailed; so does what is within `with`, and then the process is ended."""
        process = self._process
        if process is None or not process.usable or not self._holds:
            process = self._start()
        try:
            process.lend(self._lent)
            yield process
        except ClientFailed as error:
            self._drop(process)
            raise ClientFailed(f"{error}{process.how_it_ended}") from None

    def close(self) -> None:
        with self._starting:
            processes = self._process, self._holder
            self._process = self._holder = None
        for process in processes:
            if process is not None and process.usable:
                process.close()
        for memory in self._lent:
            os.close(memory.descriptor)
        self._lent.clear()

    def _start(self) -> _Process:
        if not self._starting.acquire(timeout=self._config.timeout):
            raise ClientFailed("the client is still connecting")
        try:
            if not self._holds:
                if self._holder is not None:
                    self._holder.end()
                self._holder = _Process(self._config, self._segment)
            if self._process is None or not self._process.usable:
                if self._process is not None:
                    self._process.end()
                self._process = _Process(self._config, 0)
            return self._process
        finally:
            self._starting.release()

    @property
    def _holds(self) -> bool:
        """Whether the store has what is to be contributed."""
        return not self._segment or (self._holder is not None and self._holder.usable)

    def _drop(self, process: _Process) -> None:
        process.end()
        with self._starting:
            if self._process is process:
                self._process = None


_shared: dict[tuple[str, int, int], SharedClient] = {}
_sharing = threading.Lock()


def shared_client(config: MooncakeConfig, segment: int) -> SharedClient:
    """The client with these settings; give it back with release_client()."""
    same = (config.model_dump_json(exclude={"compress"}), segment, os.getpid())
    with _sharing:
        client = _shared.setdefault(same, SharedClient(config, segment))
        client.users += 1
        return client


def release_client(client: SharedClient) -> None:
    with _sharing:
        client.users -= 1
        if client.users:
            return
        for same in [same for same, other in _shared.items() if other is client]:
            del _shared[same]
    client.close()


def address_towards(master: str) -> str:
    """This machine's address in the network of the master, under which other nodes can reach it."""
    host, _, port = master.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClientFailed(f"there is no way to {host}: {error.strerror}") from error
