"""The trace argument and its reading options, the same for every command that reads a trace."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmc.cli.choices import FORMATS, listed

if TYPE_CHECKING:
    from lmc.sim.trace import Trace
    from lmc.sim.trace_file import TraceFile


@dataclass(frozen=True)
class TraceSource:
    """Where a trace is and how to read it. load() reads it."""

    trace: Annotated[
        Path,
        typer.Argument(help="Trace file (plain, .gz or .zst), or folder of LMCache logs."),
    ]
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format", help=f"Format of the trace: {listed(FORMATS)}. By default it is found from the content."
        ),
    ] = None
    block_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per trace block, if the trace does not state them.")
    ] = None
    sort: Annotated[
        bool, typer.Option("--sort", help="Sort the requests by time. Otherwise a trace out of order is an error.")
    ] = False
    rechain: Annotated[
        bool,
        typer.Option("--rechain", help="Treat each hash as the name of a single trace block, not of a whole prefix."),
    ] = False
    session_gap: Annotated[
        str, typer.Option(help="Time between session starts, for traces whose sessions have separate clocks.")
    ] = "60s"
    speed: Annotated[float, typer.Option(help="Divide the times between arrivals by this factor.")] = 1.0
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer for prompts given as text: a tokenizer.json, a model folder or a model name."),
    ] = None
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache", help="Keep the parsed trace in a file beside the trace, or parse it each time."
        ),
    ] = True

    def file(self) -> TraceFile:
        from lmc.model import resolve_tokenizer
        from lmc.sim.formats.base import ReadOptions
        from lmc.sim.trace_file import TraceFile
        from lmc.units import parse_seconds

        tokenizer = None if self.tokenizer is None else resolve_tokenizer(self.tokenizer)
        options = ReadOptions(self.block_tokens, self.sort, self.rechain, parse_seconds(self.session_gap), tokenizer)
        return TraceFile(self.trace, options, self.format_name, self.speed, self.cache)

    def load(self) -> Trace:
        return self.file().load()


Traces = Annotated[
    list[Path],
    typer.Argument(
        help="Trace files, and folders of traces. A folder of LMCache logs is one trace; of other folders all files are read."
    ),
]


def reads_traces(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is a list of TraceSource, the argument and the options that make them."""
    return _reading(
        command,
        inspect.Parameter("traces", inspect.Parameter.KEYWORD_ONLY, annotation=Traces),
        lambda paths, options: [TraceSource(path, **options) for path in paths],
    )


def reads_trace(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is a TraceSource, the argument and the options that make one."""
    trace = inspect.signature(TraceSource, eval_str=True).parameters["trace"]
    return _reading(command, trace, lambda path, options: TraceSource(path, **options))


def _reading(
    command: Callable[..., None], argument: inspect.Parameter, make: Callable[[Any, dict[str, Any]], object]
) -> Callable[..., None]:  # Any: what the argument and the options parse to
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    options = list(inspect.signature(TraceSource, eval_str=True).parameters.values())[1:]

    @functools.wraps(command)
    def outer(**given: Any) -> None:
        source = make(given.pop(argument.name), {option.name: given.pop(option.name) for option in options})
        command(source, **given)

    parameters = [argument, *own, *options]
    keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    outer.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    outer.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
    return outer
