"""Split prefill and decode over two engines that share one lmc store.

Start both with the same store, for example

    lmc serve MODEL --port 8001 --redis-url redis://127.0.0.1:6379     # prefill
    lmc serve MODEL --port 8002 --redis-url redis://127.0.0.1:6379     # decode
    python examples/prefill_decode_router.py --prefill http://127.0.0.1:8001 --decode http://127.0.0.1:8002 --port 8000

and send OpenAI completions to port 8000. A long prompt goes to the prefill engine first, for one token; its chunks reach the store while it
answers. Then the decode engine gets the request, finds the prefix in the store and computes only the rest. If the prefill engine fails, the
decode engine computes everything: the split is never needed for a right answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

import aiohttp
from aiohttp import web

PATHS = ("/v1/completions", "/v1/chat/completions")


class Router:
    def __init__(self, prefill: str, decode: str, min_characters: int, settle: float, patience: float) -> None:
        self._prefill = prefill
        self._decode = decode
        self._min_characters = min_characters
        self._settle = settle
        self._patience = aiohttp.ClientTimeout(total=patience)
        self._session: aiohttp.ClientSession | None = None

    async def forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert self._session is not None
        if len(json.dumps(body.get("prompt") or body.get("messages") or "")) >= self._min_characters:
            await self._fill(request.path, body)
        async with self._session.post(self._decode + request.path, json=body) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            try:
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
            except aiohttp.ClientConnectionResetError:
                pass  # the client went away; leaving this block ends the decode engine's work on it too
            return response

    async def _fill(self, path: str, body: dict[str, object]) -> None:
        """Let the prefill engine compute and store the prompt."""
        assert self._session is not None
        short = {**body, "stream": False}
        short.pop("stream_options", None)
        short.pop("max_completion_tokens", None)
        short["max_tokens"] = 1
        try:
            async with self._session.post(self._prefill + path, json=short, timeout=self._patience) as answer:
                await answer.read()
            await asyncio.sleep(self._settle)  # the write to the shared store goes on behind the answer
        except (aiohttp.ClientError, TimeoutError) as error:
            print(f"router: the prefill engine failed, decoding computes the prompt itself: {error!r}", file=sys.stderr)

    async def open(self, app: web.Application) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))

    async def close(self, app: web.Application) -> None:
        if self._session is not None:
            await self._session.close()


def make_app(
    prefill: str, decode: str, *, min_characters: int = 1000, settle: float = 0.2, patience: float = 120.0
) -> web.Application:
    router = Router(prefill, decode, min_characters, settle, patience)
    app = web.Application(client_max_size=64 << 20)
    for path in PATHS:
        app.router.add_post(path, router.forward)
    app.on_startup.append(router.open)
    app.on_cleanup.append(router.close)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Route long prompts through a prefill engine before decoding.")
    parser.add_argument("--prefill", required=True, help="address of the engine that computes prompts")
    parser.add_argument("--decode", required=True, help="address of the engine that answers")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--min-characters", type=int, default=1000, help="shorter prompts are not split")
    parser.add_argument(
        "--settle", type=float, default=0.2, help="seconds between prefill and decode for the shared store"
    )
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that a prefill may take")
    options = parser.parse_args()
    app = make_app(
        options.prefill,
        options.decode,
        min_characters=options.min_characters,
        settle=options.settle,
        patience=options.patience,
    )
    web.run_app(app, host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
