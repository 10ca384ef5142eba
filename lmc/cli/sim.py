"""lmc sim: replay a trace without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.default_command import DefaultCommandGroup

if TYPE_CHECKING:
    from lmc.sim.trace import Trace

app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Replay a trace through the cache's own logic: hits, capacities, policies. `lmc sim TRACE` runs the verb `run`.",
    no_args_is_help=True,
)

TracePath = Annotated[Path, typer.Argument(help="Trace file, plain, .gz or .zst; its format is found by content.")]
Format = Annotated[str | None, typer.Option("--format", help="Name the format instead of finding it.")]
BlockTokens = Annotated[int | None, typer.Option(min=1, help="Tokens per block, where the trace does not say it.")]
Sort = Annotated[bool, typer.Option("--sort", help="Sort requests by time instead of refusing disorder.")]
Rechain = Annotated[bool, typer.Option("--rechain", help="Hashes name single blocks, not whole prefixes.")]
SessionGap = Annotated[str, typer.Option(help="Sessions without a common clock start so far apart.")]
Tokenizer = Annotated[Path | None, typer.Option(help="tokenizer.json or model folder, for prompts as text.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="sim")


@app.command()
def run(
    trace: TracePath,
    policy: Annotated[str, typer.Option(help="Eviction policies, comma separated; belady is the bound.")] = "lru",
    capacity_blocks: Annotated[
        str | None, typer.Option(help="Capacities in blocks, comma separated: 1000, 1% of the unique blocks, inf.")
    ] = None,
    capacity_tokens: Annotated[str | None, typer.Option(help="Capacities in tokens: 3M,10M.")] = None,
    capacity_bytes: Annotated[str | None, typer.Option(help="Capacities in bytes: 64GiB,1TiB.")] = None,
    token_bytes: Annotated[int, typer.Option(min=0, help="KV bytes of a token, where the trace does not say it.")] = 0,
    chunk_tokens: Annotated[
        str | None, typer.Option(help="Chunk sizes, multiples of the trace's block; only full chunks are cached.")
    ] = None,
    window: Annotated[str, typer.Option(help="all, or last-half: the first half only warms the cache up.")] = "all",
    admit_touches: Annotated[
        int, typer.Option(min=1, help="Store a block when it is requested for the n-th time.")
    ] = 1,
    low_watermark: Annotated[float, typer.Option(help="A full cache evicts down to this share of its capacity.")] = 1.0,
    write_delay: Annotated[str, typer.Option(help="A stored block is readable only so much later.")] = "0s",
    ttl: Annotated[str | None, typer.Option(help="Drop a block that was not touched for so long.")] = None,
    fixed_ttl: Annotated[
        bool, typer.Option("--fixed-ttl", help="The TTL counts from the store; touches don't renew.")
    ] = False,
    json: Json = False,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the miss-ratio curve to this picture.")] = None,
    format_name: Format = None,
    block_tokens: BlockTokens = None,
    sort: Sort = False,
    rechain: Rechain = False,
    session_gap: SessionGap = "60s",
    tokenizer: Tokenizer = None,
) -> None:
    """Hits of policies at capacities and chunk sizes."""
    from lmc import report
    from lmc.sim import capacity, show
    from lmc.sim.policy_replay import ReplayOptions
    from lmc.sim.study import run_study
    from lmc.units import parse_seconds

    given = capacity.CapacityOptions(
        split_list(capacity_blocks), split_list(capacity_tokens), split_list(capacity_bytes), token_bytes
    )
    if not given.blocks + given.tokens + given.sizes:
        given = capacity.DEFAULT
    study = run_study(
        load(trace, format_name, block_tokens, sort, rechain, session_gap, tokenizer),
        split_list(policy),
        given,
        show.parse_window(window),
        parse_chunk_sizes(chunk_tokens),
        ReplayOptions(
            admit_touches,
            low_watermark,
            parse_seconds(write_delay),
            float("inf") if ttl is None else parse_seconds(ttl),
            not fixed_ttl,
        ),
    )
    if csv is not None:
        report.write_file(csv, show.study_csv(study))
    if png is not None:
        report.write_file(png, show.miss_ratio_figure(study).png)
    if json:
        typer.echo(report.to_json(show.study_json(study)).decode(), nl=False)
        return
    report.print_table(show.study_table(study))
    print_notes(study.notes)


@app.command()
def describe(
    trace: TracePath,
    json: Json = False,
    format_name: Format = None,
    block_tokens: BlockTokens = None,
    sort: Sort = False,
    rechain: Rechain = False,
    session_gap: SessionGap = "60s",
    tokenizer: Tokenizer = None,
) -> None:
    """Counts, lengths, arrivals, reuse, sharing, and the hits of an unlimited cache."""
    from lmc import report
    from lmc.sim.describe import describe as describe_trace
    from lmc.sim.describe import facts_json, facts_table

    loaded = load(trace, format_name, block_tokens, sort, rechain, session_gap, tokenizer)
    sections = describe_trace(loaded)
    if json:
        head = {"source": loaded.source, "format": loaded.format, "notes": loaded.notes}
        typer.echo(report.to_json({**head, **facts_json(sections)}).decode(), nl=False)
        return
    report.print_table(facts_table(f"{loaded.source} ({loaded.format})", sections))
    print_notes(loaded.notes)


def load(
    path: Path,
    format_name: str | None,
    block_tokens: int | None,
    sort: bool,
    rechain: bool,
    session_gap: str,
    tokenizer: Path | None,
) -> Trace:
    from lmc.sim.cache_file import load_trace
    from lmc.sim.formats.base import ReadOptions
    from lmc.units import parse_seconds

    options = ReadOptions(block_tokens, sort, rechain, parse_seconds(session_gap), tokenizer)
    return load_trace(path, options, format_name)


def split_list(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def parse_chunk_sizes(text: str | None) -> list[int]:
    from lmc.units import parse_count

    return [parse_count(part) for part in split_list(text)]


def print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)
