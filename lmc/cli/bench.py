"""lmc bench: replay a workload against live engines and compare the arms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.choices import APIS, metavar
from lmc.cli.default_command import DefaultCommandGroup

if TYPE_CHECKING:
    from lmc.bench.progress import Progress
    from lmc.bench.rates import RateResults
    from lmc.bench.records import RequestRecord, Results
    from lmc.bench.workload import Workload

app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Replay a workload against live engines and compare the arms. `lmc bench WORKLOAD` runs the command `run`.",
    no_args_is_help=True,
)


URL_ONLY = (
    "api", "header", "ca", "reset", "requests", "prompt_tokens", "output_tokens", "concurrency", "rate", "seed", "prompts", "trace",
    "speed", "metrics",
)  # fmt: skip


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="bench")


def _list_shipped(wanted: bool) -> None:
    if not wanted:
        return
    from lmc.bench.tables import shipped_table
    from lmc.report import print_table

    print_table(shipped_table())
    raise typer.Exit


@app.command()
def run(
    context: typer.Context,
    workload: Annotated[
        Path | None,
        typer.Argument(help="YAML file of the workload, or the name of a shipped one. Not needed with --url."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report to this folder, by default reports/NAME.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Use this model instead of the workload's. With --url, the name that the server serves."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer of the model: a folder, a tokenizer.json or a hub name. By default the model's own."
        ),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Run only this arm. Repeat the option for several arms.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use the workload's small size.")] = False,
    repeat: Annotated[
        int, typer.Option(min=1, help="Run every arm this number of times, each time on a new engine.")
    ] = 1,
    scratch: Annotated[Path | None, typer.Option(help="Keep the logs and disk tiers in this folder.")] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print nothing, and report the result through the exit code only.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on stdout, and progress as JSON lines on stderr.")
    ] = False,
    list_shipped: Annotated[
        bool, typer.Option("--list", callback=_list_shipped, is_eager=True, help="List the shipped workloads and exit.")
    ] = False,
    url: Annotated[
        list[str] | None,
        typer.Option(help="Measure this running server, without a workload. [NAME=]URL; repeat it to compare servers."),
    ] = None,
    api: Annotated[str, typer.Option(metavar=metavar(APIS), help="With --url: the API that is asked.")] = "completions",
    header: Annotated[
        list[str] | None,
        typer.Option(
            help="With --url: a header 'Name: value' of each request. A key is better set as LMC_BENCH_API_KEY."
        ),
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="With --url: file of certificates to trust.")] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="With --url: ask the server to empty its caches before the load.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="With --url: send the requests of this file: ShareGPT, OpenAI chats or prompts, as JSON objects."
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="With --url: send prompts like those of this trace (lmc's record, Mooncake, ...), at its times."
        ),
    ] = None,
    speed: Annotated[float, typer.Option(help="With --trace: divide the times between arrivals by this factor.")] = 1.0,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="With --url: lmc's own metrics page, which lmc serve prints. It tells the hits of each tier."
        ),
    ] = None,
    requests: Annotated[
        int,
        typer.Option(
            min=1, help="With --url: number of new prompts, of which half come again; or of requests of a file."
        ),
    ] = 24,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="With --url: tokens of a prompt.")] = 1000,
    output_tokens: Annotated[int, typer.Option(min=1, help="With --url: tokens of an answer.")] = 32,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --url: requests at a time, by default one; with --trace, by default as many as its times make.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="With --url: requests per second, which arrive at random, in place of --concurrency."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(help="Measure at each of these rates, separated by commas, such as 1,2,4,8 requests/s."),
    ] = None,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Find the highest rate at which each arm holds the SLOs, by bisection.")
    ] = False,
    slo: Annotated[
        str | None, typer.Option(help="Bounds that requests must keep, such as ttft_ms=500,tpot_ms=50.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --url: seed of the prompts, by default another one each time.")
    ] = None,
) -> None:
    """Replay WORKLOAD in every arm, or measure a running server.

    A running server (--url) needs no WORKLOAD. Both write a report.
    """
    from lmc.bench.adhoc import Asked, server_workload
    from lmc.bench.progress import JsonLines, Live, Quiet
    from lmc.bench.rates import find, parse_rates, parse_slo, sweep, write_rates
    from lmc.bench.records import write_results
    from lmc.bench.render import write_report
    from lmc.bench.run import RunOptions, run_workload
    from lmc.bench.workload import find_workload, load_workload
    from lmc.errors import ConfigError

    if rates is not None and find_rate:
        raise ConfigError("give either --rates or --find-rate")
    if (workload is None) == (not url):
        raise ConfigError(
            "give either a WORKLOAD file or --url, as in: lmc bench --url http://127.0.0.1:8000 --model NAME"
        )
    if workload is not None:
        for option in URL_ONLY:
            source = context.get_parameter_source(option)
            if source is not None and source.name == "COMMANDLINE":
                raise ConfigError(f"--{option.replace('_', '-')} goes with --url; a workload file says it itself")
        file = find_workload(workload)
        base, plan = file.parent, load_workload(file, quick)
    else:
        if model is None:
            raise ConfigError("--url needs --model, the name under which the server serves its model")
        authority = None if ca is None else str(ca)
        base = Path()
        plan = server_workload(
            Asked(
                url or [], model, api, header or [], authority, reset, requests, prompt_tokens, output_tokens,
                concurrency, rate, seed,
                None if prompts is None else str(prompts), None if trace is None else str(trace), speed,
                metrics or [],
            )
        )  # fmt: skip
    if slo is not None:
        plan = plan.model_copy(update={"slo": parse_slo(slo)})
    folder = out or Path("reports") / plan.name
    starts_engines = any(plan.arms[name].url is None for name in arm or plan.arms if name in plan.arms)
    name, model_folder = _model(model or plan.model, tokenizer, starts_engines)

    def measure(load: Workload, arms: Sequence[str]) -> tuple[Results, list[RequestRecord]]:
        def with_progress(progress: Progress) -> tuple[Results, list[RequestRecord]]:
            options = RunOptions(base, name, model_folder, arms, repeat, scratch=scratch, progress=progress)
            return run_workload(load, options)

        if quiet or as_json:
            return with_progress(JsonLines() if as_json else Quiet())
        with Live() as live:
            return with_progress(live)

    if rates is not None or find_rate:
        chosen = arm or list(plan.arms)
        if rates is not None:
            found = sweep(plan, chosen, parse_rates(rates), measure, folder)
        else:
            found = find(plan, chosen, rate or 1.0, measure, folder)
        write_rates(folder, found)
        _show_rates(found, folder, as_json, quiet)
        if found.problems:
            raise typer.Exit(1)
        return
    results, records = measure(plan, arm or [])
    write_results(folder, results, records)
    write_report(folder, results, records)
    if as_json:
        typer.echo((folder / "results.json").read_text())
    elif not quiet:
        _show(results, folder)
    if not results.valid:
        raise typer.Exit(1)


@app.command()
def check(
    workload: Annotated[Path, typer.Argument(help="YAML file of the workload, or the name of a shipped one.")],
    model: Annotated[str | None, typer.Option(help="Use this model instead of the workload's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use the workload's small size.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check WORKLOAD without starting an engine. Checks its keys, data, prompts and cache settings, and prints the hits to expect."""
    from lmc.bench.check import check_workload
    from lmc.bench.workload import find_workload, load_workload
    from lmc.report import print_table, to_json

    file = find_workload(workload)
    plan = load_workload(file, quick)
    _, model_folder = _model(model or plan.model, None, starts_engines=False)
    tables = list(check_workload(plan, model_folder, file.parent))
    if as_json:
        rows = {
            table.title: [{c.heading: cell for c, cell in zip(table.columns, row, strict=True)} for row in table.rows]
            for table in tables
        }
        typer.echo(to_json(rows).decode(), nl=False)
        return
    for table in tables:
        print_table(table)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Report folder of the run to compare with.")],
    runs: Annotated[list[Path], typer.Argument(help="Report folder of the run to judge, or of several, oldest first.")],
    arm: Annotated[
        list[str] | None, typer.Option(help="Compare only this arm. Repeat the option for several arms.")
    ] = None,
    fail_on_worse: Annotated[
        bool, typer.Option("--fail-on-worse", help="Exit with 1 if any comparison of the last run is worse.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the ratios of all runs into this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparisons as one JSON object.")] = False,
) -> None:
    """Judge whether the last run is better than run A. Compares request by request. Exits with 1 if outputs differ."""
    from lmc.bench.compare import compare_runs
    from lmc.bench.plots import trend
    from lmc.bench.tables import comparisons_table, outputs_table
    from lmc.report import print_table, to_json, write_file

    series = {run: compare_runs(a, run, arm or []) for run in runs}
    comparisons = [comparison for found, _ in series.values() for comparison in found]
    outputs = [output for _, found in series.values() for output in found]
    if png is not None:
        write_file(png, trend([found for found, _ in series.values()]).png)
    if as_json:
        typer.echo(to_json({"comparisons": comparisons, "outputs": outputs}).decode())
    else:
        print_table(comparisons_table(comparisons, "Each run against A"))
        print_table(outputs_table(outputs))
    last, _ = series[runs[-1]]
    differ = any(output.differences for output in outputs)
    if differ or (fail_on_worse and any(comparison.verdict == "worse" for comparison in last)):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Report folder: it holds results.json and requests.parquet.")],
) -> None:
    """Render the report of an earlier run again."""
    from lmc.bench.records import read_records, read_results
    from lmc.bench.render import write_report

    write_report(folder, read_results(folder), read_records(folder))
    typer.echo(f"report: {folder / 'report.html'}")


