"""The one schema of the cache's settings: their names, defaults, meanings and limits.

A value comes from a command-line flag, else the environment (LMC_HOST_CAPACITY sets host.capacity), else the YAML file, else the default.
Unknown keys and bad values are errors. lmc.cache.settings finds, merges and explains; this file only says what there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator

from lmc.cache.policy.registry import get_policy
from lmc.errors import ConfigError
from lmc.units import parse_seconds, parse_size


def _size(value: str | int) -> int:
    size = parse_size(value)
    if size == 0:
        raise ConfigError("a size of 0 is of no use; leave the tier out instead")
    return size


def _share_or_size(value: str | int) -> int | str:
    """Bytes, or a share of the memory that is free at start, such as "25%"."""
    if isinstance(value, str) and value.strip().endswith("%"):
        number = value.strip()[:-1].strip()
        if not number.replace(".", "", 1).isdigit() or not 0 < float(number) <= 100:
            raise ConfigError(f"{value!r} is not a share of memory; write 25% or a size such as 8GiB")
        return f"{number}%"
    return _size(value)


Size = Annotated[int, BeforeValidator(_size)]
ShareOrSize = Annotated[int | str, BeforeValidator(_share_or_size)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]


_SECRET: dict[str, JsonValue] = {"secret": True}  # kept out of command lines and printouts


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class HostConfig(Section):
    capacity: ShareOrSize = "25%"
    """Memory for chunks, over all ranks: a size, or a share of the memory that is free at start. It is never exceeded."""


class DiskConfig(Section):
    path: Path | None = None
    """Folder for chunk files; no folder, no disk tier."""
    capacity: Size = 100 * 1024**3
    """Bytes of chunk files over all ranks; the oldest by policy go first. Of a shared folder each instance may fill so much."""
    shared: bool = False
    """Other instances use the folder too: look there for chunks that this one did not write."""
    fsync: bool = True
    """Sync each file before it becomes visible, so that a power cut loses no byte silently."""


class RedisConfig(Section):
    url: str | None = Field(default=None, json_schema_extra=_SECRET)
    """redis://, rediss:// (TLS) or unix:// address; no address, no Redis tier. Valkey works too."""
    mode: Literal["standalone", "cluster", "sentinel"] = "standalone"
    """Topology behind the address."""
    sentinel_service: str = "mymaster"
    """Name of the master set, for mode sentinel."""
    username: str | None = None
    """ACL user."""
    password: str | None = Field(default=None, json_schema_extra=_SECRET)
    """Password; better given as LMC_REDIS_PASSWORD than in a file."""
    ca_file: Path | None = None
    """Certificate authority for TLS; default: the system's."""
    ttl: Seconds | None = None
    """Time to live of a value in Redis; none: Redis's own eviction decides."""
    timeout: Seconds = 1.0
    """Limit for one socket operation."""
    connections: int = Field(default=2, ge=1, le=256)
    """Values on their way at once, per rank: so many in, and so many out. One thread of Redis serves them all, so more gain something only
    with a cluster or over a slow network."""


class S3Config(Section):
    bucket: str | None = None
    """Bucket for chunks; no bucket, no S3 tier."""
    prefix: str = "lmc"
    """Leading part of every object name."""
    endpoint: str | None = None
    """Address of an S3-compatible store; default: AWS."""
    region: str | None = None
    """Region; default: from the environment."""
    access_key_id: str | None = None
    """Access key; default: the SDK's usual sources."""
    secret_access_key: str | None = Field(default=None, json_schema_extra=_SECRET)
    """Secret key; default: the SDK's usual sources."""
    timeout: Seconds = 5.0
    """Limit for one request."""


class MetricsConfig(Section):
    host: str = "127.0.0.1"
    """Address of the metrics endpoint."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the metrics endpoint; 0 picks a free one, which lmc serve prints."""
    enabled: bool = True
    """Serve Prometheus metrics over HTTP."""


class AdminConfig(Section):
    enabled: bool = True
    """Accept commands (pin, unpin, prefetch, clear) at the metrics endpoint. They need the token unless it listens on this machine only."""
    token: str | None = Field(default=None, json_schema_extra=_SECRET)
    """Commands must bring it as "Authorization: Bearer TOKEN"; better given as LMC_ADMIN_TOKEN than in a file."""


