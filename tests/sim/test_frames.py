"""The simulator as DataFrames: the same numbers as the commands, and the example of docs/python.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lmc.errors import ConfigError, TraceError
from lmc.sim import frames, stack
from lmc.sim.cost import CostModel, Prefill, TierCost, known_token_bytes
from lmc.sim.formats import read_trace
from lmc.sim.policies import hits_at
from lmc.sim.tune import make_budget, tune

DOCS = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    lines = []
    chats: dict[int, list[int]] = {}
    for number in range(120):
        chat = number * 7 % 11
        chain = chats.setdefault(chat, [1000 * chat])
        chain.append(1000 * chat + len(chain))
        lines.append(
            {
                "timestamp": 2000 * number,
                "input_length": len(chain) * 512 - 9,
                "output_length": 3,
                "hash_ids": list(chain),
                "session_id": f"s{chat}",
                **({"class": "tool"} if number % 3 else {}),
            }
        )
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_trace_becomes_a_frame_and_back(path: Path) -> None:
    trace, requests = read_trace(path), frames.read_trace(path)
    again = frames.to_trace(requests)
    for name in ("ids", "starts", "timestamps_s", "input_tokens", "output_tokens", "parents", "sessions", "classes"):
        assert getattr(again, name).tolist() == getattr(trace, name).tolist(), name
    assert (again.block_tokens, again.tenant_names) == (trace.block_tokens, trace.tenant_names)
    assert again.class_names == trace.class_names == ("", "tool")
    unclassed = frames.to_trace(requests.drop(columns="class"))
    assert unclassed.class_names == ("",) and not unclassed.classes.any()
    assert requests.attrs["format"] == "mooncake" and len(requests) == 120


def test_curves_are_those_of_the_command(path: Path) -> None:
    trace, requests = read_trace(path), frames.read_trace(path)
    profile = stack.profile(trace)
    curve = stack.hit_curve(profile, "last-half")
    found = frames.hit_curve(requests, policy=["lru", "fifo"], capacities=[5, 50, np.inf], window="last-half")
    for name in ("lru", "fifo"):
        expected = [hits.tokens for hits in hits_at(profile, name, [5, 50, np.inf], "last-half", curve)]
        assert found[found["policy"] == name]["hit_tokens"].tolist() == expected
    whole = frames.hit_curve(requests, token_bytes=100)
    assert whole["hit_rate"].is_monotonic_increasing and whole["capacity_bytes"].iloc[-1] == trace.num_unique * 51200
    assert frames.hit_curve(requests, chunk_tokens=1024, capacities=[9])["capacity_tokens"].tolist() == [9 * 1024]
    with pytest.raises(ConfigError, match="unknown eviction policy"):
        frames.hit_curve(requests, policy="mru")


def test_rows_may_be_chosen_and_sorted(path: Path) -> None:
    requests = frames.read_trace(path)
    some = requests[requests["session"] < 5].sample(frac=1, random_state=1)
    trace = frames.to_trace(some)
    assert trace.num_requests == len(some) and (np.diff(trace.timestamps_s) >= 0).all()
    mine = requests[requests["session"] < 5]
    assert (
        frames.hit_curve(some, capacities=[9])["hit_tokens"].tolist()
        == frames.hit_curve(mine, capacities=[9])["hit_tokens"].tolist()
    )
    with pytest.raises(TraceError, match="has no tenant"):
        frames.to_trace(requests.drop(columns="tenant"))
    with pytest.raises(TraceError, match="has no block_tokens"):
        frames.to_trace(pd.concat([requests, requests]).pipe(bare))


def bare(frame: pd.DataFrame) -> pd.DataFrame:
    frame.attrs = {}
    return frame


def test_replays_have_a_row_for_each_request(path: Path) -> None:
    requests = frames.read_trace(path)
    settings = {"host": {"capacity": 20 * 51200}, "chunk_tokens": 512}
    served = frames.replay(requests, settings, token_bytes=100)
    assert len(served) == 120 and "ttft_s" not in served
    assert (served["hit_tokens"] == served["host_hit_tokens"]).all() and served["hit_tokens"].sum() > 0
    cost = CostModel(Prefill(0, 1e-4, 0), 100, {"host": TierCost("host", 1e9)})
    timed = frames.replay(requests, settings, cost=cost, instances=2)
    assert (timed["ttft_s"] > 0).all() and set(timed["instance"]) == {0, 1}
    assert timed.attrs["counts"]["evicted from host"] > 0


def test_tuning_marks_the_chosen_configuration(path: Path) -> None:
    requests = frames.read_trace(path)
    tried = frames.tune(requests, memory="2MB", policies=["lru"], token_bytes=100)
    expected = tune(
        read_trace(path), known_token_bytes(read_trace(path), 100, None), make_budget("2MB", "0", None, None), ["lru"]
    )
    assert tried["chosen"].tolist().count(True) == 1 and tried["chosen"].iloc[0]
    assert tried.attrs["expected_hit_rate"] == expected.expected.value
    assert tried.attrs["settings"]["host"]["capacity"] == expected.chosen.host_bytes


def test_the_chosen_configuration_is_there_once(path: Path) -> None:
    """It is judged by a replay and the others in closed form, so its hit rate once made it another one."""
    tried = frames.tune(frames.read_trace(path), memory="500KB", disk="6MB", policies=["lru"], token_bytes=100)
    columns = tried.columns.tolist()
    assert not tried.duplicated(columns[1 : columns.index("min_load_tokens") + 1]).any()


def test_the_example_of_the_docs_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(path.parent)
    exec(compile(code, str(DOCS), "exec"), {})
    shown = capsys.readouterr().out
    assert "arc" in shown and "hit_tokens" in shown and "'write'" in shown
