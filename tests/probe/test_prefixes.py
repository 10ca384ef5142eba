"""Chunk files by prefix."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmc.cache.keys import ChunkKey
from lmc.cache.tiers.disk import DiskTier
from lmc.cache.tiers.format import ChunkFooter
from lmc.cli.cache import app
from lmc.probe.inspect import Inspection
from lmc.probe.prefixes import prefixes
from tests.contracts.tier import SCOPE, key, payload


def of(number: int, parent: int | None, num_bytes: int = 1, rank: int = 0) -> Inspection:
    before = None if parent is None else key(parent)
    return Inspection(Path(str(number)), num_bytes, ChunkFooter("n", rank, "l", key(number), 1, 0, before), None)


def test_two_ends_of_a_prefix_and_a_chunk_whose_start_is_gone() -> None:
    [shared, other] = prefixes([of(3, 2, 10), of(1, None, 10), of(2, 1, 10), of(4, 2, 10), of(9, 8, 30)])
    assert (shared.first, shared.chunks, shared.longest, shared.ends, shared.file_bytes) == (key(1), 4, 3, 2, 40)
    assert (other.first, other.chunks, other.complete, shared.complete) == (key(9), 1, False, True)


@given(st.data())
def test_every_chunk_is_counted_once_whatever_the_footers_say(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    parents = data.draw(st.lists(st.none() | st.integers(0, size + 2), min_size=size, max_size=size))
    found = prefixes(of(number, parent, number + 1) for number, parent in enumerate(parents))
    assert sum(prefix.chunks for prefix in found) == size
    assert sum(prefix.file_bytes for prefix in found) == sum(range(1, size + 1))
    for prefix in found:
        assert 1 <= prefix.longest <= prefix.chunks and prefix.ends <= prefix.chunks
    depth: dict[ChunkKey, int] = {}
    for number, parent in enumerate(parents):
        chain, at = [number], parent
        while at is not None and at < size and at not in chain:
            chain.append(at)
            at = parents[at]
        if at is None:  # an honest chain: from a first chunk
            depth[key(chain[-1])] = max(depth.get(key(chain[-1]), 0), len(chain))
    assert {prefix.first: prefix.longest for prefix in found if prefix.complete} == depth


def test_the_command(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, SCOPE)
    for number in range(3):
        tier.put(key(number), payload(number), parent=key(number - 1) if number else None)
    tier.close()
    result = CliRunner().invoke(app, ["inspect", "--by-prefix", str(tmp_path)])
    assert result.exit_code == 0 and key(0).hex()[:16] in result.output and "3 files, 0 damaged" in result.output
    [file] = tmp_path.rglob(key(2).hex())
    file.write_bytes(b"damaged")
    result = CliRunner().invoke(app, ["inspect", "--by-prefix", "--json", str(tmp_path)])
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert result.exit_code == 1 and [line["file"] for line in lines if "file" in line] == [str(file)]
    assert [line["chunks"] for line in lines if "first" in line] == [2]
