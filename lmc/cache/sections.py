"""The sections of the settings, one for each tier and each endpoint: names, defaults, meanings and limits. See config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from lmc.errors import ConfigError
from lmc.units import parse_seconds, parse_size

LEAST_CAPACITY = 1 << 16  # bytes; no chunk is smaller


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


SECRET: dict[str, JsonValue] = {"secret": True}  # kept out of command lines and printouts


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class HostConfig(Section):
    capacity: ShareOrSize = "25%"
    """Memory limit for chunks on one node, over all ranks and all data-parallel engines: a size, or a share of the memory that is free at
    start, on the machine or in the container's cgroup, whichever is less."""


Compress = Literal["none", "lossless", "lossless-max"]


class DiskConfig(Section):
    path: Path | None = None
    """Folder of the chunk files. Without it, there is no disk tier."""
    capacity: Size = 100 * 1024**3
    """Size limit of all chunk files under path, over all ranks, models, instances and data-parallel engines. Chunks of models
    and settings that no process uses are deleted first. Then the eviction policy chooses."""
    shared: bool = False
    """Share the folder with other instances: look there for chunks that this instance did not write."""
    fsync: bool = True
    """Sync each file to the disk before it becomes visible, so that a power failure damages no stored chunk."""
    compress: Compress = "none"
    """Lossless compression of the chunks that are written here: none, lossless (fast), or lossless-max (shorter and slower). Chunks that
    were stored otherwise are read all the same. docs/compression.md says where it pays."""


class RedisConfig(Section):
    url: str | None = Field(default=None, json_schema_extra=SECRET)
    """Address of a Redis or Valkey server: redis://, rediss:// (TLS) or unix:///path?db=N. What comes before the last @ is user:password,
    with any characters. Without an address, there is no Redis tier."""
    mode: Literal["standalone", "cluster", "sentinel"] = "standalone"
    """Kind of deployment at the address."""
    sentinel_service: str = "mymaster"
    """Name of the master set. It is used in mode sentinel only."""
    username: str | None = None
    """User name, if the server has access control lists."""
    password: str | None = Field(default=None, json_schema_extra=SECRET)
    """Password. Set it as LMC_REDIS_PASSWORD rather than in a file."""
    sentinel_username: str | None = None
    """User name at the Sentinels themselves; username is for the servers."""
    sentinel_password: str | None = Field(default=None, json_schema_extra=SECRET)
    """Password of the Sentinels themselves (requirepass). Set it as LMC_REDIS_SENTINEL_PASSWORD rather than in a file."""
    ca_file: Path | None = None
    """File of the certificate authority for TLS, by default the system's."""
    ttl: Seconds | None = None
    """Time to live of a value in Redis. By default only Redis's own eviction removes values."""
    timeout: Seconds = 1.0
    """Time limit of one socket operation."""
    connections: int = Field(default=2, ge=1, le=256)
    """Maximum concurrent reads, and maximum concurrent writes, per rank. One thread of Redis serves all connections, so a higher number
    helps only with a cluster or over a slow network."""
    compress: Compress = "none"
    """Lossless compression of the chunks that are written here, as disk.compress."""


class S3Config(Section):
    bucket: str | None = None
    """Bucket of the chunks. Without it, there is no S3 tier."""
    prefix: str = "lmc"
    """Prefix of every object name."""
    endpoint: str | None = None
    """Address of an S3-compatible store, by default AWS_ENDPOINT_URL or the profile's endpoint_url, else AWS."""
    region: str | None = None
    """Region, by default AWS_REGION or the profile's."""
    access_key_id: str | None = None
    """Access key. By default it comes from AWS's variables, else from AWS_PROFILE in ~/.aws/credentials and ~/.aws/config, else from the
    machine's identity."""
    secret_access_key: str | None = Field(default=None, json_schema_extra=SECRET)
    """Secret key, by default from the same place as the access key."""
    timeout: Seconds = 5.0
    """Time limit of one request."""
    compress: Compress = "none"
    """Lossless compression of the chunks that are written here, as disk.compress."""


class MooncakeConfig(Section):
    master: str | None = None
    """Address of a Mooncake master, HOST:PORT. Without it, there is no Mooncake tier."""
    metadata: str | None = None
    """Address of the metadata server, such as http://HOST:PORT/metadata. By default the clients tell each other (P2PHANDSHAKE). All clients
    of a store need the same."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """How chunks are moved between machines."""
    devices: str = ""
    """RDMA devices, separated by commas. By default the client chooses."""
    segment: Size | None = None
    """Memory that each rank contributes to the store, beside host.capacity. By default it contributes none, and others must."""
    hostname: str | None = None
    """Name or address of this machine for the other clients, by default its address in the master's network."""
    timeout: Seconds = 2.0
    """Time limit of one question to the master."""
    compress: Compress = "none"
    """Lossless compression of the chunks that are written here, as disk.compress."""


class MetricsConfig(Section):
    host: str = "127.0.0.1"
    """Address that the metrics endpoint listens on."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the metrics endpoint. 0 takes a free port; lmc serve prints it. Data-parallel engine N takes port + N."""
    enabled: bool = True
    """Serve Prometheus metrics over HTTP."""


class AdminConfig(Section):
    enabled: bool = True
    """Accept commands (pin, unpin, prefetch, clear) at the metrics endpoint. They need admin.token unless the endpoint listens on this
    machine only."""
    token: str | None = Field(default=None, json_schema_extra=SECRET)
    """Token that commands must send as "Authorization: Bearer TOKEN". Set it as LMC_ADMIN_TOKEN rather than in a file."""


class ClientsConfig(Section):
    bypass: bool = True
    """Honour the wish bypass: neither load nor store."""
    store: bool = True
    """Honour the wish store: false, which is to store nothing."""
    tenant: bool = False
    """Honour the wish tenant. A client that names a tenant can load its chunks, so set this only where a trusted gateway writes that
    field."""
    pin: bool = False
    """Honour the wish pin_seconds, within the limits below."""
    pins: int = Field(default=100, ge=1, le=10_000)
    """Maximum number of pins that requests hold at a time."""
    pin_seconds: Seconds = 3600.0
    """Longest time of such a pin."""
    pin_share: ShareOrSize = "10%"
    """Limit of host memory for the chunks of all such pins: a size, or a share of host.capacity. A prompt's start is pinned first."""
