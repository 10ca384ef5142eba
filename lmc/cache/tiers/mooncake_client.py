"""The process that holds a Mooncake Store client. It runs as a script of its own and imports nothing of lmc: see mooncake_process.

The client library keeps the interpreter's lock while it connects, which takes minutes when the master does not answer, blocks signals
of the whole process, and waits a minute for a machine that hangs. None of that may happen in an engine.

The parent sends settings on the control socket, then descriptors: memory that it lends, and lines. A line is a socket and a scratch memory
for one thread; a thread here answers its calls one by one. When the control socket ends, the parent has, and so does this process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any  # the client library has no types

MESSAGE_BYTES = 64 << 10
NAMES_PER_MESSAGE = 256

OTHER_SIZE = -600  # as the library says when an object does not fit into the memory for it
Move = Callable[[str, list[int], list[int]], int]

SCRATCH = -1  # the number of a line's own memory; those that were lent count from 0


_mappings: list[mmap.mmap] = []  # they stay until the process ends


def _map(descriptor: int, size: int) -> int:
    """The address of a new mapping."""
    mapping = mmap.mmap(descriptor, size)
    os.close(descriptor)
    _mappings.append(mapping)
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


class _Client:
    def __init__(self, store: Any) -> None:
        self.store = store
        self.lent: list[int] = []  # addresses
        self._watched = threading.Lock()  # a transfer is under way whose end is watched for

    def take(self, descriptor: int, size: int) -> tuple[int, str]:
        """Address and problem of a memory that the parent shares."""
        try:
            address = _map(descriptor, size)
        except (OSError, ValueError) as error:
            return 0, str(error)
        code = self.store.register_buffer(address, size)
        return address, "" if code == 0 else f"the client refuses to register it (code {code})"

    def serve(self, line: socket.socket, scratch: int) -> None:
        with line:
            while message := line.recv(MESSAGE_BYTES):
                try:
                    line.send(json.dumps(self._answer(json.loads(message), scratch)).encode())
                except OSError:
                    break

    def _answer(self, call: list[Any], scratch: int) -> int | list[int]:
        action, name, regions = call
        addresses = [(scratch if memory == SCRATCH else self.lent[memory]) + start for memory, start, _ in regions]
        sizes = [size for _, _, size in regions]
        store = self.store
        match action:
            case "put":
                return self._move(self._put_watched, self._put_waiting, name, addresses, sizes)
            case "get":  # the library would say of an object of another size that its transfer failed
                size = int(store.get_size(name))
                if size != sum(sizes):
                    return size if size < 0 else OTHER_SIZE
                return self._move(self._get_watched, self._get_waiting, name, addresses, sizes)
            case ["get_from", start]:
                found = store.get_into_ranges(addresses, [[name]], [[[0]]], [[[start]]], [[sizes]])
                return int(found[0][0][0])
            case "get_up_to":
                return int(store.batch_get_into([name], addresses, sizes)[0])
            case "size":
                return int(store.get_size(name))
            case "exist":
                return [int(code) for code in store.batch_is_exist(name)]
            case "remove":
                return int(store.remove(name, True))
        raise ValueError(f"unknown action {action!r}")

    def _move(self, watched: Move, waiting: Move, name: str, addresses: list[int], sizes: list[int]) -> int:
        """One transfer may watch for its end, which is quickest, but takes a core. Those beside it wait: several that watch slow each other
        down to a quarter on two cores."""
        if not self._watched.acquire(blocking=False):
            return waiting(name, addresses, sizes)
        try:
            return watched(name, addresses, sizes)
        finally:
            self._watched.release()

    def _put_watched(self, name: str, addresses: list[int], sizes: list[int]) -> int:
        return int(self.store.batch_put_from_multi_buffers([name], [addresses], [sizes])[0])

    def _get_watched(self, name: str, addresses: list[int], sizes: list[int]) -> int:
        return int(self.store.batch_get_into_multi_buffers([name], [addresses], [sizes])[0])

    def _put_waiting(self, name: str, addresses: list[int], sizes: list[int]) -> int:
        if self.store.batch_put_session_start([name], [sum(sizes)])[0] != 0:
            return self._put_watched(name, addresses, sizes)  # which says why it cannot
        code = int(self.store.batch_put_from_multi_buffer_ranges([name], [addresses], [sizes], [_starts(sizes)])[0])
        if code < 0:
            self.store.batch_put_session_revoke([name])
            return code
        return int(self.store.batch_put_session_end([name])[0])

    def _get_waiting(self, name: str, addresses: list[int], sizes: list[int]) -> int:
        many = len(sizes)
        parts = [[[start]] for start in _starts(sizes)], [[[size]] for size in sizes]
        read = self.store.get_into_ranges(addresses, [[name]] * many, [[[0]]] * many, *parts)
        codes = [int(part[0][0]) for part in read]
        return min(codes) if min(codes) < 0 else sum(codes)


def _starts(sizes: list[int]) -> list[int]:
    """Where parts of these sizes begin in an object."""
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _connect(control: socket.socket) -> Any:
    """The client, or None; the parent is told."""
    settings = json.loads(control.recv(MESSAGE_BYTES))
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        control.send(json.dumps({"missing": str(error)}).encode())
        return None
    store = MooncakeDistributedStore()
    code = store.setup(*settings["setup"])
    control.send(json.dumps({"code": code}).encode())
    return store if code == 0 else None


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    store = _connect(control)
    if store is None:
        return
    client = _Client(store)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 2)
        if not message:
            break
        size = json.loads(message)["bytes"]
        address, problem = client.take(descriptors[0], size)
        if len(descriptors) == 1:
            client.lent.append(address)
        elif not problem:
            line = socket.socket(fileno=descriptors[1])
            threading.Thread(target=client.serve, args=(line, address), daemon=True).start()
        control.send(json.dumps({"problem": problem}).encode())
    store.close()  # the master forgets what this node had; without it, it does so when heartbeats stay away


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of the library would keep the process
