"""Starts the engine of an arm through `lmc serve`, waits until it is ready, and stops it; or connects to a server that runs already.

An arm's scratch folder holds its configuration, its log and its disk tier. `restart_of` reuses the disk tier of another arm.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import aiohttp
import yaml

from lmc.bench.access import KEY_VARIABLE, Access, access_to
from lmc.bench.counters import parse
from lmc.bench.dialect import Dialect
from lmc.bench.mooncake_server import started_mooncake
from lmc.bench.node_server import started_node
from lmc.bench.prompts import Request
from lmc.bench.redis_server import started_redis
from lmc.bench.s3_server import started_s3
from lmc.bench.server_process import LOCAL
from lmc.bench.workload import Arm, Engine
from lmc.errors import EngineError, RunError
from lmc.memory import available_memory
from lmc.serve.ports import free_port
from lmc.units import parse_size

SERVE = (sys.executable, "-m", "lmc", "serve")
STOP_S = 30.0
GONE_S = 2.0
REACH_S = 30.0
ENGINE_BYTES = 3 << 29  # an engine's processes without weights and KV, on a CPU
_ERROR = re.compile(r"(\([^)]*\) )?(lmc|[\w.]*(Error|Exception)): ")
_VERSIONED = re.compile(r"/v\d+$")  # an API may have a path of its own, such as /api/v1
_FIELD = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True)
class Server:
    """A server that answers requests. `process` is None for an arm that names the URL of a running server."""

    base_url: str
    model: str
    metrics: list[str]
    command: str = ""
    log: Path | None = None
    process: Process | None = None
    ready: dict[str, str] = field(default_factory=dict)
    access: Access = field(default_factory=Access)
    dialect: Dialect = field(default_factory=Dialect)

    @property
    def root_url(self) -> str:
        return self.base_url.removesuffix("/v1")

    async def why_gone(self) -> str | None:
        """How the process ended; None if it still runs. A process that has just closed its connections gets GONE_S to end."""
        if self.process is None:
            return None
        try:
            code = await asyncio.wait_for(self.process.wait(), GONE_S)
        except TimeoutError:
            return None
        return f"the engine ended with exit code {code}{_first_error(self.log)}"


@dataclass(frozen=True)
class Launcher:
    """Starts arms, one at a time. `serve` is the command that takes `lmc serve`'s arguments."""

    model: str
    engine: Engine
    scratch: Path
    serve: Sequence[str] = SERVE

    @asynccontextmanager
    async def started(self, name: str, arm: Arm) -> AsyncIterator[list[Server]]:
        """Yields ready servers, one per instance, and stops them afterwards. Raises EngineError when one does not start."""
        if arm.url:
            yield [await _reach(name, arm, self.model)]
            return
        async with AsyncExitStack() as stack:
            config = None
            if arm.cache is not None:
                servers = {"{redis}": started_redis, "{s3}": started_s3, "{mooncake}": started_mooncake}
                places = {
                    place: await stack.enter_async_context(start(self.scratch / name))
                    for place, start in servers.items()
                    if wants(arm, place)
                }
                config = self._write_config(name, arm, places)
                if arm.node:
                    socket = await stack.enter_async_context(started_node(config.parent, config))
                    attached = config.with_name("engines.yaml")
                    settings = yaml.safe_load(config.read_text())
                    attached.write_text(yaml.safe_dump({**settings, "node": str(socket)}, sort_keys=False))
                    config = attached
            yield [
                await stack.enter_async_context(self._instance(name, arm, config, number))
                for number in range(arm.instances)
            ]

    @asynccontextmanager
    async def _instance(self, name: str, arm: Arm, config: Path | None, number: int) -> AsyncIterator[Server]:
        folder = self.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / ("engine.log" if number == 0 else f"engine-{number}.log")
        command = self.command(arm, config, free_port(LOCAL))
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=PIPE, stderr=sink, env=self.environment(arm), start_new_session=True
            )
            drain: asyncio.Task[None] | None = None
            try:
                ready = await asyncio.wait_for(_ready_line(process, sink), self.engine.start_timeout)
                drain = asyncio.create_task(_copy_rest(process, sink))
                url = ready["url"].rstrip("/")
                if ready.get("cache") == "FAILED":
                    raise EngineError(f"arm {name}: the metrics page of its cache does not answer{_first_error(log)}")
                pages = [url.removesuffix("/v1") + "/metrics"] + ([ready["metrics"]] if "metrics" in ready else [])
                model = await _served_model(url, None, Access())
                yield Server(url, model, list(dict.fromkeys(pages)), self.shown(command), log, process, ready)
            except TimeoutError as error:
                raise EngineError(
                    f"arm {name}: no readiness line within {self.engine.start_timeout:g} s{_first_error(log)}"
                ) from error
            except EOFError as error:
                raise EngineError(
                    f"arm {name}: the engine ended with exit code {await process.wait()}{_first_error(log)}"
                ) from error
            finally:
                await _stop(process)
                if drain is not None:
                    await drain

    def command(self, arm: Arm, config: Path | None, port: int) -> list[str]:
        engine_args = [*_COMMON_ARGS[self.engine.kind](self.engine.context), *self.engine.args, *arm.args]
        flags = ["--engine", self.engine.kind, "--port", str(port)]
        flags += ["--no-cache"] if config is None else ["--config", str(config)]
        return [*self.serve, self.model, *flags, "--", *engine_args]

    def shown(self, command: Sequence[str]) -> str:
        """The command as a reader would type it: without this machine's interpreter and scratch folder."""
        typed = ["lmc", "serve", *command[len(self.serve) :]] if tuple(self.serve) == SERVE else list(command)
        return shlex.join(typed).replace(str(self.scratch), "SCRATCH")

    def environment(self, arm: Arm) -> dict[str, str]:
        """The key of servers that run already is none of an engine's business."""
        own = {name: text for name, text in os.environ.items() if name != KEY_VARIABLE}
        return {**own, **self.engine.env, **arm.env}

    def disk_folder(self, name: str, arm: Arm) -> Path:
        return self.scratch / (arm.restart_of or name) / "disk"

    def _write_config(self, name: str, arm: Arm, places: Mapping[str, str]) -> Path:
        disk = self.disk_folder(name, arm)
        if arm.restart_of is None:
            shutil.rmtree(disk, ignore_errors=True)
        path = self.scratch / name / "cache.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cache_yaml(arm, {"{disk}": str(disk), **places}))
        return path


