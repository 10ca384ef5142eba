"""What a server takes in a request, and the body of a request in its dialect. handshake finds the dialect of a running server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmc.bench.chats import to_api
from lmc.bench.prompts import Request

Api = Literal["completions", "chat"]


@dataclass(frozen=True)
class Dialect:
    """The default is that of the engines that lmc starts. added_tokens is what the server adds to a prompt (BOS); None: unknown."""

    api: Api = "completions"
    prompt_ids: bool = True  # takes prompts as token ids
    ignore_eos: bool = True  # generates exactly as many tokens as asked
    token_ids: bool = True  # names the ids and the log-probabilities of what it generates
    request_id: bool = True  # takes the request's id in the body, as SGLang does; vLLM takes it from a header
    usage: bool = True  # counts tokens at the end of the stream
    limit: str = "max_tokens"
    added_tokens: int | None = 0

    @property
    def path(self) -> str:
        return "chat/completions" if self.api == "chat" else "completions"


def payload(dialect: Dialect, model: str, request: Request, request_id: str) -> dict[str, object]:
    """The body of a request. A request that is sent as text must have its text, one that is sent as a chat its messages."""
    body: dict[str, object] = {"model": model, "stream": True, "temperature": 0, dialect.limit: request.output_tokens}
    if dialect.api == "chat":
        body["messages"] = to_api(request.messages or ())
        if request.tools:
            body["tools"] = request.tools
    else:
        body["prompt"] = request.prompt if dialect.prompt_ids else request.text
    if dialect.request_id:
        body["rid"] = request_id
    if dialect.ignore_eos:
        body["ignore_eos"] = True
    if dialect.usage:
        body["stream_options"] = {"include_usage": True}
    if dialect.token_ids:
        body["return_tokens_as_token_ids"] = True
        chat = {"logprobs": True, "top_logprobs": 2}
        body |= chat if dialect.api == "chat" else {"logprobs": 2, "return_token_ids": True}
    return body
