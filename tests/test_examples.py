"""The router that splits prefill and decode, between two stand-ins for engines that write down what they are asked."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

ROUTER = Path(__file__).parents[1] / "examples" / "prefill_decode_router.py"
LONG, SHORT = "word " * 400, "word"


def router_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prefill_decode_router", ROUTER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class StandIn:
    """Answers every completion with its name; keeps the bodies."""

    name: str
    order: list[str]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    delay_s: float = 0.0

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        await asyncio.sleep(self.delay_s)
        self.order.append(self.name)
        return web.json_response({"from": self.name})


@dataclass
class Split:
    prefill: StandIn
    decode: StandIn
    order: list[str]
    url: str
    servers: dict[str, TestServer]

    async def ask(self, **body: Any) -> Any:
        async with aiohttp.ClientSession() as http, http.post(f"{self.url}/v1/completions", json=body) as answer:
            return await answer.json()


@pytest.fixture
async def split() -> AsyncIterator[Split]:
    order: list[str] = []
    stand_ins = {name: StandIn(name, order) for name in ("prefill", "decode")}
    async with AsyncExitStack() as stack:
        servers = {}
        for name, stand_in in stand_ins.items():
            app = web.Application()
            app.router.add_post("/v1/completions", stand_in.answer)
            servers[name] = await stack.enter_async_context(TestServer(app))
        addresses = [str(server.make_url("")).rstrip("/") for server in servers.values()]
        router = await stack.enter_async_context(
            TestServer(router_module().make_app(*addresses, settle=0.0, patience=0.5))
        )
        url = str(router.make_url("")).rstrip("/")
        yield Split(stand_ins["prefill"], stand_ins["decode"], order, url, servers)


async def test_a_long_prompt_is_computed_first_and_then_answered(split: Split) -> None:
    body = {"model": "m", "prompt": LONG, "max_tokens": 50, "stream": True, "stream_options": {"include_usage": True}}
    assert await split.ask(**body) == {"from": "decode"}
    assert split.order == ["prefill", "decode"]
    assert split.decode.bodies == [body]
    assert split.prefill.bodies == [{"model": "m", "prompt": LONG, "max_tokens": 1, "stream": False}]


async def test_a_short_prompt_goes_straight_to_the_decode_engine(split: Split) -> None:
    assert await split.ask(prompt=SHORT) == {"from": "decode"}
    assert split.order == ["decode"]


async def test_without_the_prefill_engine_the_decode_engine_does_it_all(
    split: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    await split.servers["prefill"].close()
    assert await split.ask(prompt=LONG) == {"from": "decode"}
    assert "the prefill engine failed" in capsys.readouterr().err


async def test_a_prefill_that_takes_too_long_is_not_waited_for(split: Split) -> None:
    split.prefill.delay_s = 30.0
    assert await split.ask(prompt=LONG) == {"from": "decode"}
    assert split.order == ["decode"]
