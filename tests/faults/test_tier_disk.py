"""The disk tier under full disks, broken disks, damaged files, killed writers and rivals: a chunk is right or it is absent."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import stat
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.cache.keys import Element
from lmc.cache.sections import Compress
from lmc.cache.tiers import file_read, read_loop, stored
from lmc.cache.tiers.codec import encode
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import FOOTER_BYTES, FORMAT, TierScope, stored_bytes
from lmc.cache.tiers.namespaces import LEASE
from lmc.errors import Corrupt, TierError, TierFull
from tests.contracts.tier import CHUNK_BYTES, CODED, SCOPE, key, kv_payload, load, payload

pytestmark = pytest.mark.fault

NUMBERS = 6
FULL = FOOTER_BYTES + CHUNK_BYTES  # bytes of a chunk's file


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path, SCOPE)


def files_under(folder: Path) -> list[Path]:
    """Without the namespace's lease."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != LEASE]


def chunk_file(folder: Path) -> Path:
    [path] = files_under(folder)
    return path


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked process; returns its id. Its exit status is 0 only when work ends without an exception."""
    child = os.fork()
    if child == 0:
        status = 1
        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # as Python does at its start: a file that is too long is an error
        try:
            work()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(number: int) -> tuple[bytes, bytes]:
    """The two payloads that the tests put under key(number)."""
    return bytes(payload(number)), bytes(payload(number + 100))


def pretend_cached(patch: pytest.MonkeyPatch, cached: bool) -> None:
    """Reads take the way of a file that is in the page cache, or of one that is not."""
    if cached:
        patch.setattr(file_read, "EDGE", 0)
    else:
        plain = read_loop.read_and_hash
        patch.setattr(
            read_loop, "read_and_hash", lambda *given: (-1, 0, False) if given[3] else plain(*given)
        )  # asked for an edge


def test_kill_at_a_random_point_of_a_store(tmp_path: Path) -> None:
    """200 writers are killed: what they stored is whole, what they acknowledged is there, what they left half-done is removed."""
    chance = random.Random(5)
    acknowledged: set[int] = set()
    killed_inside_a_store = 0
    for round_number in range(200):
        reader, writer = os.pipe()

        def write_forever(seed: int = round_number, pipe: int = writer) -> None:
            numbers = random.Random(seed)
            tier = DiskTier(tmp_path, SCOPE)
            os.write(pipe, b"\xff")
            while True:
                number = numbers.randrange(NUMBERS)
                tier.put(key(number), memoryview(numbers.choice(contents(number))))
                os.write(pipe, bytes([number]))

        child = in_child(write_forever)
        os.close(writer)
        assert os.read(reader, 1) == b"\xff"
        time.sleep(chance.uniform(0, 0.006))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while done := os.read(reader, 4096):
            acknowledged |= set(done)
        os.close(reader)

        killed_inside_a_store += len(list((tmp_path / FORMAT / SCOPE.namespace / "r0" / "tmp").iterdir()))
        tier = DiskTier(tmp_path, SCOPE)
        found = {stored for stored, _ in tier.scan()}
        assert {key(number) for number in acknowledged} <= found
        for number in range(NUMBERS):
            assert load(tier, number) in ({*contents(number)} if key(number) in found else {None})
        assert len(files_under(tmp_path)) == len(found), "nothing else is left"
    assert acknowledged
    assert killed_inside_a_store > 20, "the kills hit stores"


@pytest.mark.parametrize("limit", [0, 100, FOOTER_BYTES, FOOTER_BYTES + 1, FOOTER_BYTES + CHUNK_BYTES - 1])
def test_a_file_that_may_not_grow_further_is_a_full_tier(tier: DiskTier, tmp_path: Path, limit: int) -> None:
    """The kernel cuts the write short at the limit, as a full disk does."""

    def store() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(TierFull, match="File too large"):
            tier.put(key(1), payload(1))

    assert exit_status(in_child(store)) == 0
    assert files_under(tmp_path) == []


FAILURES = [
    (errno.ENOSPC, TierFull, "No space left"),
    (errno.EDQUOT, TierFull, "quota"),
    (errno.EIO, TierError, "Input/output error"),
    (errno.EROFS, TierError, "Read-only file system"),
]


@pytest.mark.parametrize("call", ["open", "pwritev", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize(("number", "kind", "said"), FAILURES, ids=[errno.errorcode[number] for number, *_ in FAILURES])
def test_a_failed_store_leaves_nothing_and_harms_nothing(
    tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type, said: str
) -> None:
    tier.put(key(1), payload(1))
    before = files_under(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    owner = Path if call == "mkdir" else os
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        with pytest.raises(TierError, match=said) as caught:
            tier.put(key(2), payload(2))
        assert type(caught.value) is kind
        assert key(2).hex() in str(caught.value)
        if call != "mkdir":  # replacing needs no new folder
            with pytest.raises(TierError):
                tier.put(key(1), payload(3))
    assert load(tier, 1) == payload(1)
    assert load(tier, 2) is None
    assert files_under(tmp_path) == before
    tier.put(key(2), payload(2))
    assert load(tier, 2) == payload(2)


def test_a_store_whose_folder_cannot_be_synced_is_taken_back(
    tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fail_for_folders(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    tier.put(key(1), payload(1))
    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(TierError, match="Input/output error"):
        tier.put(key(1), payload(2))
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("call", ["open", "preadv", "pread"])
def test_a_failed_load_names_file_and_cause(tier: DiskTier, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    tier.put(key(1), payload(1))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        pretend_cached(patch, call == "pread")
        if call == "pread":  # which asks what the compiled code met
            patch.setattr(read_loop, "read_and_hash", lambda *_: (0, 0, True))
        with pytest.raises(TierError, match=f"cannot load .*{key(1).hex()}: Input/output error") as caught:
            load(tier, 1)
    assert type(caught.value) is TierError
    assert load(tier, 1) == payload(1)


def test_a_failure_that_the_compiled_code_meets(
    tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not injected: the kernel reads no file that was opened to be written. Also a failure that is over before Python asks for it costs no
    chunk."""
    pretend_cached(monkeypatch, True)
    tier.put(key(1), payload(1))
    path = chunk_file(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(file_read, "open_to_read", lambda *_: os.open(path, os.O_WRONLY))
        with pytest.raises(TierError, match=f"cannot load .*{key(1).hex()}: Bad file descriptor") as caught:
            load(tier, 1)
    assert type(caught.value) is TierError
    monkeypatch.setattr(read_loop, "read_and_hash", lambda *_: (4096, 0, True))
    with pytest.raises(TierError, match="a read failed and then did not") as caught:
        load(tier, 1)
    assert type(caught.value) is TierError


def test_other_failed_calls_are_tier_errors(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tier.put(key(1), payload(1))
    for call in ("stat", "unlink", "scandir"):
        monkeypatch.setattr(os, call, fail)
    for work in (lambda: tier.contains([key(1)]), lambda: tier.delete(key(1)), lambda: list(tier.scan())):
        with pytest.raises(TierError, match="Input/output error"):
            work()


@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_a_read_only_folder_fails_at_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os if call == "open" else Path, call, refuse)
    with pytest.raises(TierError, match=f"cannot write in {tmp_path}.*: Read-only file system"):
        DiskTier(tmp_path, SCOPE)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "size",
    [0, 1, FOOTER_BYTES - 1, FOOTER_BYTES, FOOTER_BYTES + 1, 20_000, 40_960, FULL - 1, FULL + 1, 45_056, 50_000],
)
def test_a_file_of_a_wrong_size_is_corrupt_and_can_be_replaced(
    tier: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, cached: bool
) -> None:
    """Whichever way it is read; the size is what a read of the file finds, so it may also change meanwhile."""
    tier.put(key(1), payload(1))
    os.truncate(chunk_file(tmp_path), size)
    pretend_cached(monkeypatch, cached)
    with pytest.raises(Corrupt, match=f"{key(1).hex()}: (the file|it) has {size} bytes instead of 44096"):
        load(tier, 1)
    may_be_compressed = FOOTER_BYTES < size < FULL  # only its footer could tell, and a start reads no footer of so many
    assert list(tier.scan()) == ([(key(1), size)] if may_be_compressed else [])
    tier.delete(key(1))
    assert files_under(tmp_path) == []
    tier.put(key(1), payload(2))
    assert load(tier, 1) == payload(2)


