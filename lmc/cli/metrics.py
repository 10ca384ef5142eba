"""lmc metrics: print what Prometheus and Grafana need to watch lmc."""

from __future__ import annotations

import typer

app = typer.Typer(help="Print a dashboard for Grafana, and rules for Prometheus.", no_args_is_help=True)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="metrics")


@app.command()
def dashboard() -> None:
    """Print the dashboard for Grafana, as JSON to import."""
    _print("lmc.json")


@app.command()
def rules() -> None:
    """Print the alert and recording rules for Prometheus."""
    _print("rules.yaml")


def _print(name: str) -> None:
    from lmc.shipped import shipped

    typer.echo((shipped("dashboards") / name).read_text(), nl=False)
