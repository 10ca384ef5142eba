"""Policies that are not part of lmc: found by file or entry point, checked, and used by the simulator and by the live cache alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cache.config import CacheConfig
from lmc.cache.policy import POLICIES, get_policy, lru, outside
from lmc.cache.policy.base import PolicySpec
from lmc.cli import app
from lmc.errors import ConfigError, LmcError
from lmc.sim.full_replay import Fleet, replay_fleet
from lmc.sim.policy_check import check_policy, trace_of
from lmc.sim.policy_replay import replay_policy
from tests.cache.instance import CHUNK_BYTES, Instance, prompt, settings

SOURCE = Path(lru.__file__).read_text().replace('"lru"', '"mine"')


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A policy in a file of its own, which is LRU under another name."""
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed package with two policies."""
    (tmp_path / "others_policy.py").write_text(SOURCE + "\nBAD = 5\n")
    info = tmp_path / "others_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others-policy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lmc.policies]\nmine = others_policy:SPEC\nbad = others_policy:BAD\ngone = others_policy:NONE\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    outside.load_installed.cache_clear()
    yield "mine"
    outside.load_installed.cache_clear()


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["sim", *(str(argument) for argument in arguments)])
    if isinstance(result.exception, LmcError):
        raise result.exception
    return f"{result.exit_code}\n{result.stdout}"


def test_a_policy_of_a_file_is_simulated_like_one_of_ours(mine: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 1000 * n, "input_length": 1500, "output_length": 1, "hash_ids": [n % 5, 10 + n % 5, 100 + n]}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = f"lru,{mine}:SPEC"
    code, text = run(path, "--policy", names, "--capacity-blocks", "4,9,30", "--json").split("\n", 1)
    rows = json.loads(text)["rows"]
    assert code == "0" and [row["hit_tokens"] for row in rows[:3]] == [row["hit_tokens"] for row in rows[3:]]
    assert rows[3]["policy"] == f"{mine}:SPEC"
    out = tmp_path / "lmc.yaml"
    options = ["--memory", "1GiB", "--token-bytes", "100kB", "--policy", f"{mine}:SPEC", "-o", out]
    assert run("tune", path, *options).startswith("0")
    assert run("replay", path, "--config", out, "--token-bytes", "100kB").startswith("0")


def test_the_live_cache_runs_it_too(mine: Path) -> None:
    for policy in ("lru", f"{mine}:SPEC"):
        instance = Instance(settings(policy=policy, host_capacity=6 * CHUNK_BYTES))
        served = [instance.serve(prompt(number % 4, 30)).loaded for number in range(12)]
        victims = instance.scheduler.directory.counts.evicted
        instance.close()
        if policy == "lru":
            expected = (served, dict(victims))
    assert (served, dict(victims)) == expected and sum(victims.values()) > 0


def test_a_replay_with_the_directory_evicts_alike(mine: Path) -> None:
    trace, _ = trace_of([[number % 3, number % 5, number] for number in range(60)])
    trace.input_tokens[:] += 1
    spec = get_policy(f"{mine}:SPEC")
    [kernel] = replay_policy(trace, spec, [7], workers=1)
    config = CacheConfig.model_validate({"policy": f"{mine}:SPEC", "host": {"capacity": 7}})
    result = replay_fleet(trace, config, 1, Fleet())
    assert sum(result.hit_tokens.values()).tolist() == kernel.request_hits.tolist()


def test_settings_hold_the_whole_path(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    config = CacheConfig.model_validate({"policy": "mine.py:SPEC"})
    assert config.policy == f"{mine}:SPEC"  # an engine may start in another folder
    assert get_policy(config.policy).name == "mine"


def test_an_installed_package_brings_policies(package: str) -> None:
    assert get_policy(package).name == "mine"
    assert CacheConfig.model_validate({"policy": package}).policy == package
    with pytest.raises(ConfigError, match="names a int, not a PolicySpec"):
        get_policy("bad")
    with pytest.raises(ConfigError, match="gone: others_policy:NONE cannot be loaded"):
        get_policy("gone")
    with pytest.raises(ConfigError, match=r"there are 2q, .*, bad, gone, mine"):
        get_policy("mru")


@pytest.mark.parametrize(
    ("content", "attribute", "message"),
    [
        (None, "SPEC", "there is no file"),
        ("import nothing_of_that_name", "SPEC", "ModuleNotFoundError"),
        ("x = (", "SPEC", "SyntaxError"),
        ("SPEC = 3", "SPEC", "names a int"),
        ("", "SPEC", "names nothing"),
        (SOURCE, "OTHER", "names nothing"),
        (SOURCE.replace('"mine"', '"lru"'), "SPEC", "as one of lmc's"),
        (SOURCE.replace('"mine"', '"../x"'), "SPEC", "lower-case"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str | None, attribute: str, message: str) -> None:
    path = tmp_path / "policy.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        get_policy(f"{path}:{attribute}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lru", "predictive"])
def test_our_policies_keep_their_contract(name: str) -> None:
    assert [one for one in check_policy(POLICIES[name], rounds=20) if not one.ok] == []


def broken(spec: PolicySpec, **functions: object) -> PolicySpec:
    return replace(spec, name="broken", **functions)  # type: ignore[arg-type]


def test_broken_policies_are_found_out() -> None:
    good = POLICIES["lru"]
    wrong = {
        "holds are not looked at": broken(good, victim=lambda state, holds: 0),
        "never a victim": broken(good, victim=lambda state, holds: -1),
        "forgets to unlink": broken(good, on_evict=lambda state, node: None),
        "raises": broken(good, on_hit=lambda state, node, now: 1 // 0),
    }
    for what, spec in wrong.items():
        faults = [one.fault for one in check_policy(spec, rounds=8) if not one.ok]
        assert faults, what
        assert all("\n" not in fault for fault in faults)


def test_the_command_says_what_holds(mine: Path, tmp_path: Path) -> None:
    text = run("check-policy", f"{mine}:SPEC", "--rounds", "8")
    assert text.startswith("0") and text.count("yes") == 5 and "mine" in text
    bad = tmp_path / "bad.py"
    bad.write_text(
        SOURCE
        + "\n\ndef never(state, holds):\n    return -1\n\nfrom dataclasses import replace\nSPEC = replace(SPEC, victim=never)\n"
    )
    text = run("check-policy", f"{bad}:SPEC", "--rounds", "8", "--json")
    assert text.startswith("1")
    checks = json.loads(text.split("\n", 1)[1])["checks"]
    assert any("found no victim" in check["fault"] for check in checks)
