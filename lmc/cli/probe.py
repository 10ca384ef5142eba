"""lmc probe: what this machine's hardware gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure what this machine gives, and how much of it lmc uses.", no_args_is_help=True)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="probe")


@app.callback()
def _group() -> None:
    """Without this, typer would make the only command the group itself."""


@app.command()
def transfer(
    device: Annotated[str, typer.Option(help="cpu, cuda:0, or auto: the first CUDA device, else the CPU.")] = "auto",
    sizes: Annotated[str | None, typer.Option(help="Piece sizes, comma separated: 8KiB,64KiB,1MiB.")] = None,
    total: Annotated[str, typer.Option(help="Bytes of each copy; keep it above the processor's caches.")] = "64MiB",
    repetitions: Annotated[int, typer.Option(min=1, help="Turns of backend and limit; the median counts.")] = 7,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write rate over piece size to this picture.")] = None,
) -> None:
    """Rates of the transfer backends over piece sizes, both ways, beside plain memcpy or the bare copy engine."""
    from lmc import report
    from lmc.probe.show import transfer_figure, transfer_table
    from lmc.probe.transfer import PIECE_SIZES, probe_device
    from lmc.units import parse_size

    pieces = PIECE_SIZES if sizes is None else tuple(parse_size(size) for size in sizes.split(","))
    probe = probe_device(device, pieces, total_bytes=parse_size(total), repetitions=repetitions)
    table = transfer_table(probe)
    if csv is not None:
        report.write_file(csv, report.table_csv(table))
    if png is not None:
        report.write_file(png, transfer_figure(probe).png)
    if json:
        typer.echo(report.to_json(probe).decode(), nl=False)
    else:
        report.print_table(table)
