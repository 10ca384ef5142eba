"""Sums chunk files up by the prefix that they continue: the first chunk of a prompt, and everything that hangs below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmc.cache.keys import ChunkKey
from lmc.probe.inspect import Inspection
from lmc.report import Column, Table
from lmc.units import format_size

_Name = tuple[str, int, ChunkKey]  # namespace, rank, key


@dataclass
class Prefix:
    """All chunks of one namespace and rank that begin with one chunk."""

    namespace: str
    rank: int
    first: ChunkKey
    complete: bool  # False: `first` continues a chunk that is not among the files
    chunks: int = 0
    longest: int = 0  # chunks in a row from `first`
    ends: int = 0  # chunks that no other chunk continues
    file_bytes: int = 0


def prefixes(found: Iterable[Inspection]) -> list[Prefix]:
    """The prefix with the most bytes first. Files that are damaged, or are no chunks, are left out."""
    files = {
        (one.footer.namespace, one.footer.rank, one.footer.key): one
        for one in found
        if one.problem is None and one.footer is not None
    }
    continued = {_before(one) for one in files.values()}
    places: dict[_Name, tuple[_Name, int]] = {}
    sums: dict[_Name, Prefix] = {}
    for name, one in files.items():
        first, position = _place(name, files, places)
        prefix = sums.setdefault(first, Prefix(*first, complete=_before(files[first]) is None))
        prefix.chunks += 1
        prefix.longest = max(prefix.longest, position)
        prefix.ends += name not in continued
        prefix.file_bytes += one.file_bytes
    return sorted(sums.values(), key=lambda prefix: (-prefix.file_bytes, prefix.first))


def _place(name: _Name, files: Mapping[_Name, Inspection], places: dict[_Name, tuple[_Name, int]]) -> tuple[_Name, int]:
    """The first chunk of its prefix that is there, and its place from there, counted from 1. Fills in `places` on the way.

    Footers that continue each other in a circle are forged; the circle is cut where it was entered.
    """
    row: dict[_Name, None] = {}
    at = name
    while at not in places:
        before = _before(files[at])
        if before is None or before not in files or before in row or before == at:
            places[at] = (at, 1)
        else:
            row[at] = None
            at = before
    first, position = places[at]
    for step, chunk in enumerate(reversed(row), start=1):
        places[chunk] = (first, position + step)
    return places[name]


def _before(one: Inspection) -> _Name | None:
    footer = one.footer
    assert footer is not None
    return None if footer.parent is None else (footer.namespace, footer.rank, footer.parent)


def prefixes_table(found: list[Prefix], most: int) -> Table:
    columns = [
        Column("first chunk"),
        Column("namespace"),
        Column("rank", decimals=0),
        Column("chunks", decimals=0),
        Column("longest", "chunks", 0),
        Column("different ends", decimals=0),
        Column("bytes"),
    ]
    rows = [
        (
            prefix.first.hex()[:16] + ("" if prefix.complete else " (continues a chunk that is not here)"),
            prefix.namespace,
            prefix.rank,
            prefix.chunks,
            prefix.longest,
            prefix.ends,
            format_size(prefix.file_bytes),
        )
        for prefix in found[:most]
    ]
    rest = found[most:]
    note = (
        f"And {len(rest)} more, with {sum(prefix.chunks for prefix in rest)} chunks and "
        f"{format_size(sum(prefix.file_bytes for prefix in rest))}."
        if rest
        else ""
    )
    return Table("Prefixes", columns, rows, note)
