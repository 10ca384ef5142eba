"""The router that splits prefill and decode, between two stand-ins for engines that write down what they are asked."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import pytest
from aiohttp import web

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
    endless: bool = False
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        await asyncio.sleep(self.delay_s)
        self.order.append(self.name)
        if self.endless:
            return await self._stream(request)
        return web.json_response({"from": self.name})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """Until the other side goes away."""
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"data: {}\n\n")
                await asyncio.sleep(0.01)
        except aiohttp.ClientConnectionResetError:
            self.left.set()
        return response


async def serve(app: web.Application, stack: AsyncExitStack) -> tuple[str, web.AppRunner]:
    """Its address, and what stops it. As in web.run_app, a handler is not cancelled when its client goes away."""
    runner = web.AppRunner(app)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1).start()
    host, port = runner.addresses[0]
    return f"http://{host}:{port}", runner


@dataclass
class Split:
    prefill: StandIn
    decode: StandIn
    order: list[str]
    url: str
    stop_prefill: Callable[[], Awaitable[None]]

    async def ask(self, **body: Any) -> Any:
        async with aiohttp.ClientSession() as http, http.post(f"{self.url}/v1/completions", json=body) as answer:
            return await answer.json()


@pytest.fixture
async def split() -> AsyncIterator[Split]:
    order: list[str] = []
    stand_ins = {name: StandIn(name, order) for name in ("prefill", "decode")}
    async with AsyncExitStack() as stack:
        addresses, runners = [], []
        for stand_in in stand_ins.values():
            app = web.Application()
            app.router.add_post("/v1/completions", stand_in.answer)
            address, runner = await serve(app, stack)
            addresses.append(address)
            runners.append(runner)
        url, _ = await serve(router_module().make_app(*addresses, settle=0.0, patience=0.5), stack)
        yield Split(stand_ins["prefill"], stand_ins["decode"], order, url, runners[0].cleanup)


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
    await split.stop_prefill()
    assert await split.ask(prompt=LONG) == {"from": "decode"}
    assert "the prefill engine failed" in capsys.readouterr().err


async def test_a_prefill_that_takes_too_long_is_not_waited_for(split: Split) -> None:
    split.prefill.delay_s = 30.0
    assert await split.ask(prompt=LONG) == {"from": "decode"}
    assert split.order == ["decode"]


async def test_a_client_that_goes_away_ends_the_work_on_its_request(
    split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    split.decode.endless = True
    async with aiohttp.ClientSession() as http:
        answer = await http.post(f"{split.url}/v1/completions", json={"prompt": SHORT})
        await answer.content.readany()
        answer.close()
    await asyncio.wait_for(split.decode.left.wait(), 10)
    assert not caplog.records
