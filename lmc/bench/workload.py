"""The schema of a workload file: the requests, their arrival, and the arms that are compared. It is strict, and read from YAML.

Nothing here opens a data set or starts an engine. Templates and expressions are Jinja2; their names are `row` (one row of the
source), `documents` and `index`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lmc.errors import ConfigError, WorkloadError
from lmc.shipped import shipped
from lmc.units import parse_count, parse_seconds


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:  # Any: the YAML value at this place
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}; {nearest(str(key), list(cls.model_fields))}")
        return data


def nearest(name: str, known: list[str]) -> str:
    """ "did you mean 'seed'?", or the list of known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _seconds(value: Any) -> float:  # Any: the raw YAML value, checked by the parser
    try:
        return parse_seconds(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _count(value: Any) -> int:  # Any: the raw YAML value, checked by the parser
    try:
        return parse_count(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


Seconds = Annotated[float, BeforeValidator(_seconds)]
Count = Annotated[int, BeforeValidator(_count), Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Expression = str  # Jinja2 expression, evaluated to a Python value
Template = str  # Jinja2 template, rendered to text


class FileSource(Strict):
    """A file, or one member of a tar archive. `$LMC_DATA_DIR` and the like are expanded; a relative path starts at the workload file."""

    kind: Literal["file"] = "file"
    path: str
    member: str | None = None
    format: Literal["jsonl", "json", "csv", "parquet", "text"] = "jsonl"
    explode: list[str] = []  # nested lists to walk: ["data", "paragraphs"] yields rows with both fields


class PackageSource(Strict):
    """A data file inside an installed package, which is found but not imported."""

    kind: Literal["package"]
    package: str
    path: str
    format: Literal["jsonl", "json", "csv", "parquet", "text"] = "jsonl"
    explode: list[str] = []


class HubSource(Strict):
    """A data set of the Hugging Face hub, by its name there or as a folder with a copy of it."""

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    split: str = "train"


class RandomSource(Strict):
    """Prompts of random tokens, no two of which share a chunk."""

    kind: Literal["random"]
    tokens: Count


class RepeatSource(Strict):
    """The last requests of another part, sent once more."""

    kind: Literal["repeat"]
    part: str


class TraceSource(Strict):
    """Requests of a trace in any format that lmc sim reads and that names its trace blocks by ids: lmc's own record, Mooncake, Bailian, ...

    Each id becomes `tokens_per_block` tokens that depend on nothing but the id and the seed; `block_tokens` is the length of a trace block
    in the trace, if the trace does not say it. Lengths are scaled by tokens_per_block / block_tokens; by default they stay as they are.
    """

    kind: Literal["trace"]
    path: str
    block_tokens: Count | None = None
    tokens_per_block: Count | None = None


class ChatSource(Strict):
    """Conversations of ShareGPT, chats of OpenAI's API with tools, or plain prompts, as JSON objects in a file (JSONL, .gz, .zst)."""

    kind: Literal["chats"]
    path: str


Rows = FileSource | PackageSource | HubSource
Source = Annotated[
    FileSource | PackageSource | HubSource | RandomSource | RepeatSource | TraceSource | ChatSource,
    Field(discriminator="kind"),
]


class Session(Strict):
    """How a row becomes a conversation: either a chat (`turns`, with `system` and `replies` if needed) or raw text (`prompt`)."""

    system: Template | None = None
    turns: Expression | None = None
    replies: Expression | None = None
    prompt: Template | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Session:
        if (self.turns is None) == (self.prompt is None):
            raise ValueError("give either turns (chat) or prompt (raw text)")
        if self.prompt is not None and (self.system or self.replies):
            raise ValueError("system and replies belong to turns, not to prompt")
        return self


class Pick(Strict):
    """Which sessions are taken, in the order of the source. A group is all sessions with the same value of `group_by`."""

    sessions: Count | None = None
    groups: Count | None = None
    per_group: Count | None = None
    turns: Count | None = None
    min_prompt_tokens: int = 0
    max_prompt_tokens: int | None = None


class Part(Strict):
    source: Source
    documents: dict[str, Annotated[Rows, Field(discriminator="kind")]] = {}
    where: Expression | None = None
    group_by: Expression | None = None
    session_by: Expression | None = None
    at: Expression | None = None  # seconds on the data set's own clock, for load.kind: trace
    session: Session | None = None
    pick: Pick = Pick()
    output_tokens: Count = 16
    think: Seconds = 0.0

    @model_validator(mode="after")
    def _session_where_rows_are(self) -> Part:
        has_rows = isinstance(self.source, FileSource | PackageSource | HubSource)
        if has_rows and self.session is None:
            raise ValueError("session is missing; it says how a row becomes a conversation")
        if not has_rows and (
            self.session or self.where or self.group_by or self.session_by or self.at or self.documents
        ):
            raise ValueError(
                f"a {self.source.kind} source takes no session, where, group_by, session_by, at or documents"
            )
        if self.pick.per_group and not self.group_by:
            raise ValueError("pick.per_group needs group_by")
        return self


class Closed(Strict):
    """`concurrency` requests at a time. Their order is session by session, turn by turn over all sessions, or shuffled by the seed."""

    kind: Literal["closed"] = "closed"
    concurrency: Count = 1
    order: Literal["sessions", "turns", "shuffled"] = "sessions"


class OpenLoop(Strict):
    """Sessions arrive at `rate` per second, even if the server is slow. burstiness 1 is Poisson, smaller is burstier (gamma)."""

    kind: Literal["constant", "poisson", "gamma"]
    rate: Positive
    burstiness: Positive = 1.0


class TraceTimes(Strict):
    """Requests arrive at the source's own times, divided by `speed`."""

    kind: Literal["trace"]
    speed: Positive = 1.0


class Users(Strict):
    """`users` conversations run at a time; each user sends a turn every users / rate seconds."""

    kind: Literal["users"]
    users: Count
    rate: Positive


class Limits(Strict):
    requests: Count | None = None
    seconds: Seconds | None = None
    concurrency: Count | None = None
    timeout: Seconds = 600.0
    processes: Count | None = None  # of the client; default: as many as the rate or the concurrency needs


class Slo(Strict):
    """Bounds that a request must keep to count as goodput."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2e_ms: Positive | None = None


class WarmUp(Strict):
    """Random prompts that share nothing with the workload. Each is sent twice, so that the path of a hit is warm too."""

    requests: Annotated[int, Field(ge=0)] = 1
    tokens: Count = 300


class Engine(Strict):
    """Settings with which the engine of every arm is started."""

    kind: Literal["vllm", "sglang"] = "vllm"
    context: Count = 8192  # tokens of prompt and output; longer requests are skipped and counted
    args: list[str] = []
    env: dict[str, str] = {}
    start_timeout: Seconds = 600.0


class Arm(Strict):
    """One configuration under test: an engine that lmc starts, or the URL of a running server."""

    about: str = ""
    args: list[str] = []
    env: dict[str, str] = {}
    cache: dict[str, Any] | None = (
        None  # Any: lmc's own configuration, checked by lmc serve; "{disk}" is the arm's folder, {redis}, {s3} and {mooncake} its servers
    )
    restart_of: str | None = None
    instances: Count = 1  # engines with these settings; requests go to them in turn
    node: bool = False  # the cache is that of an lmc node, started for the arm, and all its engines attach to it
    reuse: Literal["none", "engine", "cache", "unknown"] = "unknown"
    url: str | None = None
    metrics: list[str] = []
    model: str | None = None  # the name under which the running server serves the model
    api: Literal["completions", "chat"] = "completions"
    headers: dict[str, str] = Field({}, exclude=True)  # of a running server; may be secret, so results don't hold them
    ca: str | None = None  # file of certificates to trust
    reset: bool = False  # ask the running server to empty its caches first

    @model_validator(mode="after")
    def _started_or_reached(self) -> Arm:
        if self.url and (self.args or self.env or self.cache is not None or self.restart_of):
            raise ValueError("an arm with a url takes no args, env, cache or restart_of")
        if not self.url and (self.model or self.headers or self.ca or self.reset or self.api != "completions"):
            raise ValueError("model, api, headers, ca and reset belong to an arm with a url")
        if self.node and self.cache is None:
            raise ValueError("node: an arm with a node needs cache, the node's settings")
        if self.url and self.instances > 1:
            raise ValueError("an arm with a url has one instance; put a router before several servers")
        return self


class Bar(Strict):
    """A bound on a ratio of two arms: `metric` of `a` divided by that of `b`, over the requests that `over` names.

    With `against`, b's requests are those of that part instead; then a and b may be one arm.
    """

    a: str
    b: str
    metric: Literal["ttft_p50", "throughput"] = "ttft_p50"
    over: str = "all"  # "all", "hits" (requests with a hit on a), or a part
    against: str | None = None
    at_most: Positive | None = None
    at_least: Positive | None = None


class Workload(Strict):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    about: str = ""
    licence: str = ""
    seed: int = 0
    model: str | None = None
    parts: dict[str, Part] = Field(min_length=1)
    load: Annotated[Closed | OpenLoop | TraceTimes | Users, Field(discriminator="kind")] = Closed()
    limits: Limits = Limits()
    slo: Slo = Slo()
    warm_up: WarmUp = WarmUp()
    prime: list[str] = []  # parts that are sent once before the measured load
    engine: Engine = Engine()
    arms: dict[str, Arm] = Field(min_length=1)
    interleave: Count | None = (
        None  # requests per stretch; all arms run at once and take turns (ABBA) after each stretch
    )
    bars: list[Bar] = []
    quick: dict[str, Any] = {}  # Any: an overlay on this document, checked once it is laid over

    @model_validator(mode="after")
    def _names_exist(self) -> Workload:
        arms, parts = list(self.arms), list(self.parts)
        for name, arm in self.arms.items():
            if arm.restart_of is not None:
                if arm.restart_of not in arms[: arms.index(name)]:
                    raise ValueError(f"arms.{name}.restart_of: {arm.restart_of!r} is not an arm before it")
                if self.arms[arm.restart_of].cache is None:
                    raise ValueError(
                        f"arms.{name}.restart_of: {arm.restart_of!r} has no cache whose disk could be kept"
                    )
        for name, part in self.parts.items():
            if isinstance(part.source, RepeatSource) and part.source.part not in parts[: parts.index(name)]:
                raise ValueError(f"parts.{name}.source.part: {part.source.part!r} is not a part before it")
        if self.interleave and not isinstance(self.load, Closed):
            raise ValueError("interleave: only a closed loop can be cut into stretches; use load.kind closed")
        for part_name in self.prime:
            if part_name not in parts:
                raise ValueError(f"prime: no part {part_name!r}; {nearest(part_name, parts)}")
        for bar in self.bars:
            for arm_name in (bar.a, bar.b):
                if arm_name not in arms:
                    raise ValueError(f"bars: no arm {arm_name!r}; {nearest(arm_name, arms)}")
            if bar.over not in ("all", "hits", *parts):
                raise ValueError(f"bars: over {bar.over!r} is no part; {nearest(bar.over, ['all', 'hits', *parts])}")
            if bar.against is not None and bar.against not in parts:
                raise ValueError(f"bars: against {bar.against!r} is no part; {nearest(bar.against, parts)}")
        return self


def find_workload(path: Path) -> Path:
    """The file itself, or the shipped workload of this name. Raises WorkloadError for a name that there is not."""
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    known = shipped_workloads()
    if path.name not in known:
        raise WorkloadError(
            f"no file and no shipped workload is called {path.name!r}; {nearest(path.name, list(known))}"
        )
    return known[path.name]


def shipped_workloads() -> dict[str, Path]:
    """The workloads that come with lmc, by name."""
    return {file.stem: file for file in sorted(shipped("workloads").glob("*.yaml"))}


def load_workload(path: Path, quick: bool = False) -> Workload:
    """Read and check a workload file. Raises WorkloadError with the file and the key."""
    try:
        text = path.read_text()
    except OSError as error:
        raise WorkloadError(f"{path}: cannot read the workload: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WorkloadError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise WorkloadError(f"{path}: not a workload; it must be a mapping with name, parts and arms")
    try:
        workload = Workload.model_validate(document)
        if quick and workload.quick:
            workload = Workload.model_validate(overlay(document, workload.quick))
    except ValidationError as error:
        raise WorkloadError(f"{path}: {first_error(error)}") from error
    return workload


def overlay(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:  # Any: YAML trees
    """`document` with `changes` applied: mappings are merged, null removes a key, any other value replaces the old one."""
    merged = dict(document)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
            continue
        old = merged.get(key)
        merged[key] = overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def first_error(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    kinds = {
        "file",
        "package",
        "hub",
        "random",
        "repeat",
        "trace",
        "chats",
        "closed",
        "constant",
        "poisson",
        "gamma",
        "users",
    }
    place = ".".join(str(step) for step in problem["loc"] if step not in kinds)
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
