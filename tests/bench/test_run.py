"""Whole runs against the mock server: what a good run says, and that every fault is seen."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import lmc.cache.node.wire as wire
from lmc.bench.arms import Launcher, cache_yaml, wants
from lmc.bench.mooncake_server import started_mooncake
from lmc.bench.records import read_records, read_results, write_results
from lmc.bench.redis_server import started_redis
from lmc.bench.render import build_report, write_report
from lmc.bench.s3_server import BUCKET, started_s3
from lmc.bench.schedule import Plan
from lmc.bench.stages import ArmRun
from lmc.bench.workload import Arm, Engine, Limits
from lmc.cache.keys import ChunkKey
from lmc.cache.node.channel import connect
from lmc.cache.sections import MooncakeConfig, S3Config
from lmc.cache.settings import load_settings
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.mooncake import MooncakeTier
from lmc.cache.tiers.s3 import S3Tier
from lmc.cli import app
from lmc.errors import EngineError, RunError, WorkloadError
from lmc.report import report_html
from tests import services
from tests.bench.conftest import MOCK, RunSmall, WriteWorkload

NONE = {"reuse": "none", "args": ["--no-enable-prefix-caching"]}
CACHED = {"reuse": "cache", "cache": {}}


def _faulty(fault: str, **arm: Any) -> dict[str, Any]:
    return {"arms": {"none": NONE, "x": {**NONE, **arm, "args": ["--fault", fault]}}, "bars": []}


def test_four_arms_hit_exactly_what_the_simulator_expects(run_small: RunSmall, tmp_path: Path) -> None:
    results, records = run_small()
    assert results.problems == []
    assert results.valid
    arms = {arm.name: arm for arm in results.arms}
    assert arms["none"].hit_tokens == 0
    assert arms["engine"].hit_tokens == arms["engine"].expected_hit_tokens == arms["lmc"].hit_tokens
    assert arms["engine"].hit_tokens > 0
    assert arms["lmc"].hit_tokens_by_tier == {"device": 0, "host": arms["lmc"].hit_tokens, "disk": 0}
    restarted = arms["lmc-restarted"]
    assert restarted.hit_tokens_by_tier["disk"] > 0
    assert restarted.hit_tokens == restarted.expected_hit_tokens > arms["lmc"].hit_tokens
    for arm in (arms["lmc"], restarted):
        assert arm.expected_hit_tokens_by_tier == arm.hit_tokens_by_tier, "tier by tier"
    assert arms["engine"].expected_hit_tokens_by_tier is None
    assert [phase.name for phase in restarted.phases] == [
        "start", "verify empty", "warm up", "drain", "measure", "drain",
    ]  # fmt: skip
    assert len(records) == 4 * 11
    assert all(check.compared_tokens == 44 and not check.differences for check in results.outputs)

    write_results(tmp_path / "out", results, records)
    assert read_results(tmp_path / "out") == results
    assert read_records(tmp_path / "out") == records
    write_report(tmp_path / "out", results, records)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") >= 4
    assert "Over the requests with a hit, the median TTFT of lmc is" in page
    links = set(re.findall(r'<a href="#([a-z0-9-]+)">', page))
    assert links and links == set(re.findall(r'<h2 id="([a-z0-9-]+)">', page)), "the table of contents"
    assert page == report_html(build_report(read_results(tmp_path / "out"), read_records(tmp_path / "out")))


def test_wrong_hits_make_the_arm_invalid(run_small: RunSmall) -> None:
    results, _ = run_small(**_faulty("wrong-hits", reuse="cache", cache={}))
    assert [arm.valid for arm in results.arms] == [True, False]
    assert "the simulator expects" in results.problems[0]


def test_another_token_makes_the_arm_invalid(run_small: RunSmall) -> None:
    results, _ = run_small(**_faulty("wrong-token"))
    assert not results.valid
    assert "outputs differ from none" in " ".join(results.problems)


def test_a_warm_engine_is_not_empty(run_small: RunSmall) -> None:
    results, _ = run_small(**_faulty("warm"))
    assert results.problems == ["arm x: not empty at start: the engine has already looked up 512 tokens"]


def test_an_empty_disk_after_a_restart_is_seen(run_small: RunSmall) -> None:
    arms = {"lmc": CACHED, "again": {**CACHED, "restart_of": "lmc"}}
    results, _ = run_small(arms=arms, bars=[])
    assert any("no chunk survived the restart" in problem for problem in results.problems)


def test_hits_from_the_wrong_tier_are_seen(run_small: RunSmall) -> None:
    results, _ = run_small(**_faulty("wrong-tier", reuse="cache", cache={"disk": {"path": "{disk}"}}))
    arm = results.arms[1]
    assert arm.hit_tokens == arm.expected_hit_tokens
    assert arm.problems[0].startswith("hits of tier host are off: 0 tokens, the simulator expects")


def test_failures_are_counted_by_cause(run_small: RunSmall) -> None:
    results, records = run_small(**_faulty("http-500"))
    failed = results.arms[1]
    assert (failed.ok, failed.requests) == (0, 11)
    assert failed.failures == {"http_error: HTTP 500: out of luck": 11}
    assert failed.ttft_ms == {}
    assert sum(not record.ok for record in records) == 11
    assert build_report(results, records).summary.count("INVALID") == 1


def test_timeouts_are_a_cause_of_their_own(run_small: RunSmall) -> None:
    arms = {"x": {**NONE, "args": ["--fault", "stall"]}}
    limits = {"timeout": "100ms", "requests": 2}
    results, _ = run_small(limits=limits, warm_up={"requests": 0}, arms=arms, bars=[])
    assert results.arms[0].failures == {"timeout: the stream did not end within 0.1 s": 2}


def test_an_engine_that_dies_leaves_partial_results(run_small: RunSmall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.bench.arms.GONE_S", 60.0)
    results, records = run_small(**_faulty("die"))
    died = results.arms[1]
    assert not died.valid
    assert 0 < died.ok < 11
    assert any("the engine ended with exit code 3" in problem for problem in died.problems)
    assert len([record for record in records if record.arm == "none"]) == 11


def test_another_tokenizer_is_noticed(run_small: RunSmall) -> None:
    results, _ = run_small(**_faulty("bad-tokenizer"))
    assert "another tokenizer?" in results.problems[0]


def test_another_vocabulary_stops_the_arm_before_the_load(run_small: RunSmall) -> None:
    with pytest.raises(RunError, match="has another tokenizer than the model of this workload"):
        run_small(bars=[], arms={"x": {**NONE, "args": ["--fault", "other-vocabulary"]}})


def test_missing_cached_tokens_are_not_zero(run_small: RunSmall) -> None:
    results, records = run_small(**_faulty("no-usage"))
    assert results.arms[1].hit_tokens is None
    assert {record.cached_tokens for record in records if record.arm == "x"} == {None}


def test_an_arm_whose_cache_does_not_answer(run_small: RunSmall) -> None:
    """The engine may run without it, so the load would measure the engine alone."""
    with pytest.raises(
        EngineError, match="arm x: the metrics page of its cache does not answer: lmc: no room for the host tier"
    ):
        run_small(bars=[], arms={"x": {**NONE, "args": ["--fault", "no-cache"]}})


def test_an_arm_that_does_not_start(run_small: RunSmall) -> None:
    first = {"arms": {"x": {**NONE, "args": ["--fault", "no-start"]}}, "bars": []}
    with pytest.raises(EngineError, match="arm x: the engine ended with exit code 1: lmc: no room for weights"):
        run_small(**first)
    results, _ = run_small(**_faulty("no-start"))
    assert [arm.name for arm in results.arms] == ["none"]
    assert not results.valid
    assert "no room for weights" in results.problems[0]


def test_arms_that_run_at_once_take_turns(run_small: RunSmall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.bench.run.fit_together", lambda *_: True)
    happened: list[str] = []
    measure = ArmRun.measure

    async def note(self: ArmRun, plan: Plan, limits: Limits) -> None:
        happened.append(self.data.name)
        await measure(self, plan, limits)

    async def rest() -> None:
        happened.append("rest")

    monkeypatch.setattr(ArmRun, "measure", note)
    monkeypatch.setattr("lmc.bench.run.settle", rest)
    results, records = run_small(interleave=3)
    assert results.problems == []
    assert results.interleaved
    turns = [["none", "engine", "lmc"], ["lmc", "engine", "none"], ["none", "engine", "lmc"], ["lmc", "engine", "none"]]
    names = [name for turn in turns for name in turn]
    waits = [["rest", name] if name != before else [name] for before, name in itertools.pairwise(["lmc", *names])]
    assert happened == [*itertools.chain.from_iterable(waits), "lmc-restarted"]
    monkeypatch.undo()
    sequential, _ = run_small()
    assert [arm.hit_tokens for arm in results.arms] == [arm.hit_tokens for arm in sequential.arms]
    for arm in results.arms[:3]:
        assert [phase.detail for phase in arm.phases if phase.name == "measure"] == ["3 requests"] * 3 + ["2 requests"]
        mine = [record for record in records if record.arm == arm.name]
        assert [a.intended_s < b.intended_s for a, b in itertools.pairwise(mine)] == [True] * 10
    assert [phase.detail for phase in results.arms[3].phases if phase.name == "measure"] == ["11 requests"]


def test_arms_that_do_not_fit_run_one_after_the_other(run_small: RunSmall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")
    results, _ = run_small(interleave=3, bars=[], arms={"none": NONE, "lmc": CACHED})
    assert results.valid
    assert not results.interleaved


def test_instances_share_what_one_of_them_stored(run_small: RunSmall) -> None:
    shared = {"reuse": "cache", "instances": 2, "cache": {"disk": {"path": "{disk}"}}}
    results, _ = run_small(bars=[], arms={"none": NONE, "pair": shared})
    assert results.problems == []
    pair = results.arms[1]
    assert pair.hit_tokens == pair.expected_hit_tokens
    assert pair.hit_tokens_by_tier["disk"] > 0
    assert pair.phases[0].detail.count("http://") == 2
    alone, _ = run_small(bars=[], arms={"none": NONE, "pair": {**shared, "cache": {}}})
    assert "hit rate is off" in alone.problems[0]


async def test_the_engines_of_an_arm_attach_to_a_node_of_its_own(tmp_path: Path) -> None:
    arm = Arm(cache={"host": {"capacity": "4MiB"}}, instances=2, node=True)
    launcher = Launcher("mock-model", Engine(), tmp_path, MOCK)
    async with launcher.started("pair", arm) as servers:
        files = {word for server in servers for word in server.command.split() if word.endswith(".yaml")}
        assert len(servers) == 2 and len(files) == 1
        settings = load_settings(tmp_path / "pair" / "engines.yaml", {}).config
        assert settings.node is not None
        channel = connect(str(settings.node), 10.0, takes_descriptor=True)
        answer = wire.read(wire.welcomes, channel.ask(wire.TakeMemory(bytes(wire.ID_BYTES), 0), 10.0))
        assert isinstance(answer, wire.Memory) and answer.size == 4 << 20
        channel.close()
    assert not settings.node.exists()
    with pytest.raises(EngineError, match=r"lmc node did not start \(log: .*node.log"):
        async with launcher.started("bad", arm.model_copy(update={"cache": {"host": {"capacity": 100}}})):
            pass
    with pytest.raises(ValidationError, match="needs cache"):
        Arm(node=True)


@pytest.mark.service
async def test_an_arm_gets_a_redis_of_its_own(tmp_path: Path) -> None:
    import redis

    async with started_redis(tmp_path) as address:
        client = redis.Redis.from_url(address)
        assert client.dbsize() == 0
        client.close()
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(address).ping()
    arm = Arm(cache={"redis": {"url": "{redis}"}})
    assert wants(arm, "{redis}")
    assert not wants(arm, "{s3}")
    assert address in cache_yaml(arm, {"{redis}": address})


@pytest.mark.service
async def test_an_arm_gets_an_s3_server_of_its_own(tmp_path: Path) -> None:
    async with started_s3(tmp_path) as endpoint:
        config = S3Config(
            bucket=BUCKET, endpoint=endpoint, region="us-east-1", access_key_id="a", secret_access_key="b"
        )
        tier = S3Tier(config, TierScope("0" * 32, 0, "any", 64))
        key = ChunkKey(bytes(32))
        assert await asyncio.to_thread(tier.contains, [key]) == [False]
        await asyncio.to_thread(tier.put, key, memoryview(bytes(64)))
        assert await asyncio.to_thread(tier.contains, [key]) == [True]


@pytest.mark.service
async def test_an_arm_gets_a_mooncake_master_of_its_own(tmp_path: Path) -> None:
    services.mooncake_folder()  # skips where there is none
    async with started_mooncake(tmp_path) as master:
        config = MooncakeConfig.model_validate({"master": master, "segment": "16MiB", "timeout": 20})
        tier = MooncakeTier(config, TierScope("0" * 32, 0, "any", 64))
        key = ChunkKey(bytes(32))
        await asyncio.to_thread(tier.put, key, memoryview(b"\1" * 64))
        out = memoryview(bytearray(64))
        await asyncio.to_thread(tier.get, key, out)
        assert out == b"\1" * 64
        tier.close()


def test_repeats_add_up(run_small: RunSmall) -> None:
    one, _ = run_small(bars=[], arms={"engine": {"reuse": "engine", "args": ["--enable-prefix-caching"]}})
    two, _ = run_small(repeat=2, bars=[], arms={"engine": {"reuse": "engine", "args": ["--enable-prefix-caching"]}})
    assert two.arms[0].requests == 2 * one.arms[0].requests
    assert two.arms[0].hit_tokens_by_tier == {"device": 2 * one.arms[0].hit_tokens_by_tier["device"]}
    assert two.arms[0].counters == {name: 2 * value for name, value in one.arms[0].counters.items()}


def test_every_repeat_starts_from_nothing(run_small: RunSmall) -> None:
    results, records = run_small(repeat=2, bars=[], arms={"none": NONE, "lmc": CACHED})
    assert results.valid
    assert {record.repeat for record in records} == {0, 1}
    by_repeat = [sum(r.cached_tokens or 0 for r in records if r.repeat == n and r.arm == "lmc") for n in (0, 1)]
    assert by_repeat[0] == by_repeat[1] > 0


def test_priming_is_expected_and_measured(run_small: RunSmall) -> None:
    results, _ = run_small(bars=[], prime=["chat"], arms={"none": NONE, "lmc": CACHED})
    cold, _ = run_small(bars=[], arms={"none": NONE, "lmc": CACHED})
    assert results.valid and cold.valid
    assert results.arms[1].hit_tokens > cold.arms[1].hit_tokens


def test_concurrent_load_is_judged_by_rate(run_small: RunSmall) -> None:
    load = {"kind": "closed", "concurrency": 4}
    results, records = run_small(bars=[], load=load, arms={"none": NONE, "lmc": CACHED})
    assert len(records) == 22
    assert results.arms[1].hit_tokens > 0


def test_open_loop_counts_from_the_intended_time(run_small: RunSmall) -> None:
    slow = {**NONE, "args": ["--us-per-token", "200"]}
    load = {"kind": "constant", "rate": 50.0}
    results, records = run_small(bars=[], load=load, limits={"concurrency": 1}, arms={"none": slow}, lag_ms=5.0)
    assert results.arms[0].self_check is not None
    assert results.arms[0].self_check.requested_rate == pytest.approx(50.0)
    assert all(record.ttft_ms >= record.service_ttft_ms for record in records)
    last = max(records, key=lambda record: record.intended_s)
    assert last.ttft_ms > last.service_ttft_ms + sum(r.service_ttft_ms for r in records if r is not last) / 2
    [problem] = results.problems
    assert problem.startswith("arm none: the client lagged: send lag p90 is")


def test_unknown_arm_and_missing_base(run_small: RunSmall) -> None:
    with pytest.raises(WorkloadError, match="no arm 'lcm' in this workload; did you mean 'lmc'"):
        run_small(["lcm"])
    with pytest.raises(WorkloadError, match="arm lmc-restarted restarts lmc; choose that arm too"):
        run_small(["lmc-restarted"])


@pytest.fixture
def running_server() -> Iterator[str]:
    from lmc.serve.ports import free_port

    port = free_port("127.0.0.1")
    command = [*MOCK, "mock-model", "--port", str(port), "--no-cache", "--", "--enable-prefix-caching"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline().startswith(b"ready")
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    process.wait(120)
    process.stdout.close()


def test_a_running_server_is_an_arm(run_small: RunSmall, running_server: str) -> None:
    results, _ = run_small(bars=[], arms={"running": {"url": running_server}})
    assert results.valid
    assert results.arms[0].expected_hit_tokens is None
    assert "not verified" in {phase.name: phase.detail for phase in results.arms[0].phases}["verify empty"]


def test_unreachable_and_wrong_servers(run_small: RunSmall, running_server: str, write_workload: WriteWorkload) -> None:
    with pytest.raises(RunError, match=r"arm gone: cannot reach http://127\.0\.0\.1:9/v1"):
        run_small(bars=[], arms={"gone": {"url": "http://127.0.0.1:9"}})


def test_command_line_writes_the_report_and_tells_by_exit_code(
    running_server: str, write_workload: WriteWorkload, model_folder: Path, tmp_path: Path
) -> None:
    path = write_workload(bars=[], arms={"running": {"url": running_server}})
    # The server's model has the name of the folder in this run.
    result = CliRunner().invoke(
        app, ["bench", str(path), "--model", str(model_folder), "--out", str(tmp_path / "r"), "--quiet"]
    )
    assert isinstance(result.exception, RunError)
    assert "does not serve" in str(result.exception)
    assert not (tmp_path / "r").exists()


def test_ctrl_c_stops_the_engine(write_workload: WriteWorkload, model_folder: Path, tmp_path: Path) -> None:
    path = write_workload(bars=[], arms={"x": {**NONE, "args": ["--fault", "stall"]}})
    code = (  # a job in the background of a shell begins with SIGINT ignored, and so would its children
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from pathlib import Path; from lmc.bench.workload import load_workload;"
        "from lmc.bench.run import RunOptions, run_workload;"
        "path, model, serve, scratch = map(Path, sys.argv[1:]);"
        "run_workload(load_workload(path), RunOptions(path.parent, 'm', model, serve=(sys.executable, str(serve)), scratch=scratch))"
    )
    process = subprocess.Popen(
        [MOCK[0], "-c", code, str(path), str(model_folder), MOCK[1], str(tmp_path / "s")],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = tmp_path / "s" / "0" / "x" / "engine.log"
    deadline = time.monotonic() + 120
    while not (log.is_file() and b"ready" in log.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    url = log.read_text().split("url=")[1].split("/v1")[0]
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(120) != 0

    async def answers() -> bool:
        async with aiohttp.ClientSession() as http:
            try:
                async with http.get(f"{url}/v1/models") as response:
                    return response.status == 200
            except aiohttp.ClientError:
                return False

    assert not asyncio.run(answers())
