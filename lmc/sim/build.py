"""Builds a Trace from the requests of a reader: assigns dense ids, finds parents and runs the checks that every trace must pass."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmc.compiled import compiled
from lmc.errors import TraceError
from lmc.sim.trace import Int32, Int64, Trace


@dataclass
class TraceBuilder:
    """Collects requests one by one; finish() checks them all and returns the trace.

    With `sort`, requests are sorted by time (stable) instead of refused if they are out of order. With `rechain`, a hash that follows two
    different trace blocks becomes two trace blocks (of a trie) instead of being refused.
    """

    source: str
    format: str
    block_tokens: int
    sort: bool = False
    rechain: bool = False
    notes: list[str] = field(default_factory=list)
    _files: list[tuple[int, str]] = field(default_factory=list)
    _hashes: array[int] = field(default_factory=lambda: array("q"))
    _starts: array[int] = field(default_factory=lambda: array("q", [0]))
    _lines: array[int] = field(default_factory=lambda: array("q"))
    _timestamps_s: array[float] = field(default_factory=lambda: array("d"))
    _input_tokens: array[int] = field(default_factory=lambda: array("q"))
    _output_tokens: array[int] = field(default_factory=lambda: array("q"))
    _tenants: array[int] = field(default_factory=lambda: array("i"))
    _sessions: array[int] = field(default_factory=lambda: array("i"))
    _classes: array[int] = field(default_factory=lambda: array("i"))
    _names: dict[str, int] = field(default_factory=dict)
    _tenant_codes: dict[str, int] = field(default_factory=dict)
    _session_codes: dict[str, int] = field(default_factory=dict)
    _class_codes: dict[str, int] = field(default_factory=lambda: {"": 0})

    def add(
        self,
        line: int,
        hashes: Sequence[int] | Int64,
        timestamp_s: float,
        input_tokens: int,
        output_tokens: int,
        tenant: str = "",
        session: str | None = None,
        request_class: str = "",
    ) -> None:
        """Add one request from this line of the file. hashes are 64-bit integers that are equal exactly if the whole prefixes are equal."""
        if isinstance(hashes, np.ndarray):
            self._hashes.frombytes(np.ascontiguousarray(hashes, dtype=np.int64).tobytes())
        else:
            self._hashes.extend(hashes)
        self._starts.append(len(self._hashes))
        self._lines.append(line)
        self._timestamps_s.append(timestamp_s)
        self._input_tokens.append(input_tokens)
        self._output_tokens.append(output_tokens)
        self._tenants.append(self._tenant_codes.setdefault(tenant, len(self._tenant_codes)))
        code = -1 if session is None else self._session_codes.setdefault(session, len(self._session_codes))
        self._sessions.append(code)
        self._classes.append(self._class_codes.setdefault(request_class, len(self._class_codes)))

    def begin_file(self, name: str) -> None:
        """The requests that are added from now on are from this file, which is one of several."""
        self._files.append((len(self._lines), name))

    def _place(self, request: int) -> str:
        """The file and line of a request, whose number counts in the order of adding."""
        names = [name for first, name in self._files if first <= request]
        return f"{names[-1] if names else self.source}, line {self._lines[request]}"

    def name_to_int(self, names: Iterable[str]) -> list[int]:
        """Integers for hashes that are text."""
        known = self._names
        return [known.setdefault(name, len(known)) for name in names]

    def finish(self, lengths_only: bool = False) -> Trace:
        """Check and return the trace; with lengths_only it may have no trace blocks.

        Raises TraceError for an empty trace, for decreasing timestamps and for a hash with two parents.
        """
        starts = np.frombuffer(self._starts, dtype=np.int64)
        if len(self._lines) == 0:
            raise TraceError(f"{self.source}: the file has no request; check that this is the file you meant")
        if len(self._hashes) == 0 and not lengths_only:
            longest = max(range(len(self._lines)), key=self._input_tokens.__getitem__)
            raise TraceError(
                f"{self._place(longest)}: no request has a trace block of {self.block_tokens} tokens, and the longest prompt is this one "
                f"of {self._input_tokens[longest]}; give fewer --block-tokens if prompts are short, or a trace with hashes"
            )
        raw = np.frombuffer(self._hashes, dtype=np.int64)
        timestamps_s = np.frombuffer(self._timestamps_s, dtype=np.float64)
        order = np.arange(timestamps_s.size)
        backwards = np.flatnonzero(np.diff(timestamps_s) < 0)
        if backwards.size:
            first = int(backwards[0])
            if not self.sort:
                raise TraceError(
                    f"{self._place(first + 1)}: the timestamp goes back from {timestamps_s[first]:g} s to "
                    f"{timestamps_s[first + 1]:g} s; sort the file, or pass --sort"
                )
            order = np.argsort(timestamps_s, kind="stable")
            raw, starts = _reorder(raw, starts, order)
            self.notes.append("requests were sorted by time")
        input_tokens = np.frombuffer(self._input_tokens, dtype=np.int64)[order]
        if not input_tokens.any():
            raise TraceError(
                f"{self.source}: every prompt has 0 tokens, so no hit rate can be computed; repair the lengths"
            )
        ids, parents = self._number(raw, starts, order)
        self._check_lengths(starts, input_tokens, order)
        return Trace(
            source=self.source,
            format=self.format,
            block_tokens=self.block_tokens,
            ids=ids,
            starts=starts.copy(),
            timestamps_s=timestamps_s[order],
            input_tokens=input_tokens,
            output_tokens=np.frombuffer(self._output_tokens, dtype=np.int64)[order],
            parents=parents,
            tenants=np.frombuffer(self._tenants, dtype=np.int32)[order],
            tenant_names=tuple(self._tenant_codes),
            sessions=np.frombuffer(self._sessions, dtype=np.int32)[order],
            classes=np.frombuffer(self._classes, dtype=np.int32)[order],
            class_names=tuple(self._class_codes),
            notes=tuple(self.notes),
        )

    def _number(self, raw: Int64, starts: Int64, order: Int64) -> tuple[Int32, Int32]:
        if self.rechain:
            return _trie(raw, starts)
        if raw.size == 0:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
        low, high = int(raw.min()), int(raw.max())
        if high - low >= 4 * raw.size + 1024:
            _, raw = np.unique(raw, return_inverse=True)
            low, high = 0, int(raw.max())
        ids = np.empty(raw.size, dtype=np.int32)
        table = np.full(high - low + 1, -1, dtype=np.int32)
        num_unique = _number_by_first_use(raw, low, table, ids)
        parents = np.full(num_unique, -2, dtype=np.int32)
        request, position = _find_parents(ids, starts, parents)
        if request >= 0:
            raise TraceError(
                f"{self._place(int(order[request]))}: hash {raw[starts[request] + position]} (trace block {position}) follows "
                "another one than before, so the hashes are not chained over the prefix; pass --rechain to treat them as hashes of single "
                "trace blocks"
            )
        return ids, parents

    def _check_lengths(self, starts: Int64, input_tokens: Int64, order: Int64) -> None:
        too_long = np.flatnonzero((np.diff(starts) - 1) * self.block_tokens >= np.maximum(input_tokens, 1))
        if too_long.size:
            self.notes.append(
                f"{too_long.size} requests have more trace blocks than their input length fills "
                f"(first: {self._place(int(order[too_long[0]]))}); the surplus ones count as trace blocks but hold no tokens"
            )


@compiled()
def _number_by_first_use(raw: Int64, low: int, table: Int32, ids: Int32) -> int:
    num_unique = 0
    for index in range(raw.size):
        slot = raw[index] - low
        if table[slot] < 0:
            table[slot] = num_unique
            num_unique += 1
        ids[index] = table[slot]
    return num_unique


@compiled()
def _find_parents(ids: Int32, starts: Int64, parents: Int32) -> tuple[int, int]:
    """Fill parents (-2: not seen yet). Returns (request, position) of the first trace block with two parents, or (-1, -1)."""
    for request in range(starts.size - 1):
        parent = -1
        first = starts[request]
        for index in range(first, starts[request + 1]):
            block = ids[index]
            if parents[block] == -2:
                parents[block] = parent
            elif parents[block] != parent:
                return request, index - first
            parent = block
    return -1, -1


def _trie(raw: Int64, starts: Int64) -> tuple[Int32, Int32]:
    """(ids, parents) of chains, from hashes of single trace blocks."""
    nodes: dict[tuple[int, int], int] = {}
    parents = array("i")
    ids = array("i")
    hashes = raw.tolist()
    bounds = starts.tolist()
    for begin, end in itertools.pairwise(bounds):
        parent = -1
        for value in hashes[begin:end]:
            node = nodes.setdefault((parent, value), len(nodes))
            if node == len(parents):
                parents.append(parent)
            ids.append(node)
            parent = node
    return np.array(ids, dtype=np.int32), np.array(parents, dtype=np.int32)


def _reorder(raw: Int64, starts: Int64, order: Int64) -> tuple[Int64, Int64]:
    sizes = np.diff(starts)[order]
    new_starts = np.zeros(starts.size, dtype=np.int64)
    np.cumsum(sizes, out=new_starts[1:])
    within = np.arange(new_starts[-1], dtype=np.int64) - np.repeat(new_starts[:-1], sizes)
    return raw[np.repeat(starts[:-1][order], sizes) + within], new_starts
