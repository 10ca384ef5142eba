"""lmc doctor: say what is missing on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(parent: typer.Typer) -> None:
    parent.command("doctor")(doctor)


def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML file of cache settings.")] = None,
    disk_path: Annotated[Path | None, typer.Option(help="Folder of the disk tier, to measure its speed.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Address of the Redis tier, to see whether it answers.")] = None,
    port: Annotated[int, typer.Option(help="Port on which the engine's API shall listen.", min=1, max=65535)] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON list.")] = False,
) -> None:
    """Check this machine: engine, memory, ports, disk and Redis. Exits with 1 if something must be done."""
    import os

    from lmc.cache.settings import load_settings
    from lmc.report import to_json
    from lmc.serve.doctor import examine

    settings = load_settings(config, os.environ, {"disk.path": disk_path, "redis.url": redis_url})
    findings = list(examine(settings.config, port))
    if as_json:
        typer.echo(to_json(findings).decode(), nl=False)
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            mark = "ok  " if finding.ok else "TO DO"
            typer.echo(
                f"{mark:<5}  {finding.what:<{width}}  {finding.seen}"
                + (f"; {finding.remedy}" if finding.remedy else "")
            )
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
