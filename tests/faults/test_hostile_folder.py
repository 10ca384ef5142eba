"""A disk folder into which others have put anything: nothing there blocks, is followed out of the folder, or takes the tier away."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import FORMAT
from lmc.errors import Corrupt
from tests.cache.instance import Instance, chunk_files, prompt, settings
from tests.contracts.tier import SCOPE, key, load, payload

pytestmark = pytest.mark.fault

TOKENS = prompt(1, 50)  # six chunks and a bit


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        folder = os.open(path.parent, os.O_RDONLY)  # the path itself may be too long for a socket's address
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def link_to(target: Callable[[Path], Path | str]) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target(path))


def filled_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("somebody's")


ENTRIES: dict[str, Callable[[Path], None]] = {
    "fifo": fifo,
    "socket": listening_socket,
    "folder": Path.mkdir,
    "filled folder": filled_folder,
    "link to itself": link_to(lambda path: path),
    "link to nothing": link_to(lambda _: "/nonexistent/chunk"),
    "link to zeros": link_to(lambda _: "/dev/zero"),
    "link to a whole chunk": link_to(lambda path: path.with_name("aside")),
}
every_entry = pytest.mark.parametrize("put_there", ENTRIES.values(), ids=ENTRIES.keys())


def file_of(folder: Path, number: int) -> Path:
    name = key(number).hex()
    return folder / FORMAT / SCOPE.namespace / "r0" / name[:2] / name


@every_entry
def test_no_chunk_is_read_from_what_is_no_file_and_a_put_replaces_it(
    tmp_path: Path, put_there: Callable[[Path], None]
) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    tier.put(key(1), payload(1))
    path = file_of(tmp_path, 1)
    path.rename(path.with_name("aside"))
    put_there(path)
    with pytest.raises(Corrupt, match="not a regular file"):
        load(tier, 1)
    assert tier.contains([key(1)]) == [False]
    assert list(tier.scan()) == []
    assert tier.parents([key(1)]) == {}
    if put_there is filled_folder:
        for refused in (lambda: tier.put(key(1), payload(1)), lambda: tier.delete(key(1))):
            with pytest.raises(Corrupt, match="a folder that is not empty stands under"):
                refused()
        assert (path / "file").read_text() == "somebody's"
        shutil.rmtree(path)
    tier.put(key(1), payload(2))
    assert load(tier, 1) == payload(2)
    assert path.with_name("aside").read_bytes()[:100] == bytes(payload(1)[:100]), "what the link named is untouched"
    path.unlink()
    put_there(path)
    if put_there is not filled_folder:
        tier.delete(key(1))
        assert not os.path.lexists(path)


@every_entry
def test_the_folder_of_a_chunk_may_be_anything(tmp_path: Path, put_there: Callable[[Path], None]) -> None:
    tier = DiskTier(tmp_path / "disk", SCOPE)
    folder = file_of(tmp_path / "disk", 1).parent
    if put_there is not filled_folder and put_there is not Path.mkdir:
        put_there(folder)
    assert load(tier, 1) is None
    assert tier.contains([key(1)]) == [False]
    assert list(tier.scan()) == []
    tier.delete(key(1))
    tier.put(key(1), payload(1))
    assert load(tier, 1) == payload(1)


def test_nothing_is_written_or_read_through_a_link_to_another_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tier = DiskTier(tmp_path / "disk", SCOPE)
    tier.put(key(1), payload(1))
    folder = file_of(tmp_path / "disk", 1).parent
    shutil.copy(file_of(tmp_path / "disk", 1), elsewhere)
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    assert load(tier, 1) is None
    tier.delete(key(1))
    assert [path.name for path in elsewhere.iterdir()] == [key(1).hex()]
    tier.put(key(1), payload(2))
    assert load(tier, 1) == payload(2)
    assert (elsewhere / key(1).hex()).read_bytes()[:100] == bytes(payload(1)[:100])
    assert not folder.is_symlink()


@pytest.mark.parametrize("size", [1 << 40, 0])
def test_a_huge_sparse_file_costs_neither_memory_nor_time(tmp_path: Path, size: int) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    tier.put(key(1), payload(1))
    os.truncate(file_of(tmp_path, 1), size)
    with pytest.raises(Corrupt, match=f"has {size} bytes instead"):
        load(tier, 1)
    assert list(tier.scan()) == []


def test_a_file_that_may_not_be_read_counts_as_absent_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: root, who runs the tests in a container, may read everything."""
    tier = DiskTier(tmp_path, SCOPE)
    tier.put(key(1), payload(1))
    plain = os.open

    def refuse(path: str, *arguments: int, **options: int) -> int:
        if str(path).endswith(key(1).hex()):
            raise PermissionError(13, "Permission denied")
        return plain(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert load(tier, 1) is None
    assert load(tier, 1) == payload(1)


@every_entry
def test_an_entry_at_the_start_is_left_out_and_the_others_are_used(
    tmp_path: Path, put_there: Callable[[Path], None]
) -> None:
    """In the folder of temporary files, in that of a rank, and under a chunk's name."""
    first = Instance(settings(disk_path=tmp_path))
    first.serve(TOKENS)
    first.close()
    *_, last = chunk_files(tmp_path)
    rank = last.parents[1]
    last.rename(rank / "aside")
    for place in (rank / "tmp" / "x", rank / "y", last):
        if put_there is ENTRIES["link to a whole chunk"]:
            place.symlink_to(rank / "aside")
        else:
            put_there(place)
    second = Instance(settings(disk_path=tmp_path))
    assert second.scheduler.directory.usage()["disk"][0] == 5
    assert second.serve(TOKENS).loaded >= 0
    second.serve(TOKENS)
    assert second.serve(TOKENS).sources == {"host": 48}
    second.close()
    assert (rank / "aside").exists()


@every_entry
def test_the_folder_of_temporary_files_may_be_anything(tmp_path: Path, put_there: Callable[[Path], None]) -> None:
    tier = DiskTier(tmp_path / "disk", SCOPE)
    temporary = tmp_path / "disk" / FORMAT / SCOPE.namespace / "r0" / "tmp"
    temporary.rmdir()
    put_there(temporary)
    if put_there in (filled_folder, Path.mkdir):
        (temporary / "folder").mkdir()  # no temporary file of lmc's
    assert load(tier, 1) is None
    tier = DiskTier(tmp_path / "disk", SCOPE)
    assert list(tier.scan()) == []
    tier.put(key(1), payload(1))
    assert load(tier, 1) == payload(1)


def test_only_the_owner_may_read_what_is_stored(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        instance = Instance(settings(disk_path=tmp_path / "new" / "disk"))
        instance.serve(TOKENS)
        instance.close()
    finally:
        os.umask(before)
    found = list((tmp_path / "new" / "disk").rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()} == {0o700}
    assert stat.S_IMODE((tmp_path / "new" / "disk").stat().st_mode) == 0o700