@dataclass(frozen=True)
class Probe:
    """A text and its tokens by the workload's tokenizer, and a short request that is in no part."""

    text: str
    tokens: list[int]
    request: Request


async def check_tokenizer(http: aiohttp.ClientSession, server: Server, probe: Probe) -> None:
    """Raises RunError when the server's tokenizer gives other tokens for the text. A server without /tokenize is not checked."""
    body = {"model": server.model, "prompt": probe.text, "add_special_tokens": False}
    url = f"{server.root_url}/tokenize"
    async with http.post(url, json=body, headers=server.access.headers) as response:
        if response.status != 200:
            return
        answer = await response.json(content_type=None)
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if tokens is not None and tokens != probe.tokens:
        raise RunError(
            f"{server.base_url} has another tokenizer than the model of this workload; "
            "name the model that it serves with --model, or its tokenizer with --tokenizer"
        )


def fit_together(arms: Sequence[Arm], engine: Engine, model_folder: Path) -> bool:
    """Whether these arms can run at the same time: all are running servers, or they are CPU engines that fit into 75 % of free memory."""
    started = [arm for arm in arms if arm.url is None]
    if not started:
        return True
    if Path("/dev/nvidiactl").exists():
        return False  # an engine takes most of a GPU's memory
    weights = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    need = 0
    for arm in started:
        space = {**os.environ, **engine.env, **arm.env}.get("VLLM_CPU_KVCACHE_SPACE", "4")
        host = (arm.cache or {}).get("host") or {}
        size = str(host.get("capacity", "1GiB"))
        held = parse_size(size) if not size.endswith("%") else 1 << 32
        need += arm.instances * (weights + ENGINE_BYTES + (int(space) << 30)) + held * (
            1 if arm.node else arm.instances
        )
    return need < available_memory().free * 0.75