@pytest.mark.parametrize("compress", ["lossless", "lossless-max"])
def test_a_damaged_compressed_chunk_is_never_served(tmp_path: Path, compress: Compress) -> None:
    """Flipped bits and cuts anywhere, whichever part of the code they meet."""
    tier = DiskTier(tmp_path, replace(CODED, compress=compress))
    tier.put(key(1), kv_payload(1))
    path, out = chunk_file(tmp_path), memoryview(bytearray(CHUNK_BYTES))
    good = path.read_bytes()
    rng = random.Random(1)
    for number in range(3000):
        place = rng.randrange(len(good))
        bad = (
            good[:place]
            if number % 3 == 0
            else good[:place] + bytes([good[place] ^ 1 << number % 8]) + good[place + 1 :]
        )
        path.write_bytes(bad)
        with pytest.raises(Corrupt):
            tier.get(key(1), out)
    path.write_bytes(good)
    assert load(tier, 1) == kv_payload(1)


def test_a_fault_of_the_codec_itself_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum is that of the raw chunk: an encoder that loses a bit makes a miss."""
    tier = DiskTier(tmp_path, CODED)

    def lossy(compress: Compress, element: Element, raw: memoryview) -> memoryview | None:
        return encode(compress, element, memoryview(bytes([raw[0] ^ 1]) + raw[1:]))

    with monkeypatch.context() as patch:
        patch.setattr(stored, "encode", lossy)
        tier.put(key(1), kv_payload(1))
    with pytest.raises(Corrupt, match="checksum of the raw chunk"):
        load(tier, 1)


def test_a_flipped_bit_at_any_byte_is_never_served(tier: DiskTier, tmp_path: Path) -> None:
    tier.put(key(1), payload(1))
    out = memoryview(bytearray(CHUNK_BYTES))
    with chunk_file(tmp_path).open("r+b", buffering=0) as file:
        raw = file.read()
        for position, byte in enumerate(raw):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << position % 8]), position)
            with pytest.raises(Corrupt):
                tier.get(key(1), out)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert load(tier, 1) == payload(1)


def test_a_chunk_under_another_s_name_is_not_served(tier: DiskTier, tmp_path: Path) -> None:
    tier.put(key(1), payload(1))
    first = chunk_file(tmp_path)
    tier.put(key(2), payload(2))
    [second] = (path for path in files_under(tmp_path) if path != first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(Corrupt, match="another key"):
        load(tier, 2)


def test_a_chunk_of_zeros_is_not_served(tier: DiskTier, tmp_path: Path) -> None:
    """What some file systems leave after a power cut: the right length, no bytes."""
    tier.put(key(1), payload(1))
    chunk_file(tmp_path).write_bytes(bytes(FOOTER_BYTES + CHUNK_BYTES))
    with pytest.raises(Corrupt, match="not a chunk"):
        load(tier, 1)


def test_a_clock_that_jumps_back_changes_only_the_order_of_a_scan(tier: DiskTier, tmp_path: Path) -> None:
    for number, seconds in ((1, 4_000_000_000), (2, 0), (3, 1_000)):
        tier.put(key(number), payload(number))
        [path] = (found for found in files_under(tmp_path) if found.name == key(number).hex())
        os.utime(path, (seconds, seconds))
    assert [found for found, _ in tier.scan()] == [key(2), key(3), key(1)]
    assert load(tier, 1) == payload(1)


def test_several_processes_evict_and_fill_the_same_folder(tmp_path: Path) -> None:
    """Each may find a chunk gone at any moment, and never finds a wrong one."""

    def rival(seed: int) -> None:
        chance = random.Random(seed)
        tier = DiskTier(tmp_path, SCOPE, fsync=False)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            number = chance.randrange(NUMBERS)
            action = chance.randrange(5)
            if action == 0:
                tier.put(key(number), memoryview(chance.choice(contents(number))))
            elif action == 1:
                tier.delete(key(number))
            elif action == 2:
                assert {found for found, _ in tier.scan()} <= {key(known) for known in range(NUMBERS)}
            elif action == 3:
                tier.contains([key(known) for known in range(NUMBERS)])
            else:
                assert load(tier, number) in {None, *contents(number)}

    children = [in_child(lambda seed=seed: rival(seed)) for seed in range(3)]
    assert [exit_status(child) for child in children] == [0, 0, 0]
    tier = DiskTier(tmp_path, SCOPE)
    assert len(files_under(tmp_path)) == len(list(tier.scan())), "no temporary file is left"


def test_an_evictor_against_a_writer_of_the_same_chunk(tmp_path: Path) -> None:
    """Two processes and one name: what a third reads is whole or absent, and the last word is the writer's."""

    def write() -> None:
        tier = DiskTier(tmp_path, SCOPE, fsync=False)
        end = time.monotonic() + 60
        for turn in itertools.count():
            if turn >= 400 and (tmp_path / "met").exists():
                break
            assert time.monotonic() < end, "the evictor never came"
            content = contents(1)[turn % len(contents(1))]
            tier.put(key(1), memoryview(content))
            assert load(tier, 1) in {None, content}

    def evict() -> None:
        tier = DiskTier(tmp_path, SCOPE, fsync=False)
        evicted = 0
        while not (tmp_path / "stop").exists():
            evicted += tier.contains([key(1)]) == [True]
            tier.delete(key(1))
            if evicted == 21:
                (tmp_path / "met").touch()

    writer, evictor = in_child(write), in_child(evict)
    tier = DiskTier(tmp_path, SCOPE)
    while os.waitid(os.P_PID, writer, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert load(tier, 1) in {None, *contents(1)}
    (tmp_path / "stop").touch()
    assert (exit_status(writer), exit_status(evictor)) == (0, 0)
    for name in ("stop", "met"):
        (tmp_path / name).unlink()
    tier.put(key(1), payload(1))
    assert load(tier, 1) == payload(1)
    assert files_under(tmp_path) == [chunk_file(tmp_path)] and chunk_file(tmp_path).name == key(1).hex()


def test_a_folder_that_is_emptied_is_filled_again(tier: DiskTier, tmp_path: Path) -> None:
    tier.put(key(1), payload(1))
    shutil.rmtree(tmp_path)
    assert load(tier, 1) is None
    assert tier.contains([key(1)]) == [False]
    tier.delete(key(1))
    tier.put(key(1), payload(2))
    assert load(tier, 1) == payload(2)
    assert list(tier.scan()) == [(key(1), stored_bytes(CHUNK_BYTES))]


def test_a_tier_can_be_opened_while_others_scan(tmp_path: Path) -> None:
    def open_often() -> None:
        for _ in range(150):
            assert list(DiskTier(tmp_path, SCOPE).scan()) == []

    children = [in_child(open_often) for _ in range(3)]
    assert [exit_status(child) for child in children] == [0, 0, 0]


def test_instances_with_other_scopes_share_the_folder(tmp_path: Path) -> None:
    others = [TierScope("another", rank, SCOPE.layout, CHUNK_BYTES + rank) for rank in (0, 1)]
    tiers = [DiskTier(tmp_path, scope) for scope in (SCOPE, *others)]
    for tier, scope in zip(tiers, (SCOPE, *others), strict=True):
        tier.put(key(1), payload(1, scope.chunk_bytes))
    for tier, scope in zip(tiers, (SCOPE, *others), strict=True):
        assert list(tier.scan()) == [(key(1), stored_bytes(scope.chunk_bytes))]
        assert load(tier, 1, scope.chunk_bytes) == payload(1, scope.chunk_bytes)
