"""Traces of models with several KV groups: the record says its model's shape, and what does not simulate that refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.keys import ChunkKey
from lmc.cache.observe.record import TraceRecorder
from lmc.cache.parts import Group
from lmc.cache.shape import ModelShape
from lmc.errors import ConfigError, TraceError
from lmc.sim import capacity, grid_show, replay_show, tune
from lmc.sim.cache_file import load_trace
from lmc.sim.formats.base import ReadOptions
from lmc.sim.sweep import run_sweep
from lmc.sim.trace import Trace

CHUNK = 4
SHAPE = ModelShape((Group("full", CHUNK), Group("window", CHUNK, 3)), (1000, 500))


def keys(*numbers: int) -> list[ChunkKey]:
    return [ChunkKey(number.to_bytes(8, "big") * 4) for number in numbers]


def settings(**values: object) -> CacheConfig:
    return CacheConfig.model_validate({"host": {"capacity": 100_000}, "metrics": {"enabled": False}, **values})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A prompt, one that parts from it in its last chunk, and another such one."""
    path = tmp_path / "record.jsonl"
    shape = SHAPE.to_json()
    recorder = TraceRecorder(
        path, limit=1 << 30, chunk_tokens=CHUNK, chunk_bytes=1000, namespace="n", now=0.0, shape=shape
    )
    for number, last in enumerate((3, 4, 5)):
        recorder.lookup(float(number), str(number), 17, keys(0, 1, 2, last), "", {})
    recorder.close()
    return path


def test_a_record_says_its_models_shape(path: Path) -> None:
    """Also when it is read from the file that keeps the parsed trace."""
    for _ in range(2):
        trace = load_trace(path, ReadOptions())
        assert trace.shape == SHAPE
    assert path.with_name(path.name + ".lmcsim").exists()
    config = settings(chunk_tokens=CHUNK, checkpoint_tokens=8)
    hits = replay_show.replay_settings(trace, config).hit_tokens["host"]
    assert hits.tolist() == [0, 8, 12]  # the last checkpoint inside what was found, and the one that was stored there


def test_a_shape_may_come_from_a_file(path: Path, tmp_path: Path) -> None:
    windows = ModelShape((*SHAPE.groups, Group("window", CHUNK, 6)), (1000, 500, 500))
    file = tmp_path / "shape.json"
    file.write_text(json.dumps(windows.to_json()))
    trace = load_trace(path, ReadOptions())
    config = settings(chunk_tokens=CHUNK, checkpoint_tokens=8, host={"capacity": 7_000})
    hits = [
        replay_show.replay_settings(trace, config, shape=shape).hit_tokens["host"].tolist()
        for shape in (None, replay_show.load_shape(file))
    ]
    assert hits[0] != hits[1], "more parts than fit"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"this is not a model's shape"):
        replay_show.load_shape(file)


@pytest.mark.parametrize(
    "replay",
    [
        lambda trace: run_sweep(trace, ("lru",), capacity.DEFAULT, "all", ()),
        lambda trace: grid_show.tiers(trace, {"host": ("50%",), "disk": ("0",)}, "all", None, False, 0),
        lambda trace: tune.tune(trace, 1, tune.make_budget("1MiB", "0", None, None), ("lru",), None),
    ],
)
def test_other_replays_refuse_such_a_trace(path: Path, replay: Callable[[Trace], object]) -> None:
    with pytest.raises(TraceError, match=r"a model that has several KV groups.*only `lmc sim replay` simulates that"):
        replay(load_trace(path, ReadOptions()))


def test_what_is_not_simulated_with_several_groups(path: Path) -> None:
    trace = load_trace(path, ReadOptions())
    with pytest.raises(ConfigError, match=r"set disk.compress to none"):
        replay_show.replay_settings(trace, settings(disk={"path": "/nowhere", "compress": "lossless"}))
    with pytest.raises(ConfigError, match="chunk_tokens 6 does not fit"):
        replay_show.replay_settings(trace, settings(chunk_tokens=6))
    states = ModelShape((Group("full", CHUNK), Group("state", CHUNK)), (1000, 500))
    with pytest.raises(ConfigError, match="recurrent states are not simulated yet"):
        replay_show.replay_settings(trace, settings(), shape=states)
