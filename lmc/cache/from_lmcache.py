"""Translates a settings file of LMCache's in-process mode, and says what has no counterpart.

It knows the keys of LMCache 0.5.6. LMCache counts sizes in GiB and for each rank; lmc counts them over all ranks of a node.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from lmc.cache.settings import load_settings, read_yaml
from lmc.errors import ConfigError

_POLICIES = {"LRU": "lru", "LFU": "lfu", "FIFO": "fifo"}
_REDIS = {"redis": "standalone", "rediss": "standalone", "valkey": "standalone", "redis-sentinel": "sentinel"}
_NOT_NEEDED = {  # why these keys need no counterpart
    "reserve_local_cpu_size": "host.capacity is a limit, also as a share of the free memory",
    "local_cpu_use_hugepages": "lmc chooses the pages itself",
    "local_disk_path_sharding": "lmc keeps the ranks apart in its folder",
    "use_layerwise": "lmc loads layer by layer where that is quicker",
    "pre_caching_hash_algorithm": "names are the same in every process",
    "save_unfull_chunk": "only full chunks are stored; a smaller chunk_tokens loses less at the end of a prompt",
    "numa_mode": "host memory is on the device's memory node",
    "enable_async_loading": "lmc always stages while requests wait outside the batch",
    "py_enable_gc": "lmc leaves Python's collector alone",
    "lmcache_instance_id": "instances need no names",
    "enable_lazy_memory_allocator": "host memory is registered after the start, while the engine runs",
    "enable_kv_events": "lmc adds its tiers to vLLM's own stream, if --kv-events-config asks for one",
    "internal_api_server_enabled": "metrics and commands are at metrics.port",
    "internal_api_server_host": "see metrics.host",
    "internal_api_server_port_start": "see metrics.port",
    "pin_timeout_sec": "see clients.pin_seconds",
    "enable_chunk_statistics": "lmc serve --record writes what lmc sim describe counts",
}
_ELSEWHERE = [  # beginnings of keys, and where the job is done instead
    ("enable_blending|blend_", "chunks are reused as parts of a prefix only"),
    ("enable_p2p|p2p_", "instances share through Redis, S3 or a common folder (disk.shared)"),
    ("enable_pd|pd_|nixl_|transfer_channel", "two engines share a store, see examples/README.md"),
    ("enable_controller|controller_|lmcache_worker_", "routers read the KV events of lmc's tiers"),
    ("mp_", "engines of a machine share lmc node, see docs/node.md"),
    ("gds_|use_gds|maru_", "there is no such tier; a disk is read into host memory"),
]


@dataclass
class Translation:
    """Settings by dotted key, and a remark for everything that was not taken as it stood."""

    settings: dict[str, object] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def yaml(self) -> str:
        """A settings file with the remarks as comments."""
        tree: dict[str, object] = {}
        for key, value in self.settings.items():
            section, _, name = key.rpartition(".")
            where = tree.setdefault(section, {}) if section else tree
            assert isinstance(where, dict)
            where[name] = value
        comments = "".join(f"# {remark}\n" for remark in self.remarks)
        return comments + (yaml.safe_dump(tree, sort_keys=False) if tree else "{}\n")


def translate(file: Path) -> Translation:
    """Raises ConfigError if the file is no settings file of LMCache, or holds a value that cannot be one."""
    given = read_yaml(file)
    made = Translation()
    for key, value in given.items():
        if value is None:
            continue
        if key in _TRANSLATED:
            _TRANSLATED[key](value, made, given)
        else:
            made.remarks.append(f"{key}: {_without_counterpart(key)}")
    load_settings(flags=made.settings)  # what comes out can be used
    return made


def _without_counterpart(key: str) -> str:
    if key in _NOT_NEEDED:
        return f"not needed: {_NOT_NEEDED[key]}"
    for pattern, instead in _ELSEWHERE:
        if re.match(pattern, key):
            return f"no counterpart: {instead}"
    return "no counterpart"


def _gib(key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{key} is {value!r}; LMCache takes a number of GiB there")
    return f"{value:g}GiB"


def _host(value: object, made: Translation, given: Mapping[str, object]) -> None:
    if given.get("local_cpu") is False:
        return
    made.settings["host.capacity"] = _gib("max_local_cpu_size", value)
    made.remarks.append(
        "max_local_cpu_size is for each rank, host.capacity for all ranks of a node: multiply by the ranks"
    )


def _local_cpu(value: object, made: Translation, given: Mapping[str, object]) -> None:
    if value is False:
        size = given.get("max_local_cpu_size")
        if size is not None:
            made.settings["host.capacity"] = _gib("max_local_cpu_size", size)
        made.remarks.append("local_cpu: lmc always has a host tier, which the lower tiers are staged through")


def _disk(value: object, made: Translation, given: Mapping[str, object]) -> None:
    first, *more = (part.strip() for part in str(value).split(","))
    made.settings["disk.path"] = first.removeprefix("file://")
    if more:
        made.remarks.append(f"local_disk: lmc has one folder; left out: {', '.join(more)}")


def _disk_size(value: object, made: Translation, given: Mapping[str, object]) -> None:
    if given.get("local_disk"):
        made.settings["disk.capacity"] = _gib("max_local_disk_size", value)
        made.remarks.append("max_local_disk_size is for each rank, disk.capacity for the folder: multiply by the ranks")


def _remote(value: object, made: Translation, given: Mapping[str, object]) -> None:
    url = urlsplit(str(value))
    if url.scheme in _REDIS:
        address = str(value).replace(f"{url.scheme}://", "redis://" if url.scheme != "rediss" else "rediss://", 1)
        made.settings["redis.url"] = address
        if _REDIS[url.scheme] != "standalone":
            made.settings["redis.mode"] = _REDIS[url.scheme]
    elif url.scheme == "s3":
        bucket, _, rest = (url.hostname or "").partition(".")
        made.settings["s3.bucket"] = bucket
        if rest and not rest.endswith("amazonaws.com"):
            made.settings["s3.endpoint"] = f"https://{rest}"
        made.remarks.append("remote_url: see s3.region, s3.endpoint and the credentials in docs/configuration.md")
    elif url.scheme == "mooncakestore":
        made.settings["mooncake.master"] = url.netloc
        made.remarks.append("remote_url: see mooncake.metadata, protocol and segment, which LMCache has elsewhere")
    elif url.scheme == "fs" and not given.get("local_disk"):
        made.settings |= {"disk.path": url.path, "disk.shared": True}
    else:
        made.remarks.append(
            f"remote_url: lmc has no tier for {url.scheme or value}; there are Redis, S3, Mooncake and folders"
        )


def _serde(value: object, made: Translation, given: Mapping[str, object]) -> None:
    if value != "naive":
        made.remarks.append(f"remote_serde: {value} changes the values; lmc compresses without loss (redis.compress)")


def _policy(value: object, made: Translation, given: Mapping[str, object]) -> None:
    if (name := _POLICIES.get(str(value).upper())) is not None:
        made.settings["policy"] = name
    else:
        made.remarks.append(f"cache_policy: lmc has no {value}; lmc sim tune finds a policy for your traffic")


def _same(name: str, unit: str = "") -> Callable[[object, Translation, Mapping[str, object]], None]:
    def take(value: object, made: Translation, given: Mapping[str, object]) -> None:
        made.settings[name] = f"{value}{unit}" if unit else value

    return take


def _min_tokens(value: object, made: Translation, given: Mapping[str, object]) -> None:
    if value:
        made.settings["min_load_tokens"] = value


def _extra(value: object, made: Translation, given: Mapping[str, object]) -> None:
    if isinstance(value, dict):
        made.remarks += [f"extra_config.{key}: {_without_counterpart(str(key))}" for key in value]


_TRANSLATED: dict[str, Callable[[object, Translation, Mapping[str, object]], None]] = {
    "chunk_size": _same("chunk_tokens"),
    "local_cpu": _local_cpu,
    "max_local_cpu_size": _host,
    "local_disk": _disk,
    "max_local_disk_size": _disk_size,
    "remote_url": _remote,
    "remote_serde": _serde,
    "cache_policy": _policy,
    "save_decode_cache": _same("store_decode"),
    "min_retrieve_tokens": _min_tokens,
    "lookup_timeout_ms": _same("lookup_deadline", "ms"),
    "blocking_timeout_secs": _same("load_deadline", "s"),
    "extra_config": _extra,
}
