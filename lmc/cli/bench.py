"""lmc bench: replay a workload against live engines and compare the arms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.default_command import DefaultCommandGroup

if TYPE_CHECKING:
    from lmc.bench.progress import Progress
    from lmc.bench.records import Results

app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Replay a workload against live engines and compare the arms. `lmc bench WORKLOAD` runs the command `run`.",
    no_args_is_help=True,
)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="bench")


@app.command()
def run(
    workload: Annotated[Path, typer.Argument(help="YAML file of the workload.")],
    out: Annotated[Path | None, typer.Option(help="Write the report to this folder, by default reports/NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="Use this model instead of the workload's.")] = None,
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
) -> None:
    """Replay WORKLOAD in every arm and write the report."""
    from lmc.bench.progress import JsonLines, Live, Quiet
    from lmc.bench.records import write_results
    from lmc.bench.render import write_report
    from lmc.bench.run import RunOptions, run_workload
    from lmc.bench.workload import load_workload

    plan = load_workload(workload, quick)
    folder = out or Path("reports") / plan.name
    name, model_folder = _model(model or plan.model)

    def options(progress: Progress) -> RunOptions:
        return RunOptions(workload.parent, name, model_folder, arm or [], repeat, scratch=scratch, progress=progress)

    if quiet or as_json:
        results, records = run_workload(plan, options(JsonLines() if as_json else Quiet()))
    else:
        with Live() as live:
            results, records = run_workload(plan, options(live))
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
    workload: Annotated[Path, typer.Argument(help="YAML file of the workload.")],
    model: Annotated[str | None, typer.Option(help="Use this model instead of the workload's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use the workload's small size.")] = False,
) -> None:
    """Check WORKLOAD without starting an engine. Checks its keys, data, prompts and cache settings, and prints the hits to expect."""
    from lmc.bench.check import check_workload
    from lmc.bench.workload import load_workload
    from lmc.report import print_table

    plan = load_workload(workload, quick)
    _, model_folder = _model(model or plan.model)
    for table in check_workload(plan, model_folder, workload.parent):
        print_table(table)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Report folder of the run to compare with.")],
    b: Annotated[Path, typer.Argument(help="Report folder of the run to judge.")],
    arm: Annotated[
        list[str] | None, typer.Option(help="Compare only this arm. Repeat the option for several arms.")
    ] = None,
    fail_on_worse: Annotated[
        bool, typer.Option("--fail-on-worse", help="Exit with 1 if any comparison is worse.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparisons as one JSON object.")] = False,
) -> None:
    """Judge whether run B is better than run A. Compares request by request. Exits with 1 if outputs differ."""
    from lmc.bench.compare import compare_runs
    from lmc.bench.tables import comparisons_table, outputs_table
    from lmc.report import print_table, to_json

    comparisons, outputs = compare_runs(a, b, arm or [])
    differ = [difference for output in outputs for difference in output.differences]
    if as_json:
        typer.echo(to_json({"comparisons": comparisons, "outputs": outputs}).decode())
    else:
        print_table(comparisons_table(comparisons, "B against A"))
        print_table(outputs_table(outputs))
    if differ or (fail_on_worse and any(comparison.verdict == "worse" for comparison in comparisons)):
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
    from lmc.bench.tables import bars_table, brief_table, hits_table, outputs_table
    from lmc.report import print_table

    for table in (brief_table(results), hits_table(results), bars_table(results), outputs_table(results.outputs)):
        if table.rows:
            print_table(table)
    for problem in results.problems:
        typer.echo(f"INVALID: {problem}", err=True)
    typer.echo(f"report: {folder / 'report.html'}")


def _model(name: str | None) -> tuple[str, Path]:
    from lmc.model import EMBEDDED, resolve_model

    return name or EMBEDDED, resolve_model(name or EMBEDDED)
