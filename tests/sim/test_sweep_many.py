"""Sweeps over many traces: the same rows wherever the jobs run, and nothing is lost or computed twice when a sweep is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import psutil
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lmc.cli import app
from lmc.errors import ConfigError, LmcError, RunError
from lmc.sim.capacity import CapacityOptions
from lmc.sim.formats import read_trace
from lmc.sim.sweep import run_sweep
from lmc.sim.sweep_jobs import Row
from lmc.sim.sweep_many import Swept, sweep_many
from lmc.sim.sweep_workers import run_jobs
from lmc.sim.trace_file import TraceFile, find_traces
from tests.sim.meeting import meet
from tests.sim.trace_files import Write

ROOT = Path(__file__).parents[2]
POLICIES = ("lru", "arc", "belady")
# A policy that is LRU and waits for a file before it begins.
WAITING = """
import time
from dataclasses import replace
from pathlib import Path
from lmc.cache.policy import lru

def make_state(num_nodes, capacity, parents):
    while not Path({gate!r}).exists():
        time.sleep(0.01)
    return lru.SPEC.make_state(num_nodes, capacity, parents)

SPEC = replace(lru.SPEC, name="waiting", make_state=make_state)
"""


def requests(seed: int) -> list[dict[str, object]]:
    chains = [[0, 1, 2], [0, 3 + seed], [0, 1, 2, 9], [4 + seed, 5], [0, 3 + seed], [0, 1]]
    return [
        {"timestamp": 1000 * number, "input_length": 512 * len(chain), "output_length": 1, "hash_ids": chain}
        for number, chain in enumerate([*chains, *chains])
    ]


@pytest.fixture
def folder(write: Write) -> Path:
    write(*requests(10), name="trace10.jsonl")
    return write(*requests(20), name="trace20.jsonl").parent


def sweep(folder: Path, out: Path, capacities: tuple[str, ...] = ("2", "50%", "inf"), workers: int = 1) -> Swept:
    traces, _ = find_traces([TraceFile(folder, cache=False)])
    return sweep_many(traces, POLICIES, CapacityOptions(blocks=capacities), out, (512, 1024), workers=workers)


def command(out: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "lmc", "sim", "sweep", *map(str, arguments), "-o", str(out)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def test_each_row_is_that_of_a_sweep_over_one_trace(folder: Path, tmp_path: Path) -> None:
    done = sweep(folder, tmp_path / "out" / "rows.parquet")
    expected = [
        (str(path), row.chunk_tokens, row.policy, row.capacity_blocks, row.hit_blocks, row.hit_tokens, row.total_tokens)
        for path in sorted(folder.glob("*.jsonl"))
        for row in run_sweep(
            read_trace(path), POLICIES, CapacityOptions(blocks=("2", "50%", "inf")), chunk_sizes=(512, 1024)
        ).rows
    ]
    names = ("trace", "chunk_tokens", "policy", "capacity_blocks", "hit_blocks", "hit_tokens", "total_tokens")
    assert [tuple(row[name] for name in names) for row in done.rows] == expected
    assert pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist() == done.rows
    assert not list((tmp_path / "out").glob("*.partial"))


def test_processes_write_the_same_file(folder: Path, tmp_path: Path) -> None:
    sweep(folder, tmp_path / "serial.parquet")
    sweep(folder, tmp_path / "parallel.parquet", workers=2)
    assert (tmp_path / "serial.parquet").read_bytes() == (tmp_path / "parallel.parquet").read_bytes()


def test_jobs_run_at_the_same_time(tmp_path: Path) -> None:
    jobs = [(str(tmp_path), "a", "b"), (str(tmp_path), "b", "a")]
    assert dict(run_jobs(meet, jobs, 2)) == {0: "a met b", 1: "b met a"}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra lmc-kv[ray])")
def test_a_local_ray_with_two_workers_writes_the_same_file(folder: Path, tmp_path: Path) -> None:
    """One process for both checks, because Ray takes seconds to start."""
    sweep(folder, tmp_path / "serial.parquet")
    code = (
        "import sys\nfrom lmc.cli import main\nfrom lmc.sim.sweep_workers import run_jobs\nfrom tests.sim.meeting import meet\n"
        f"print(sorted(run_jobs(meet, [({str(tmp_path)!r}, 'a', 'b'), ({str(tmp_path)!r}, 'b', 'a')], 2, 'local')))\n"
        "main()"
    )
    options = [
        "--policy",
        ",".join(POLICIES),
        "--capacity-blocks",
        "2,50%,inf",
        "--chunk-tokens",
        "512,1024",
        "--no-cache",
    ]
    arguments = ["sim", "sweep", folder, *options, "-o", tmp_path / "ray.parquet", "--ray", "local", "--workers", "2"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "[(0, 'a met b'), (1, 'b met a')]" in ran.stdout
    assert (tmp_path / "serial.parquet").read_bytes() == (tmp_path / "ray.parquet").read_bytes()


def test_without_ray_the_remedy_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmc-kv\[ray\]'"):
        list(run_jobs(meet, [("", "a", "b")], ray="local"))


def test_a_killed_sweep_goes_on(folder: Path, tmp_path: Path) -> None:
    gate, policy, out = tmp_path / "gate", tmp_path / "waiting.py", tmp_path / "rows.parquet"
    policy.write_text(WAITING.format(gate=str(gate)))
    options = ("--policy", f"lru,{policy}:SPEC", "--capacity-blocks", "2,3", "--workers", 2)
    arguments = command(out, *sorted(folder.glob("*.jsonl")), *options)
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "rows.parquet.partial"
    # lru of the first trace is done, and the policy waits in each worker.
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children)  # no worker outlives its parent
    assert not out.exists()

    # A mark on what was done shows that it is not computed again. Half a line is what a power failure may leave.
    done: list[Row] = [orjson.loads(line) for line in partial.read_bytes().splitlines()]
    marked = [{**row, "requests": 777} for row in done]
    partial.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in marked) + b'{"trace": "half')
    gate.touch()
    subprocess.run(arguments, env=environment(), check=True, capture_output=True)
    rows: list[Row] = pq.read_table(out).to_pylist()
    assert len(rows) == 8 and not partial.exists()
    assert {row["job"] for row in rows if row["requests"] == 777} == {row["job"] for row in done}
    assert [row["hit_blocks"] for row in rows[:2]] == [row["hit_blocks"] for row in rows[2:4]]  # it is LRU


def test_a_finished_sweep_can_be_widened_but_not_replaced(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    narrow = sweep(folder, out, ("2",)).rows
    wide = sweep(folder, out, ("2", "3")).rows
    assert [row for row in wide if row["capacity"] == "2"] == narrow
    before = out.read_bytes()
    with pytest.raises(ConfigError, match="has 12 results that this sweep does not ask for, such as lru at 3"):
        sweep(folder, out, ("2",))
    assert out.read_bytes() == before


def test_results_of_a_changed_trace_are_not_mixed_with_new_ones(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    sweep(folder, out)
    trace = folder / "trace10.jsonl"
    trace.write_text(trace.read_text() + json.dumps({**requests(10)[0], "timestamp": 99_000}) + "\n")
    with pytest.raises(ConfigError, match="has changed since"):
        sweep(folder, out)


def test_a_file_that_is_no_result_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    out.write_text("text")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        sweep(folder, out)
    assert out.read_text() == "text" and not list(tmp_path.glob("*.partial"))


def test_two_sweeps_do_not_write_one_file(folder: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "rows.parquet"
    with (tmp_path / "rows.parquet.partial").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another sweep writes"):
            sweep(folder, out)


def test_a_broken_trace_does_not_stop_the_others(folder: Path, tmp_path: Path) -> None:
    broken = folder / "trace20.jsonl"
    whole = broken.read_text()
    broken.write_text(whole + "{\n")
    out = tmp_path / "out.parquet"
    arguments = ["sim", "sweep", str(folder), "-o", str(out), "--capacity-blocks", "2,3", "--workers", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    shown = json.loads(result.stdout)
    assert len(shown["rows"]) == 2 and len(shown["notes"]) == 1 and "trace20.jsonl, line 13" in shown["notes"][0]
    broken.write_text(whole)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and len(json.loads(again.stdout)["rows"]) == 4


def test_a_worker_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a worker died"):
        list(run_jobs(os._exit, [3, 3], 2))


def test_folders_stand_for_their_traces(write: Write, tmp_path: Path) -> None:
    write(*requests(1), name="a.jsonl")
    write(*requests(2), name="a.jsonl.1")  # belongs to a.jsonl
    write(*requests(2), name=".hidden.jsonl")
    write("no trace", name="notes.txt")
    (tmp_path / "logs").mkdir()
    log = {"timestamp": 1.0, "chunk_hashes": ["a"], "seq_len": 256, "chunk_size": 256}
    for name in ("one.jsonl", "two.jsonl"):
        write(log, name=f"logs/{name}")
    found, notes = find_traces([TraceFile(tmp_path)])
    assert [file.path for file in found] == [tmp_path / "a.jsonl", tmp_path / "logs"]
    assert len(notes) == 1 and "notes.txt" in notes[0]
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_traces([TraceFile(tmp_path / "absent")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no trace in the folders"):
        find_traces([TraceFile(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--policy", "magic"), "unknown eviction policy"), (("--capacity-blocks", "many"), "'many' is not a count")],
)
def test_bad_options_are_noticed_before_anything_runs(
    folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(app, ["sim", "sweep", str(folder), "-o", str(tmp_path / "x.parquet"), *options])
    assert isinstance(result.exception, LmcError) and message in str(result.exception)


def test_the_summary_compares_with_lru_trace_by_trace(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    options = [
        "--policy",
        "lru,belady",
        "--capacity-blocks",
        "3",
        "--workers",
        "1",
        "--csv",
        str(tmp_path / "rows.csv"),
    ]
    result = CliRunner().invoke(app, ["sim", "sweep", str(folder), "-o", str(out), *options, "--json"])
    rows = json.loads(result.stdout)["rows"]
    lru, belady = json.loads(result.stdout)["summary"]
    gains = [
        best["token_hit_rate"] - plain["token_hit_rate"] for plain, best in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert lru["mean_against_lru"] is None and belady["traces"] == 2
    assert belady["mean_against_lru"] == pytest.approx(sum(gains) / 2) and belady["worst_against_lru"] == min(gains)
    assert (tmp_path / "rows.csv").read_text().count("\n") == 5


def test_a_terminal_sees_a_progress_bar(folder: Path, tmp_path: Path) -> None:
    import pty

    terminal, inner = pty.openpty()
    arguments = command(tmp_path / "rows.parquet", folder, "--workers", 1, "--capacity-blocks", "2,3")
    subprocess.run(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=inner, check=True)
    os.close(inner)
    assert b"4/4" in os.read(terminal, 1 << 16)
    os.close(terminal)