class CacheConfig(Section):
    chunk_tokens: int | None = Field(default=None, gt=0, le=1_000_000)
    """Tokens per chunk, a multiple of the engine's block. Default: the engine's block, repeated up to at least 128 tokens."""
    policy: str = "lru"
    """Eviction policy of the host and disk tiers."""
    write: Literal["through", "back", "around"] = "through"
    """When a chunk goes to the tiers below the host: at once (through), when the host evicts it (back), or at its write_touches-th touch
    (around)."""
    write_touches: int = Field(default=2, ge=1, le=1000)
    """For write: around. The touch at which a chunk is written below."""
    ttl: Seconds | None = None
    """Forget a chunk after so long; none: never. Remote tiers keep their own time (redis.ttl)."""
    ttl_mode: Literal["sliding", "fixed"] = "sliding"
    """Whether ttl counts from the last touch (sliding) or from the store (fixed)."""
    tenant_quota: ShareOrSize | None = None
    """Most host memory for the chunks of one tenant, over all ranks: a size, or a share of host.capacity. At its quota a tenant's own
    oldest chunks go first."""
    store_decode: bool = False
    """Store chunks that end in generated tokens too, not only the prompt's."""
    min_load_tokens: int = Field(default=1, ge=1)
    """Load a hit only if it saves at least so many tokens; below that recomputing is quicker."""
    background_load_tokens: int = Field(default=4096, ge=1)
    """Copy a hit of at least so many tokens in the background, while the batch goes on; a smaller one right before the forward pass.
    With vLLM's async scheduling or its second model runner, every hit."""
    transfer_backend: Literal["auto", "host", "dma", "kernel", "staged", "torch"] = "auto"
    """What copies between engine blocks and host memory; auto measures at start which is fastest for which size."""
    load_deadline: Seconds = 5.0
    """A request waits at most so long for chunks from disk or remote tiers; then it loads what is there and computes the rest."""
    lookup_deadline: Seconds = 0.05
    """A request waits at most so long for a remote tier to say what it holds."""
    io_threads: int = Field(default=4, ge=1, le=256)
    """Threads per rank for each tier below the host: so many for reads, and so many for writes. For Redis see redis.connections."""
    queue_depth: int = Field(default=1024, ge=1)
    """Writes that may wait, per rank and tier below the host; beyond that a write is dropped and counted."""
    close_timeout: Seconds = 10.0
    """At the end, writes under way get at most so long; those not done by then are lost."""
    tenant: str = ""
    """Salt of every key: instances with different tenants share nothing."""
    strict: bool = False
    """Refuse to start the engine when a configured tier cannot be opened; otherwise run without that tier."""
    log_format: Literal["text", "json"] = "text"
    """Log lines of lmc: in the engine's own format (text), or one JSON object per line on standard error (json)."""
    record: Path | None = None
    """Write every lookup to this file, for lmc sim."""
    host: HostConfig = HostConfig()
    """CPU memory."""
    disk: DiskConfig = DiskConfig()
    """Files."""
    redis: RedisConfig = RedisConfig()
    """Redis or Valkey."""
    s3: S3Config = S3Config()
    """An S3-compatible store."""
    metrics: MetricsConfig = MetricsConfig()
    """Prometheus endpoint."""
    admin: AdminConfig = AdminConfig()
    """Commands to a running cache."""

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        return get_policy(name).name

    @model_validator(mode="after")
    def _consistent(self) -> CacheConfig:
        if self.redis.mode != "standalone" and self.redis.url and self.redis.url.startswith("unix:"):
            raise ConfigError(
                f"redis.mode {self.redis.mode} needs a redis:// or rediss:// address, not {self.redis.url!r}"
            )
        return self


DEFAULT_CHUNK_TOKENS = 128
REMOTE_TIERS = ("redis", "s3")  # they have an eviction of their own, so no capacity


def chunk_tokens_for(config: CacheConfig, block_tokens: int) -> int:
    """Tokens per chunk on an engine with this block size. Raises ConfigError when the configured size is not a multiple of it."""
    if config.chunk_tokens is None:
        return block_tokens * -(-DEFAULT_CHUNK_TOKENS // block_tokens)
    if config.chunk_tokens % block_tokens:
        below = config.chunk_tokens // block_tokens * block_tokens
        raise ConfigError(
            f"chunk_tokens {config.chunk_tokens} is not a multiple of the engine's block of {block_tokens} tokens; "
            f"use {f'{below} or ' if below else ''}{below + block_tokens}"
        )
    return config.chunk_tokens
