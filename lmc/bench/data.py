"""The data files of the shipped workloads: where they come from, under which licence, and their download with a checksum.

A file is kept compressed, under the name that the workloads use, in LMC_DATA_DIR or, without it, in lmc's cache folder.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmc.errors import RunError, WorkloadError
from lmc.model import cache_home
from lmc.report import write_file

TIMEOUT_S = 30.0
_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class DataFile:
    """`sha256` is that of the uncompressed content. Without a url, `origin` says how the file is made."""

    name: str
    file: str
    workloads: str
    licence: str
    origin: str
    url: str | None = None
    sha256: str | None = None


FILES = {
    data.name: data
    for data in (
        DataFile(
            "gsm8k", "gsm8k_test.jsonl.gz", "few-shot", "MIT", "openai/grade-school-math at 3101c7d",
            f"{_RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
        DataFile(
            "xquad", "xquad.en.json.gz", "document-qa", "CC BY-SA 4.0", "google-deepmind/xquad at 7d30520",
            f"{_RAW}/google-deepmind/xquad/7d30520c717524000f0d9d2f9c10a069acd9d285/xquad.en.json",
            "e4c57d1c9143aaa1c5d265ba5987a65f4e69528d2a98f29d6e75019b10344f29",
        ),
        DataFile(
            "mtbench101", "mtbench101.jsonl.gz", "multi-turn-chat", "Apache-2.0", "mtbench101/mt-bench-101 at bc18b3e",
            f"{_RAW}/mtbench101/mt-bench-101/bc18b3e2c18c99164e11528f1a79c92083db5953/data/subjective/mtbench101.jsonl",
            "1a1e433acf7e2ef013b5001b60fd8e48bc3e4202460727e25b2ea8575aae7d80",
        ),
        DataFile(
            "mooncake", "mooncake_conversation_trace.jsonl.gz", "mooncake-conversation", "Apache-2.0",
            "kvcache-ai/Mooncake at 3b5a594",
            f"{_RAW}/kvcache-ai/Mooncake/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces/conversation_trace.jsonl",
            "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        ),
        DataFile(
            "miniswe", "lmcache_agent_miniswe.jsonl.gz", "agentic-coding, kv-pressure", "Apache-2.0",
            "LMCache/lmcache-agent-trace at 16a14ad: the lines of miniswe/*.jsonl, sorted by timestamp",
        ),
        DataFile(
            "tau2", "tau2_policies_tasks.tar.gz", "tool-agents", "MIT",
            "sierra-research/tau2-bench at a2c0247: a tar archive of the folders of data/tau2/domains",
        ),
    )
}  # fmt: skip


def data_folder() -> Path:
    """Where data files are looked for and kept."""
    chosen = os.environ.get("LMC_DATA_DIR")
    return Path(chosen) if chosen else cache_home() / "data"


def fetch(name: str, open_url: Callable[[str], bytes] | None = None) -> Path:
    """Download a file and check it; returns its place. Raises WorkloadError for an unknown name, RunError if it cannot be had."""
    if name not in FILES:
        raise WorkloadError(f"there is no data file {name!r}; there are {', '.join(FILES)}")
    data = FILES[name]
    if data.url is None or data.sha256 is None:
        raise RunError(f"{name} cannot be downloaded as it is; make {data_folder() / data.file} from {data.origin}")
    content = (open_url or _download)(data.url)
    found = hashlib.sha256(content).hexdigest()
    if found != data.sha256:
        raise RunError(f"{data.url}: the content has the checksum {found}, not {data.sha256}; nothing was kept")
    place = data_folder() / data.file
    write_file(place, gzip.compress(content, mtime=0))
    return place


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise RunError(
            f"cannot download {url}: {reason}; without a network, copy the file of another machine into {data_folder()}"
        ) from None
    return content