def _show(results: Results, folder: Path) -> None:
    from lmc.bench.render import gain
    from lmc.bench.tables import bars_table, brief_table, hits_table, outputs_table, parts_table
    from lmc.report import print_table

    tables = [brief_table(results), hits_table(results), bars_table(results), outputs_table(results.outputs)]
    if len(results.arms) == 1:
        tables.append(parts_table(results))
    for table in tables:
        if table.rows:
            print_table(table)
    for arm in results.arms:
        if said := gain(results, arm):
            typer.echo(said)
        for note in arm.notes:
            typer.echo(f"{arm.name}: {note}", err=True)
    for problem in results.problems:
        typer.echo(f"INVALID: {problem}", err=True)
    typer.echo(f"report: {folder / 'report.html'}")


def _show_rates(found: RateResults, folder: Path, as_json: bool, quiet: bool) -> None:
    from lmc.bench.rates import rates_table, summary
    from lmc.report import print_table

    if as_json:
        typer.echo((folder / "rates.json").read_text())
    elif not quiet:
        print_table(rates_table(found))
        typer.echo(summary(found))
        for problem in found.problems:
            typer.echo(f"INVALID: {problem}", err=True)
        typer.echo(f"report: {folder / 'rates.html'}")


def _model(name: str | None, tokenizer: str | None, starts_engines: bool) -> tuple[str, Path]:
    """The name of the model, and a folder with its tokenizer; without the weights if no engine is started."""
    from lmc.model import EMBEDDED, resolve_model, resolve_tokenizer_folder

    name = name or EMBEDDED
    if starts_engines and tokenizer is None:
        return name, resolve_model(name)
    return name, resolve_tokenizer_folder(tokenizer or name)
