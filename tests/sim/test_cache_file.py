from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from lmc.errors import TraceError
from lmc.sim import cache_file
from lmc.sim.formats import read_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.trace import Trace

TEXT = (
    '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}\n'
    '{"timestamp": 5, "input_length": 1000, "output_length": 1, "hash_ids": [1, 3]}\n'
)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "trace.jsonl"
    path.write_text(TEXT)
    return path


def same(left: Trace, right: Trace) -> bool:
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(Trace)]
    return all(np.array_equal(a, b) and a.dtype == b.dtype if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def test_the_second_load_reads_the_cache_file_and_gives_the_same_trace(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache_file.load_trace(path, ReadOptions())
    assert path.with_name("trace.jsonl.lmcsim").exists()
    monkeypatch.setattr(cache_file, "read_trace", None)  # a second parse would fail
    second = cache_file.load_trace(path, ReadOptions())
    assert same(first, second) and same(first, read_trace(path))
    assert second.ids.flags.writeable  # the compiled kernels are built for plain arrays


def test_a_changed_trace_or_other_options_are_read_anew(path: Path) -> None:
    cache_file.load_trace(path, ReadOptions())
    assert cache_file.load_trace(path, ReadOptions(block_tokens=1024)).block_tokens == 1024
    path.write_text(TEXT + TEXT.replace('"timestamp": 0', '"timestamp": 5').replace("[1, 3]", "[1, 9]"))
    assert cache_file.load_trace(path, ReadOptions()).num_requests == 4


def test_a_damaged_cache_file_is_replaced(path: Path) -> None:
    whole = cache_file.load_trace(path, ReadOptions())
    file = path.with_name("trace.jsonl.lmcsim")
    good = file.read_bytes()
    for bad in (b"", good[:30], good[:-1], good + b"x", b"\0" * len(good)):
        file.write_bytes(bad)
        assert same(cache_file.load_trace(path, ReadOptions()), whole)
        assert file.read_bytes() == good


def test_a_read_only_folder_falls_back_to_the_users_cache(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.chmod(0o555)
    cache_file.load_trace(path, ReadOptions())
    assert list(path.parent.iterdir()) == [path]
    assert len(list((tmp_path / "home" / "lmc" / "traces").glob("*.lmcsim"))) == 1
    path.parent.chmod(0o755)


def test_errors_name_the_trace_and_leave_no_cache_file(path: Path) -> None:
    path.write_text("{")
    with pytest.raises(TraceError, match="line 1"):
        cache_file.load_trace(path, ReadOptions())
    with pytest.raises(TraceError, match="No such file"):
        cache_file.load_trace(path.with_name("absent"), ReadOptions())
    assert list(path.parent.iterdir()) == [path]