def cache_yaml(arm: Arm, places: Mapping[str, str]) -> str:
    """The arm's cache configuration as `lmc serve` reads it, with the folder and the addresses filled in."""
    text: str = yaml.safe_dump(arm.cache or {}, sort_keys=False)
    for place, value in places.items():
        text = text.replace(place, value)
    return text


def wants(arm: Arm, place: str) -> bool:
    return place in yaml.safe_dump(arm.cache or {})


_COMMON_ARGS = {
    "vllm": lambda context: ["--max-model-len", str(context)],
    "sglang": lambda context: ["--context-length", str(context)],
}


async def _ready_line(process: Process, sink: BinaryIO) -> dict[str, str]:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        text = line.decode(errors="replace")
        _write(sink, line)
        found = dict(_FIELD.findall(text))
        if text.startswith("ready") and "url" in found:
            return found
    raise EOFError


async def _copy_rest(process: Process, sink: BinaryIO) -> None:
    assert process.stdout is not None
    while data := await process.stdout.read(1 << 16):
        _write(sink, data)


def _write(sink: BinaryIO, data: bytes) -> None:
    sink.write(data)
    sink.flush()


async def _stop(process: Process) -> None:
    """Send SIGINT, then SIGTERM, then SIGKILL to the whole process group, so that nothing is left running."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            break
        try:
            os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)
            await asyncio.wait_for(process.wait(), STOP_S)
        except (ProcessLookupError, TimeoutError):
            continue
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


async def _reach(name: str, arm: Arm, model: str) -> Server:
    url = (arm.url or "").rstrip("/")
    url = url if _VERSIONED.search(url) else f"{url}/v1"
    access = access_to(arm.headers, arm.ca)
    try:
        served = await _served_model(url, arm.model or model, access)
        pages = [url.removesuffix("/v1") + "/metrics", *arm.metrics]
        async with access.session(REACH_S) as http:
            answers = [page for page in pages if await _has_metrics(http, page)]
    except (aiohttp.ClientError, TimeoutError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"arm {name}: cannot reach {url}: {said}; start the server or correct the arm's url") from error
    return Server(url, served, answers, access=access, dialect=Dialect(arm.api))


async def _has_metrics(http: aiohttp.ClientSession, page: str) -> bool:
    """Whether there are metrics. Many servers answer every path, with a page of their own."""
    async with http.get(page) as response:
        if response.status != 200:
            return False
        try:
            return bool(parse([await response.text()]).samples)
        except (ValueError, IndexError, KeyError):
            return False


async def _served_model(url: str, wanted: str | None, access: Access) -> str:
    """The name under which the server serves the model. Raises RunError if it does not serve the wanted one.

    A server that does not list its models is asked for the wanted one.
    """
    async with access.session(REACH_S) as http, http.get(f"{url}/models", headers=access.headers) as response:
        if response.status in (401, 403):
            raise RunError(f"{url} refuses the key (HTTP {response.status}); set {KEY_VARIABLE}, or give headers")
        if response.status in (404, 405, 501) and wanted is not None:
            return wanted
        response.raise_for_status()
        try:
            names = [str(entry["id"]) for entry in (await response.json(content_type=None))["data"]]
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{url}/models is no list of models; does the address belong to an OpenAI API?") from error
    if wanted is not None and wanted not in names:
        raise RunError(
            f"{url} does not serve {wanted!r}; name one that it serves with --model: {', '.join(names) or 'none'}"
        )
    if not names:
        raise RunError(f"{url} serves no model; start the server with one")
    return wanted or names[0]


def _first_error(log: Path | None) -> str:
    """The first error in the log, because later ones follow from it, else the last line; and the path of the log."""
    if log is None or not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    found = next((line for line in lines if _ERROR.match(line)), lines[-1] if lines else "")
    return f": {found[:300]} (log: {log})" if found else f" (log: {log})"
