"""How a running server is reached: headers with a key, an own certificate authority, proxies of the environment."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp

from lmc.errors import WorkloadError

KEY_VARIABLE = "LMC_BENCH_API_KEY"
READ_BUFFER_BYTES = 1 << 18


@dataclass(frozen=True)
class Access:
    """`headers` go with every request to the API and are never shown. `ca` is a file of certificates to trust, in place of the system's."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca: str | None = None
    proxies: bool = False  # whether HTTP_PROXY and its siblings hold

    def session(self, timeout_s: float | None = None) -> aiohttp.ClientSession:
        """A session whose requests carry no header by themselves. Raises WorkloadError if `ca` cannot be read."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ssl=_trusting(self.ca)),
            timeout=aiohttp.ClientTimeout(total=timeout_s) if timeout_s is not None else aiohttp.ClientTimeout(),
            read_bufsize=READ_BUFFER_BYTES,
            trust_env=self.proxies,
        )


def access_to(headers: Mapping[str, str], ca: str | None) -> Access:
    """Access to a server that somebody else runs. Variables in the headers are expanded; the key comes from LMC_BENCH_API_KEY."""
    sent = {name: os.path.expandvars(value) for name, value in headers.items()}
    if (key := os.environ.get(KEY_VARIABLE)) and not any(name.lower() == "authorization" for name in sent):
        sent["Authorization"] = f"Bearer {key}"
    return Access(sent, ca, proxies=True)


def _trusting(ca: str | None) -> ssl.SSLContext | bool:
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise WorkloadError(f"{ca}: cannot read certificates: {error}; give a PEM file") from error
