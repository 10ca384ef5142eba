"""The one schema of the cache's settings: their names, defaults, meanings and limits.

A value comes from a command-line flag, else the environment (LMC_HOST_CAPACITY sets host.capacity), else the YAML file, else the default.
Unknown keys and bad values are errors. The sections for tiers and endpoints are in sections.py. settings.py finds, merges and explains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from lmc.cache.policy.registry import POLICIES, live_policy
from lmc.cache.sections import (
    SECRET,
    AdminConfig,
    ClientsConfig,
    DiskConfig,
    HostConfig,
    MetricsConfig,
    MooncakeConfig,
    RedisConfig,
    S3Config,
    Seconds,
    Section,
    ShareOrSize,
    Size,
)
from lmc.errors import ConfigError


class CacheConfig(Section):
    chunk_tokens: int | None = Field(default=None, gt=0, le=1_000_000)
    """Tokens per chunk, a multiple of the engine's block size. By default it is the smallest multiple that is at least 128."""
    checkpoint_tokens: int | None = Field(default=None, gt=0)
    """Of models with windows or states: tokens from one place inside a prompt where a later hit may end to the next, or of states the end
    of the engine's step before it. Smaller values give more hits of prompts that part, and take more memory. By default these places add a
    quarter to the memory of a prompt. A hit may always end where a prompt ended, and where an earlier prompt parted from what is stored."""
    policy: str = Field(default="lru", json_schema_extra={"choices": list(POLICIES)})
    """Eviction policy of the host and disk tiers. FILE.py:SPEC, or the name of an installed package's policy, takes one of your own."""
    write: Literal["through", "back", "around"] = "through"
    """When a chunk is written to the tiers below the host: at once (through), when the host evicts it (back), or when it has been
    touched write_touches times (around)."""
    write_touches: int = Field(default=2, ge=1, le=1000)
    """Number of touches after which a chunk is written to lower tiers. It is used in write mode around only."""
    ttl: Seconds | None = None
    """Time to live of a chunk in the host and disk tiers, by default unlimited. Remote tiers have their own (redis.ttl)."""
    ttl_mode: Literal["sliding", "fixed"] = "sliding"
    """Whether ttl counts from the last touch (sliding) or from the store (fixed)."""
    tenant_quota: ShareOrSize | None = None
    """Limit of host memory for the chunks of one tenant, over all ranks and all its cache salts: a size, or a share of host.capacity. A
    tenant at its limit evicts its own chunks first."""
    store_decode: bool = False
    """Also store chunks that contain generated tokens."""
    load: Literal["always", "auto"] = "always"
    """Whether all of a hit is loaded (always), or only what is loaded more quickly than it is computed, by what the tiers and the engine
    were measured to take (auto). On SGLang, at a node, and for models with windows or states, auto is the same as always."""
    min_load_tokens: int = Field(default=1, ge=1)
    """Load a hit only if it saves computing at least this number of tokens. Below that, computing is faster than loading."""
    background_load_tokens: int = Field(default=4096, ge=1)
    """Copy hits of at least this number of tokens in the background, while other requests continue. Smaller hits are copied right
    before the forward pass. With vLLM's async scheduling, its second model runner or its prefix cache, no hit is copied right before
    the pass that reads it: its request joins a batch after the copy. On a CPU a smaller hit is then copied between two passes."""
    transfer_backend: Literal["auto", "host", "dma", "kernel", "staged", "torch"] = "auto"
    """Backend that copies between engine blocks and host memory. auto measures at start which one is fastest for each size."""
    load_deadline: Seconds = 5.0
    """Longest time that a request waits for chunks from disk or remote tiers. Then it loads those that have arrived and computes the
    rest."""
    lookup_deadline: Seconds = 0.05
    """Longest time that a request waits for a remote tier to answer which chunks it holds."""
    io_threads: int = Field(default=4, ge=1, le=256)
    """Number of read threads, and number of write threads, per rank and tier below the host. Redis uses redis.connections instead."""
    queue_depth: int = Field(default=1024, ge=1)
    """Maximum number of queued writes, per rank and tier below the host, and never more than an eighth of the host's chunks (at least 16)
    unless write is back: a chunk that is being written cannot be evicted. Further writes are dropped and counted."""
    close_timeout: Seconds = 10.0
    """Longest time that stopping waits for writes under way. Writes that are not done by then are lost."""
    tenant: str = ""
    """Salt of every key. Instances with different tenants share no chunk."""
    auth_key: str | None = Field(default=None, json_schema_extra=SECRET)
    """Secret that authenticates stored chunks, of at least 16 characters: without it, nobody who can write to disk, Redis, S3 or Mooncake
    can forge a chunk. All instances that share chunks need the same one. Prefer LMC_AUTH_KEY or auth_key_file. Without it lmc only finds
    accidents."""
    auth_key_file: Path | None = None
    """File that contains auth_key. Set only one of the two."""
    strict: bool = False
    """Refuse to start the engine when a configured tier cannot be opened. Otherwise the engine runs without that tier."""
    log_format: Literal["text", "json"] = "text"
    """Format of lmc's log lines: the engine's own (text), or one JSON object per line on standard error (json)."""
    record: Path | None = None
    """Record every lookup in this file, for lmc sim. A file that is there is continued. Data-parallel engines write one file each:
    trace.jsonl, trace.dp1.jsonl, and so on."""
    record_limit: Size = 1024**3
    """Size at which the record continues in a new file. The full one is renamed to trace.jsonl.1, trace.jsonl.2 and so on; lmc sim reads
    them with it, and lmc deletes none."""
    engines_on_node: int | None = Field(default=None, ge=1, le=1024)
    """Number of engines on this node that share host.capacity, and disk.capacity in one folder. By default it is the number of
    data-parallel engines that the engine reports. Set it where each engine is started by itself."""
    node: Path | None = None
    """Socket of an lmc node on this machine. The engine then uses the node's cache and has none of its own: host, disk, redis, s3,
    mooncake, policy and what else decides about stored chunks are the node's settings. Without it, the cache is a part of the engine."""
    node_deadline: Seconds = 0.02
    """Longest time that the engine's scheduler waits for an answer of the node. Then the request computes what it would have loaded."""
    node_group: str | None = None
    """Group whose members may attach engines to the node, beside the node's own user. It is a setting of the node."""
    host: HostConfig = HostConfig()
    """The host tier keeps chunks in CPU memory."""
    disk: DiskConfig = DiskConfig()
    """The disk tier keeps one file per chunk and rank."""
    redis: RedisConfig = RedisConfig()
    """The Redis tier keeps chunks on a Redis or Valkey server."""
    s3: S3Config = S3Config()
    """The S3 tier keeps chunks in any S3-compatible store."""
    mooncake: MooncakeConfig = MooncakeConfig()
    """The Mooncake tier keeps chunks in the pooled memory of several machines."""
    metrics: MetricsConfig = MetricsConfig()
    """The metrics endpoint serves Prometheus metrics, statistics and commands."""
    admin: AdminConfig = AdminConfig()
    """Commands pin, prefetch and clear chunks of a running cache."""
    clients: ClientsConfig = ClientsConfig()
    """Which wishes of API clients are honoured. A request that brings admin.token may wish for all."""

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        return live_policy(name)

    @model_validator(mode="after")
    def _consistent(self) -> CacheConfig:
        if self.auth_key is not None and self.auth_key_file is not None:
            raise ConfigError("auth_key and auth_key_file are both set; leave one out")
        if self.redis.mode != "standalone" and self.redis.url and self.redis.url.startswith("unix:"):
            raise ConfigError(f"redis.mode {self.redis.mode} needs a redis:// or rediss:// address, not unix://")
        return self


DEFAULT_CHUNK_TOKENS = 128
REMOTE_TIERS = ("redis", "s3", "mooncake")  # they have an eviction of their own, so no capacity


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
