"""lmc serve: run an engine with the cache on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(parent: typer.Typer) -> None:
    parent.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(serve)


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, hub name, or smollm2-135m-instruct (embedded).")],
    engine: Annotated[str, typer.Option(help="Engine to run: vllm or sglang.")] = "vllm",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the engine's API.", min=1, max=65535)] = 8000,
    config: Annotated[Path | None, typer.Option(help="YAML file of cache settings.")] = None,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Run the engine with or without lmc.")] = True,
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens per chunk.")] = None,
    policy: Annotated[str | None, typer.Option(help="Eviction policy.")] = None,
    host_capacity: Annotated[
        str | None, typer.Option(help="Host memory for chunks: 8GiB, or 25% of what is free.")
    ] = None,
    disk_path: Annotated[Path | None, typer.Option(help="Folder of the disk tier.")] = None,
    disk_capacity: Annotated[str | None, typer.Option(help="Bytes of the disk tier.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Address of a Redis tier.")] = None,
    write: Annotated[str | None, typer.Option(help="through, back or around.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the lookup trace here, for lmc sim.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of the metrics endpoint; default: a free one.")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Do not start when a tier cannot be opened.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings in force and stop.")] = False,
    ready_timeout: Annotated[float, typer.Option(help="Seconds until the engine must answer.")] = 900.0,
) -> None:
    """Run MODEL with the cache on. Arguments after -- go to the engine. Any setting can also come from --config or LMC_* variables."""
    import os

    from lmc.cache.settings import load_settings
    from lmc.cli.config import print_settings
    from lmc.serve.start import ServeOptions
    from lmc.serve.start import serve as run

    settings = load_settings(
        config,
        os.environ,
        {
            "chunk_tokens": chunk_tokens,
            "policy": policy,
            "host.capacity": host_capacity,
            "disk.path": disk_path,
            "disk.capacity": disk_capacity,
            "redis.url": redis_url,
            "write": write,
            "record": record,
            "metrics.port": metrics_port,
            "strict": strict,
        },
    )
    if print_config:
        print_settings(settings)
        return
    options = ServeOptions(model, engine, host, port, cache, ready_timeout, tuple(context.args))
    raise typer.Exit(run(options, settings.config, typer.echo))
