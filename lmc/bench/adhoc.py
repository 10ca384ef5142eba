"""The workload of `lmc bench --url`, which needs no file: new random prompts, then some of them again, to servers that already run.

The seed differs from run to run, because a server that was measured before may still hold the prompts of that run.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmc.bench.workload import Workload, first_error
from lmc.errors import WorkloadError

ANY_LENGTH = 1 << 30  # the server says what is too long


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. `urls` are addresses, or NAME=ADDRESS; `headers` are lines such as "X-Team: kv"."""

    urls: Sequence[str]
    model: str
    api: str
    headers: Sequence[str]
    ca: str | None
    reset: bool
    requests: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int | None  # None: one at a time, or at a trace's own times
    rate: float | None
    seed: int | None
    prompts: str | None = None
    trace: str | None = None
    speed: float = 1.0
    metrics: Sequence[str] = ()


def server_workload(asked: Asked) -> Workload:
    """Raises WorkloadError for options that don't fit."""
    headers = dict(map(_header, asked.headers))
    if asked.metrics and len(asked.urls) > 1:
        raise WorkloadError("--metrics goes with one --url; in a workload file each arm has its own")
    common = {
        "metrics": list(asked.metrics),
        "api": asked.api,
        "headers": headers,
        "ca": asked.ca,
        "reset": asked.reset,
        "model": asked.model,
    }
    arms = dict(_arm(url, index) for index, url in enumerate(asked.urls))
    if len(arms) < len(asked.urls):
        raise WorkloadError("--url: two servers have the same name")
    if asked.prompts is not None and asked.trace is not None:
        raise WorkloadError("give either --prompts or --trace")
    again = {"source": {"kind": "repeat", "part": "new"}, "pick": {"sessions": max(1, asked.requests // 2)}}
    load: dict[str, object] = {"kind": "closed", "concurrency": asked.concurrency or 1}
    if asked.rate is not None:
        load = {"kind": "poisson", "rate": asked.rate}
    elif asked.trace is not None and asked.concurrency is None:
        load = {"kind": "trace", "speed": asked.speed}
    parts: dict[str, Any] = {  # Any: as in a workload file
        "new": {
            "source": {"kind": "random", "tokens": asked.prompt_tokens},
            "pick": {"sessions": asked.requests},
            "output_tokens": asked.output_tokens,
        },
        "again": {**again, "output_tokens": asked.output_tokens},
    }
    about = "New random prompts, then half of them once more, sent to a running server."
    if (file := asked.prompts or asked.trace) is not None:
        source = {"kind": "trace" if asked.trace else "chats", "path": str(Path(file).absolute())}
        pick = {"sessions": asked.requests}
        parts = {"file": {"source": source, "pick": pick, "output_tokens": asked.output_tokens}}
        about = f"The first {asked.requests} requests of {Path(file).name}, sent to a running server."
    document: dict[str, Any] = {  # Any: as in a workload file
        "name": "server",
        "about": about,
        "seed": secrets.randbelow(1 << 31) if asked.seed is None else asked.seed,
        "parts": parts,
        "load": load,
        "engine": {"context": ANY_LENGTH},
        "arms": {name: {**common, "url": url} for name, url in arms.items()},
    }
    if len(arms) > 1 and load == {"kind": "closed", "concurrency": 1}:
        document["interleave"] = 3
    try:
        return Workload.model_validate(document)
    except ValidationError as error:
        raise WorkloadError(first_error(error)) from error


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not name.strip():
        raise WorkloadError("--header: a header is 'Name: value'")
    return name.strip(), value.strip()


def _arm(url: str, index: int) -> tuple[str, str]:
    name, equals, address = url.partition("=")
    if not equals or "/" in name:
        name, address = "server" if index == 0 else f"server-{index + 1}", url
    return name, address if "://" in address else f"http://{address}"
