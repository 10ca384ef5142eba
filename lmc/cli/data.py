"""lmc data: the data files of the shipped workloads."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="List and fetch the data files of the shipped workloads.", no_args_is_help=True)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="data")


@app.command("list")
def list_files(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False) -> None:
    """List the data files, with their licences and origins."""
    from lmc.bench.data import FILES, data_folder
    from lmc.report import Column, Table, print_table, to_json

    if as_json:
        typer.echo(to_json(list(FILES.values())).decode(), nl=False)
        return
    columns = [Column(name) for name in ("name", "workloads", "licence", "origin", "is there")]
    rows = [
        [data.name, data.workloads, data.licence, data.origin, "yes" if (data_folder() / data.file).is_file() else "no"]
        for data in FILES.values()
    ]
    print_table(Table(f"Data files in {data_folder()}", columns, rows))


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="Name of the data file, as `lmc data list` shows it.")]) -> None:
    """Download a data file and check it. It is put where the workloads look for it."""
    from lmc.bench.data import FILES
    from lmc.bench.data import fetch as get

    place = get(name)
    typer.echo(f"{place} ({FILES[name].origin}, {FILES[name].licence})")
