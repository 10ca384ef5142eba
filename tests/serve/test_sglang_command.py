"""SGLang's command line: what lmc adds, what it leaves to the user, what it refuses. No engine is started."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmc.cache.config import CacheConfig
from lmc.cache.settings import load_settings
from lmc.errors import ConfigError, EngineError
from lmc.serve import engines
from lmc.serve.command import EngineCommand
from lmc.serve.sglang import CPU_FOLDER

MODEL = Path("/models/one")


def config(**settings: object) -> CacheConfig:
    return load_settings(flags={key.replace("__", "."): value for key, value in settings.items()}).config


def command(*extra: str, cache: CacheConfig | None = None) -> EngineCommand:
    return engines.engine_command("sglang", MODEL, "127.0.0.1", 8000, cache, list(extra))


def option(built: EngineCommand, name: str) -> str:
    return built.arguments[built.arguments.index(name) + 1]


def sent(built: EngineCommand) -> dict[str, object]:
    linker = json.loads(option(built, "--unified-cache-external-linker-config"))
    settings: dict[str, object] = linker["linker_extra_config"]["settings"]
    return settings


def test_the_linker_gets_the_settings_in_force() -> None:
    built = command(cache=config(host__capacity="2GiB", disk__path="/data/kv"))
    assert "--enable-unified-cache-external-linker" in built.arguments
    assert (sent(built)["host.capacity"], sent(built)["disk.path"]) == (2 << 30, "/data/kv")
    assert load_settings(flags=sent(built)).config == config(host__capacity="2GiB", disk__path="/data/kv")


def test_a_secret_goes_by_the_environment() -> None:
    built = command(cache=config(redis__password="hush"))
    assert not any("hush" in argument for argument in built.arguments)
    assert built.environment["LMC_REDIS_PASSWORD"] == "hush"


def test_without_the_cache_there_is_no_linker() -> None:
    assert not any("linker" in argument for argument in command().arguments)


def test_a_page_is_a_chunk() -> None:
    assert option(command(cache=config()), "--page-size") == "64"
    assert option(command(cache=config(chunk_tokens=128)), "--page-size") == "128"
    assert option(command("--page-size", "32", cache=config()), "--page-size") == "32"


def test_the_users_arguments_come_last_and_win() -> None:
    built = command("--device", "cpu", "--dtype", "bfloat16", "--max-total-tokens=99")
    assert built.arguments[-5:] == ("--device", "cpu", "--dtype", "bfloat16", "--max-total-tokens=99")
    assert [built.arguments.count(name) for name in ("--device", "--dtype", "--max-total-tokens")] == [1, 1, 0]


def test_only_cpu_runs_get_the_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    environment = command("--device", "cpu").environment
    assert environment["PYTHONPATH"] == f"{CPU_FOLDER}{os.pathsep}/mine"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert command("--device", "cuda").environment == {}


def test_the_pool_on_a_cpu_is_a_share_of_memory(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    built = engines.engine_command("sglang", tmp_path, "127.0.0.1", 8000, None, ["--device", "cpu"])
    tokens = int(option(built, "--max-total-tokens"))
    assert (1 << 30) // (30 * 2 * 3 * 64 * 4) <= tokens <= (4 << 30) // (30 * 2 * 3 * 64 * 4)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    "extra", [["--enable-hierarchical-cache"], ["--disable-radix-cache"], ["--unified-cache-external-linker-config={}"]]
)
def test_what_excludes_the_linker_is_refused_before_anything_starts(installed: None, extra: list[str]) -> None:
    with pytest.raises(ConfigError, match="use --no-cache"):
        engines.check_engine("sglang", config(), extra)
    engines.check_engine("sglang", None, extra)


def test_a_page_that_is_not_the_chunk_is_refused(installed: None) -> None:
    with pytest.raises(ConfigError, match="a chunk is a page"):
        engines.check_engine("sglang", config(chunk_tokens=128), ["--page-size", "64"])


@pytest.mark.parametrize(("tokens", "extra"), [(None, ["--page-size", "1"]), (1, [])])
def test_a_chunk_of_one_token_is_refused(installed: None, tokens: int | None, extra: list[str]) -> None:
    with pytest.raises(ConfigError, match="makes a chunk of every token"):
        engines.check_engine("sglang", config(chunk_tokens=tokens), extra)


def test_a_missing_sglang_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"lmc-kv\[sglang\]"):
        engines.check_engine("sglang", config(), [])


def test_the_stand_in_for_the_kernels_says_what_it_is() -> None:
    code = "import sgl_kernel\nassert sgl_kernel.__version__\nsgl_kernel.fused_moe(1)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(CPU_FOLDER)}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.strip().endswith(
        "sgl_kernel.fused_moe is not built on this machine; lmc runs SGLang on CPU without it"
    )
