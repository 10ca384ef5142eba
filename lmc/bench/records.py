"""The results of a run as data: results.json and requests.parquet are written and read here, but neither judged nor rendered."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson

from lmc.bench.attribution import Costs, TtftParts, ttft_parts
from lmc.bench.client import Outcome
from lmc.bench.selfcheck import SelfCheck
from lmc.errors import RunError
from lmc.report import to_json, write_file

SCHEMA_VERSION = 1
LISTS = ("itl_ms", "tokens", "gaps")  # per token: in the Parquet file only
COSTS = [item.name for item in fields(Costs)]


@dataclass(frozen=True)
class RequestRecord:
    """One request in one arm. Times in ms count from the intended send time, service_ttft_ms from the real one."""

    arm: str
    repeat: int
    request_id: str
    part: str
    session: str
    turn: int
    status: str
    cause: str
    intended_s: float
    sent_s: float
    ttft_ms: float | None
    service_ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: list[float]
    e2e_ms: float | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    expected_hit_tokens: int | None
    queue_ms: float | None
    prefill_ms: float | None
    load_ms: float | None
    load_bytes: float | None
    stage_ms: float | None
    tokens: list[int]
    gaps: list[float]
    asked_ms: float | None = None
    lookup_ms: float | None = None
    admit_ms: float | None = None
    cached_by_tier: Mapping[str, int] | None = None
    miss: str | None = None
    opening: bool = False  # the first request of its connection in a closed loop

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def parts(self) -> TtftParts:
        return ttft_parts(self.service_ttft_ms, Costs(**{name: getattr(self, name) for name in COSTS}))


def to_record(
    arm: str, repeat: int, outcome: Outcome, expected_hit_tokens: int | None, costs: Costs | None = None
) -> RequestRecord:
    request, first, last = outcome.request, outcome.first_s, outcome.last_s
    since = outcome.intended_s
    times = outcome.token_times_s
    # Tokens that arrived in one piece have no time between them: unknown, not 0.
    decoded = max(len(times), outcome.output_tokens) - 1  # a server may send several tokens in one event
    tpot = (last - first) / decoded * 1e3 if first is not None and last is not None and last > first else None
    return RequestRecord(
        arm=arm,
        repeat=repeat,
        request_id=request.id,
        part=request.part,
        session=request.session_id,
        turn=request.turn,
        status=outcome.status,
        cause=outcome.cause,
        intended_s=since,
        sent_s=outcome.sent_s,
        ttft_ms=None if first is None else (first - since) * 1e3,
        service_ttft_ms=None if first is None else (first - outcome.sent_s) * 1e3,
        tpot_ms=tpot,
        itl_ms=[(b - a) * 1e3 for a, b in itertools.pairwise(times)],
        e2e_ms=None if last is None else (last - since) * 1e3,
        prompt_tokens=outcome.prompt_tokens or len(request.prompt),
        output_tokens=outcome.output_tokens,
        cached_tokens=outcome.cached_tokens,
        expected_hit_tokens=expected_hit_tokens,
        **asdict(costs or Costs()),
        tokens=outcome.tokens,
        gaps=outcome.gaps,
        opening=outcome.opening,
    )


@dataclass(frozen=True)
class Phase:
    """One stage of an arm, with its duration and a line about it."""

    name: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class HitPoint:
    """Tokens that were looked up and that hit so far, by tier, at one time of the measured load."""

    at_s: float
    lookup_tokens: float
    hit_tokens: dict[str, float]


@dataclass(frozen=True)
class PartFigures:
    """Figures of one part. Its throughput counts from its first send to its last token."""

    part: str
    requests: int
    ok: int
    prompt_tokens: int
    hit_tokens: int | None
    output_tokens: int
    wall_s: float
    ttft_p50_ms: float | None

    @property
    def tokens_per_s(self) -> float | None:
        return (self.prompt_tokens + self.output_tokens) / self.wall_s if self.wall_s > 0 else None


@dataclass(frozen=True)
class ArmResult:
    name: str
    valid: bool
    problems: list[str]
    about: str
    command: str
    requests: int
    ok: int
    failures: dict[str, int]
    prompt_tokens: int
    hit_tokens: int | None
    hit_tokens_by_tier: dict[str, int]
    expected_hit_tokens: int | None
    output_tokens: int
    wall_s: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    itl_ms: dict[str, float]
    e2e_ms: dict[str, float]
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_share: float | None
    parts: list[PartFigures]
    phases: list[Phase]
    timeline: list[HitPoint]
    counters: dict[str, float]
    self_check: SelfCheck | None
    settings: dict[str, Any] = field(default_factory=dict)  # Any: the arm as the workload states it
    expected_hit_tokens_by_tier: dict[str, int] | None = None
    notes: list[str] = field(default_factory=list)  # measurements that the server does not allow
    start_requests: int = 0  # first requests of many connections, which ttft_ms leaves out
    start_ttft_p50_ms: float | None = None


@dataclass(frozen=True)
class OutputCheck:
    """Greedy outputs of an arm against the reference arm."""

    arm: str
    reference: str
    compared_requests: int
    compared_tokens: int
    ties: int
    differences: list[str]


@dataclass(frozen=True)
class Comparison:
    """`ratio` is a divided by b, with a bootstrap interval; verdict is about a: better, worse or undecided."""

    a: str
    b: str
    metric: str
    ratio: float
    low: float
    high: float
    verdict: str
    samples: int
    over: str = "all"  # "all", "hits" (requests with a hit on a), or a part


@dataclass(frozen=True)
class Prediction:
    """The simulator's prediction of an arm: hit tokens, and by its cost model the time to first token, which counts from the real send."""

    arm: str
    expected_hit_tokens: int | None
    measured_hit_tokens: int | None
    predicted_ttft_p50_ms: float | None
    measured_ttft_p50_ms: float | None
    load_bytes_per_s: float | None
    break_even_tokens: int | None


