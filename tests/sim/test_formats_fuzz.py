"""A wrong value anywhere in a trace is one clear line or is harmless; it is never a traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc.errors import TraceError
from lmc.sim import stack
from lmc.sim.describe import describe
from lmc.sim.formats import FORMATS
from lmc.sim.formats.base import ReadOptions

COMPONENTS = {"sys_prompt": [1], "passages_ids": [2], "history": [], "web_search": [], "user_input": [3]}
LINES: dict[str, list[Any]] = {
    "lmc": [
        {"format": "lmc-trace", "version": 1, "chunk_tokens": 4, "chunk_bytes": 8, "namespace": "n"},
        {"t": 1, "tokens": 9, "chunks": ["00000000000000aa"] * 1, "tenant": "", "hit_tokens": {"host": 4}},
    ],
    "lmcache": [
        {
            "timestamp": 1.5,
            "model_name": "m",
            "chunk_size": 4,
            "seq_len": 9,
            "dtypes": ["int8"],
            "shapes": [[4, 2]],
            "chunk_hashes": ["0xa", "0xb"],
        }
    ],
    "bailian": [
        {
            "chat_id": 1,
            "parent_chat_id": -1,
            "timestamp": 0.5,
            "input_length": 20,
            "output_length": 1,
            "type": "text",
            "hash_ids": [1, 2],
        }
    ],
    "ragpulse": [
        {"timestamp": "3", "input_length": 40, "output_length": 1, "session_id": "s", "hash_ids": COMPONENTS},
    ],
    "mooncake": [{"timestamp": 5, "input_length": 900, "output_length": 1, "hash_ids": [1, 2]}],
    "kv-cache-tester": [
        {
            "id": "a",
            "block_size": 64,
            "hash_id_scope": "local",
            "requests": [
                {"t": 0.5, "type": "n", "in": 100, "out": 3, "hash_runs": [[1, 2]]},
                {"t": 1.5, "type": "subagent", "requests": [{"t": 0, "in": 10, "out": 3, "hash_runs": [[9, 1]]}]},
            ],
        }
    ],
    "vllm-events": [
        {
            "ts": 1.0,
            "events": [
                {"type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None, "block_size": 16},
                ["BlockStored", [3], 2, [], 16, None, "GPU"],
            ],
        }
    ],
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@pytest.mark.parametrize("name", sorted(LINES))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_wrong_value_is_one_line_or_harmless(name: str, tmp_path: Path, data: st.DataObject) -> None:
    for number, part in enumerate(("sys_prompt", "passages", "history", "user_input", "web_search"), start=1):
        field = "passage" if part == "passages" else part
        rows = [{f"{field}_id": index, "token_length": 16} for index in (1, 2, 3)]
        (tmp_path / f"{number}_{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [copy.deepcopy(line) for line in LINES[name] + LINES[name][-1:]]
    index = data.draw(st.integers(0, len(lines) - 1))
    *parents, last = data.draw(st.sampled_from(places(lines[index])))
    target = lines[index]
    for key in parents:
        target = target[key]
    if isinstance(target, dict) and data.draw(st.booleans()):
        del target[last]
    else:
        target[last] = data.draw(ANYTHING)
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    try:
        trace = FORMATS[name].read(path, ReadOptions())
    except TraceError as error:
        assert "\n" not in str(error) and path.name in str(error)
        return
    assert (trace.parents < range(trace.num_unique)).all()
    curve = stack.hit_curve(stack.profile(trace))
    assert 0 <= curve.at(10)[0] <= curve.total_blocks
    assert 0 <= curve.at(10)[1] <= curve.total_tokens
    describe(trace)


def test_the_unharmed_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for name in sorted(LINES.keys() - {"ragpulse"}):
        path.write_text("\n".join(map(json.dumps, LINES[name])))
        assert FORMATS[name].read(path, ReadOptions()).num_blocks > 0
