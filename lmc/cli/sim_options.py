"""What the commands of lmc sim share: options, and how results are printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.choices import WINDOWS, metavar

if TYPE_CHECKING:
    from lmc.report import Table
    from lmc.sim.capacity import CapacityOptions
    from lmc.sim.cost import CostModel

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Csv = Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")]
Window = Annotated[
    str,
    typer.Option(
        metavar=metavar(WINDOWS),
        help="Requests that are measured. With last-half, the first half only warms the cache.",
    ),
]
TokenBytes = Annotated[str, typer.Option(help="KV bytes per token, such as 192KiB, if the trace does not state them.")]
CapacityBlocks = Annotated[
    str | None,
    typer.Option(
        help="Capacities in trace blocks, separated by commas: a number, a share of the unique blocks such as 1%, or inf."
    ),
]
CapacityTokens = Annotated[str | None, typer.Option(help="Capacities in tokens, separated by commas, such as 3M,10M.")]
CapacityBytes = Annotated[
    str | None, typer.Option(help="Capacities in bytes, separated by commas, such as 64GiB,1TiB.")
]
ChunkTokens = Annotated[
    str | None,
    typer.Option(
        help="Tokens per chunk, separated by commas, each a multiple of the trace block. Then only full chunks are cached."
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Stored bytes / raw bytes of a chunk on a compressed disk, such as 0.71; lmc probe codec measures it."
    ),
]
CodecSpeed = Annotated[
    str | None, typer.Option(help="Raw bytes per second that one thread encodes or decodes, such as 4GB/s.")
]
CostFile = Annotated[Path | None, typer.Option(help="YAML cost model. It adds times and costs to the result.")]


def output(
    table: Table,
    as_json: Mapping[str, Any],  # Any: JSON
    rows: Table,
    notes: tuple[str, ...],
    json: bool,
    csv: Path | None,
) -> None:
    """Print the table and its notes, or one JSON object. Write the rows as CSV if csv names a file."""
    from lmc import report

    if csv is not None:
        report.write_file(csv, report.table_csv(rows))
    if json:
        typer.echo(report.to_json(as_json).decode(), nl=False)
        return
    report.print_table(table)
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def read_cost(path: Path | None) -> CostModel | None:
    from lmc.sim.cost_file import read_cost_model

    return None if path is None else read_cost_model(path)


def capacity_options(blocks: str | None, tokens: str | None, sizes: str | None, token_bytes: str) -> CapacityOptions:
    """The capacities that were given, or some shares of the unique trace blocks."""
    from lmc.sim.capacity import DEFAULT, CapacityOptions
    from lmc.units import parse_size

    known = parse_size(token_bytes)
    given = CapacityOptions(split_list(blocks), split_list(tokens), split_list(sizes), known)
    return given if given.text else CapacityOptions(DEFAULT.blocks, token_bytes=known)


def split_list(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def parse_counts(text: str | None) -> list[int]:
    from lmc.units import parse_count

    return [parse_count(part) for part in split_list(text)]