@dataclass(frozen=True)
class BarResult:
    """`met` is None if the interval from low to high lies on both sides of the bound, or if there are too few requests for one."""

    text: str
    ratio: float | None
    met: bool | None
    samples: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Results:
    """Everything about one run of a workload."""

    schema_version: int
    name: str
    valid: bool
    problems: list[str]
    started: str
    seconds: float
    interleaved: bool
    command: str
    lmc: dict[str, str]
    hardware: dict[str, str]
    model: str
    workload: dict[str, Any]  # Any: the workload as it was run
    arms: list[ArmResult]
    outputs: list[OutputCheck]
    comparisons: list[Comparison]
    bars: list[BarResult]
    predictions: list[Prediction]
    skipped_too_long: dict[str, int]


def write_results(folder: Path, results: Results, records: Sequence[RequestRecord]) -> None:
    """Write results.json, and the requests as Parquet and CSV."""
    import pandas as pd

    write_file(folder / "results.json", to_json(asdict(results)))
    columns = [item.name for kind in (RequestRecord, TtftParts) for item in fields(kind)]
    frame = pd.DataFrame([_row(record) for record in records], columns=columns)
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(folder / "requests.parquet", index=False)
    write_file(folder / "requests.csv", frame.drop(columns=list(LISTS)).to_csv(index=False))


def _row(record: RequestRecord) -> dict[str, object]:
    """The record and its TTFT parts. Tokens by tier are JSON text, because the rows have different tiers."""
    tiers = None if record.cached_by_tier is None else orjson.dumps(record.cached_by_tier).decode()
    return {**asdict(record), **asdict(record.parts), "cached_by_tier": tiers}


def read_results(path: Path) -> Results:
    """Read a results.json; path may be its folder. Raises RunError."""
    file = path / "results.json" if path.is_dir() else path
    try:
        data = orjson.loads(file.read_bytes())
    except OSError as error:
        raise RunError(f"{file}: cannot read: {error.strerror}; give a folder that lmc bench wrote") from error
    except orjson.JSONDecodeError as error:
        raise RunError(f"{file}: not JSON: {error}; run the workload again") from error
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{file}: not a result of this version of lmc bench (schema_version {SCHEMA_VERSION}); run the workload again"
        )
    try:
        data["arms"] = [_read_arm(arm) for arm in data["arms"]]
        data["outputs"] = [OutputCheck(**item) for item in data["outputs"]]
        data["comparisons"] = [Comparison(**item) for item in data["comparisons"]]
        data["predictions"] = [Prediction(**item) for item in data["predictions"]]
        data["bars"] = [BarResult(**item) for item in data["bars"]]
        return Results(**data)
    except (KeyError, TypeError) as error:
        raise RunError(f"{file}: a field is missing or unknown: {error}; run the workload again") from error


def _read_arm(data: dict[str, Any]) -> ArmResult:  # Any: parsed JSON
    data["parts"] = [PartFigures(**item) for item in data["parts"]]
    data["phases"] = [Phase(**item) for item in data["phases"]]
    data["timeline"] = [HitPoint(**item) for item in data["timeline"]]
    data["self_check"] = SelfCheck(**data["self_check"]) if data["self_check"] else None
    return ArmResult(**data)


def read_records(folder: Path) -> list[RequestRecord]:
    """Read the requests of a run. Raises RunError."""
    import pandas as pd

    path = folder / "requests.parquet"
    if not path.is_file():
        raise RunError(f"{path}: no such file; copy it beside results.json")
    frame = pd.read_parquet(path).astype(object)
    frame = frame.where(frame.notna(), None)
    return [RequestRecord(**_plain(row)) for row in frame.to_dict(orient="records")]


def _plain(row: dict[Any, Any]) -> dict[str, Any]:  # Any: pandas does not type its rows
    known = {item.name for item in fields(RequestRecord)}
    plain = {str(key): value.tolist() if key in LISTS else value for key, value in row.items() if key in known}
    if plain.get("cached_by_tier") is not None:
        plain["cached_by_tier"] = orjson.loads(plain["cached_by_tier"])
    return plain
