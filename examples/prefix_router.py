"""Send each prompt to the engine that holds the longest part of it, by the KV events of vLLM and lmc.

Start the engines with events, and with a socket that sends missed ones again, for example

    lmc serve MODEL --port 8001 -- --kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq",
        "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}'
    python examples/prefix_router.py --port 8000 --engine http://127.0.0.1:8001,tcp://127.0.0.1:5557,tcp://127.0.0.1:5558 \\
        --engine http://127.0.0.1:8002,tcp://127.0.0.1:5657,tcp://127.0.0.1:5658

and send OpenAI completions to port 8000. An event names the tokens of its blocks, so the router needs no hash of its own; it asks an engine
to tokenize. Where nobody holds anything, and for chats, the engine with the fewest requests answers.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

END = (-1).to_bytes(8, "big", signed=True)  # of what is sent again


class Index:
    """The blocks that one engine holds, in its own memory or in lmc's tiers, as its events say."""

    def __init__(self) -> None:
        self.places: dict[Any, set[tuple[str, str]]] = {}  # block -> where it is
        self._blocks: dict[Any, Any] = {}  # (block before it, its tokens) -> block
        self._names: dict[Any, Any] = {}  # the other way round
        self._sizes: set[int] = set()
        self.next = 0  # number of the next batch
        self._time = 0.0  # of the last one

    def take(self, number: int, time: float, events: Sequence[dict[str, Any]]) -> bool:
        """False if batches before this one are missing: then it was not taken."""
        if number < self.next and time > self._time:
            self.forget(0)  # the engine was started anew, and counts anew
        if number > self.next:
            return False
        if number == self.next:  # else it came before
            self.next, self._time = number + 1, time
            for event in events:
                self._apply(event)
        return True

    def forget(self, number: int) -> None:
        """What the batches before this one said does not hold any more, or can't be had."""
        for table in (self.places, self._blocks, self._names):
            table.clear()
        self.next, self._time = number, 0.0

    def held(self, tokens: Sequence[int]) -> int:
        """Leading tokens of a prompt that the engine needs not compute."""
        end, before = 0, None
        while True:
            size = next((s for s in self._sizes if (before, tuple(tokens[end : end + s])) in self._blocks), 0)
            if not size:
                return end
            before = self._blocks[before, tuple(tokens[end : end + size])]
            end += size

    def _apply(self, event: dict[str, Any]) -> None:
        place = (event.get("medium") or "GPU", event.get("ownership") or "")
        if event["type"] == "AllBlocksCleared":
            for block in [block for block, places in self.places.items() if ("GPU", "") in places]:
                self._remove(block, ("GPU", ""))
        elif event["type"] == "BlockRemoved":
            for block in event["block_hashes"]:
                self._remove(block, place)
        elif event["type"] == "BlockStored" and event.get("lora_id") is None and not any(event.get("extra_keys") or ()):
            before, size = event["parent_block_hash"], event["block_size"]
            self._sizes.add(size)
            for number, block in enumerate(event["block_hashes"]):
                name = (before, tuple(event["token_ids"][number * size : (number + 1) * size]))
                self._blocks[name], self._names[block] = block, name
                self.places.setdefault(block, set()).add(place)
                before = block

    def _remove(self, block: Any, place: tuple[str, str]) -> None:
        places = self.places.get(block, set())
        places.discard(place)
        if block in self.places and not places:
            del self.places[block], self._blocks[self._names.pop(block)]


@dataclass
class Engine:
    address: str
    events: str
    again: str
    index: Index = field(default_factory=Index)
    requests: int = 0

    async def follow(self) -> None:
        """Take its events, for ever."""
        context = zmq.asyncio.Context.instance()
        socket = context.socket(zmq.SUB)
        socket.subscribe(b"")
        socket.connect(self.events)
        await self.catch_up(0)
        while True:
            _, number, payload = await socket.recv_multipart()
            count = int.from_bytes(number, "big")
            if not self.index.take(count, *decoded(payload)):
                await self.catch_up(count)
                self.index.take(count, *decoded(payload))

    async def catch_up(self, until: int) -> None:
        """Ask for what was missed: before the router came, or while it was slow."""
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        try:
            socket.connect(self.again)
            await socket.send_multipart((b"", self.index.next.to_bytes(8, "big")))
            while await socket.poll(2_000):
                _, _, number, payload = await socket.recv_multipart()
                if number == END:
                    break
                count = int.from_bytes(number, "big")
                if not self.index.take(count, *decoded(payload)):
                    self.index.forget(count)  # the engine keeps the last ones only
                    self.index.take(count, *decoded(payload))
        finally:
            socket.close(0)
        if self.index.next < until:
            self.index.forget(until)


def decoded(payload: bytes) -> tuple[float, list[dict[str, Any]]]:
    time, events, *_ = msgspec.msgpack.decode(payload)
    return time, events


class Router:
    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, app: web.Application) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self._tasks = [asyncio.create_task(engine.follow()) for engine in self._engines]

    async def close(self, app: web.Application) -> None:
        for task in self._tasks:
            task.cancel()
        await self._session.close()

    async def forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        tokens = await self._tokens(body)
        engine = min(self._engines, key=lambda one: (-one.index.held(tokens), one.requests))
        engine.requests += 1
        try:
            async with self._session.post(engine.address + request.path, json=body) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        finally:
            engine.requests -= 1

    async def _tokens(self, body: dict[str, Any]) -> list[int]:
        """Of the prompt, as an engine sees them."""
        prompt = body.get("prompt")
        if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            return prompt
        if not isinstance(prompt, str):
            return []
        question = {"model": body.get("model"), "prompt": prompt}
        try:
            async with self._session.post(f"{self._engines[0].address}/tokenize", json=question) as answer:
                return list((await answer.json())["tokens"])
        except (aiohttp.ClientError, KeyError) as error:
            print(f"router: cannot tokenize: {error!r}", file=sys.stderr)
            return []


def make_app(engines: list[Engine]) -> web.Application:
    router = Router(engines)
    app = web.Application(client_max_size=64 << 20)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, router.forward)
    app.on_startup.append(router.open)
    app.on_cleanup.append(router.close)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Send each prompt to the engine that holds the longest part of it.")
    parser.add_argument("--engine", action="append", required=True, help="ADDRESS,EVENTS,REPLAY of an engine")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    web.run_app(make_app([Engine(*one.split(",")) for one in options.engine]), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
