"""lmc node: run one cache for all engines of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(parent: typer.Typer) -> None:
    parent.command()(node)


def node(
    config: Annotated[Path | None, typer.Option(help="YAML file with settings, the same as for lmc serve.")] = None,
    socket: Annotated[Path, typer.Option(help="Unix socket that engines attach to.")] = Path("/run/lmc.sock"),
) -> None:
    """Run one cache for all engines of this machine.

    Start engines with --node SOCKET. The node owns the host memory and the tiers below it; engines copy straight to and from its memory.
    """
    import logging
    import os

    from lmc.cache.node.start import serve_node
    from lmc.cache.observe.logs import use_format
    from lmc.cache.settings import load_settings

    settings = load_settings(config, os.environ).config
    logging.basicConfig(
        level=os.environ.get("LMC_LOG_LEVEL", "INFO").upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    use_format(settings.log_format)
    serve_node(settings, socket, typer.echo)
