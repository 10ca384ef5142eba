"""A server of OpenAI's API that takes only what its schema names. It stands in for hosted services, and only pretends to generate."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

COMPLETION = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options", "logprobs", "seed"}
CHAT = {
    "model",
    "messages",
    "tools",
    "max_completion_tokens",
    "temperature",
    "stream",
    "stream_options",
    "logprobs",
    "seed",
}


@dataclass
class Strict:
    """`takes` are further keys of a body that it takes. `tail` is what it sends after the last event."""

    key: str | None = None
    takes: set[str] = field(default_factory=set)
    ids: bool = True  # prompts as token ids
    bos: int = 0
    newline: bytes = b"\n"
    tail: bytes = b"data: [DONE]\n\n"
    usage: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @web.middleware
    async def note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        self.headers.append(dict(request.headers))
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no key"}}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(text="<html>welcome</html>")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        return await self.answer(request, COMPLETION, lambda word: {"text": word})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self.answer(request, CHAT, lambda word: {"delta": {"content": word}})

    async def answer(self, request: web.Request, known: set[str], form: Any) -> web.StreamResponse:
        body = await request.json()
        for name in body:
            if name not in known | self.takes:
                return web.json_response(
                    {"error": {"message": f"Unrecognized request argument: {name}. Use max_completion_tokens."}},
                    status=400,
                )
        prompt = body.get("prompt")
        if prompt is not None and not isinstance(prompt, str) and not self.ids:
            return web.json_response({"error": {"message": "prompt is not a string"}}, status=422)
        if body.get("logprobs") not in (None, True, 2):
            return web.json_response({"error": {"message": "logprobs"}}, status=400)
        self.bodies.append(body)
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self.send(response, b": hello")
        for index in range(limit):
            choice = {"index": 0, "finish_reason": "length" if index == limit - 1 else None, **form("word ")}
            await self.send(response, b"data: " + json.dumps({"choices": [choice], "error": None}).encode())
        if self.usage and "stream_options" in body:
            count = len(prompt) if isinstance(prompt, list) else 7
            usage = {"prompt_tokens": count + self.bos, "completion_tokens": limit}
            await self.send(response, b"data: " + json.dumps({"choices": [], "usage": usage}).encode())
        await response.write(self.tail.replace(b"\n", self.newline))
        return response

    async def send(self, response: web.StreamResponse, event: bytes) -> None:
        await response.write(event + 2 * self.newline)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.note], client_max_size=1 << 26)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/metrics", self.page)
        return app


@contextmanager
def serving(server: Strict, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Its address. It runs on a thread of its own."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
