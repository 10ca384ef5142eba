"""`lmc sim` as users and programs call it, in this process; and what a fresh process imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmc.cli import app
from lmc.errors import LmcError

LINES = [
    {"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 3]},
    {"timestamp": 1000, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 100, "output_length": 5, "hash_ids": [4]},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["sim", *(str(argument) for argument in arguments)])
    if isinstance(result.exception, LmcError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_rows_name_hits_and_denominators(trace: Path) -> None:
    result = json.loads(run(trace, "--policy", "lru", "--capacity-blocks", "2,50%,inf", "--window", "all", "--json"))
    assert [(row["capacity_blocks"], row["hit_blocks"], row["hit_tokens"]) for row in result["rows"]] == [
        (2, 4, 2048),
        (2, 4, 2048),
        ("inf", 5, 2524),
    ]
    for row in result["rows"]:
        assert (row["policy"], row["total_blocks"], row["total_tokens"]) == ("lru", 10, 4200)
    assert result["trace"]["unique_blocks"] == 5


def test_json_of_the_last_half_measures_the_second_half_of_the_requests(trace: Path) -> None:
    (row,) = json.loads(run(trace, "--capacity-blocks", "inf", "--window", "last-half", "--json"))["rows"]
    assert (row["hit_blocks"], row["total_blocks"], row["hit_tokens"], row["total_tokens"]) == (3, 4, 1500, 1600)


def test_chunk_sizes_drop_partial_tails(trace: Path) -> None:
    rows = json.loads(run(trace, "--chunk-tokens", "512,1024", "--capacity-blocks", "inf", "--json"))["rows"]
    assert [(row["chunk_tokens"], row["hit_blocks"], row["total_blocks"], row["hit_tokens"]) for row in rows] == [
        (512, 4, 6, 2048),
        (1024, 2, 3, 2048),
    ]
    assert {row["total_tokens"] for row in rows} == {4200}


def test_table_csv_and_picture(trace: Path, tmp_path: Path) -> None:
    csv, png = tmp_path / "out" / "rows.csv", tmp_path / "curve.png"
    text = " ".join(run(trace, "--capacity-blocks", "inf", "--csv", csv, "--png", png).split())
    assert "4,200 input tokens" in text and "10 trace blocks" in text
    assert csv.read_text().splitlines()[1] == f"lru,inf,5,10,2524,4200,512,inf,0.5,{2524 / 4200}"
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--capacity-blocks", "0"), "holds no trace block"),
        (("--capacity-blocks", "101%"), "101%"),
        (("--capacity-blocks", "many"), "many"),
        (("--capacity-tokens", "100"), "holds no trace block"),
        (("--capacity-bytes", "1GiB"), "--token-bytes"),
        (("--capacity-bytes", "1GiB", "--token-bytes", "lots"), "'lots' is not a size"),
        (("--chunk-tokens", "700"), "choose a multiple of 512"),
        (("--chunk-tokens", "51200"), "choose a smaller chunk size"),
        (("--policy", "magic"), "unknown eviction policy 'magic'; there are 2q, arc"),
        (("--policy", "magic"), "sieve, belady"),
        (("--policy", "lru,ttl"), "'ttl' is no longer an eviction policy; use fifo"),
        (("--window", "half"), "last-half"),
        (("--format", "magic"), "unknown trace format"),
    ],
)
def test_bad_arguments_are_one_line(trace: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(LmcError) as caught:
        run(trace, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_speed_scales_arrivals_and_says_so(trace: Path) -> None:
    rows = {
        speed: json.loads(run("ttl", trace, "--ttl", "0.6s", "--capacity-blocks", "inf", "--speed", speed, "--json"))
        for speed in ("1", "2")
    }
    hits = {speed: rows[speed]["rows"][-1]["hit_tokens"] for speed in rows}
    assert hits == {"1": 1024, "2": 2524}
    assert rows["2"]["notes"] == ["requests arrive 2 times as fast as recorded"] and not rows["1"]["notes"]
    with pytest.raises(LmcError, match="--speed must be a positive number, not 0"):
        run(trace, "--speed", "0")


def test_prompts_take_a_tokenizer_by_file_or_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a b " * 16, "timestamp": 0}) + "\n")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert json.loads(run("describe", prompts, "--tokenizer", name, "--json"))["input_tokens"] == 32
    (tmp_path / "empty").mkdir()
    for bad, message in (
        ("absent.json", "no tokenizer 'absent.json'"),
        (tmp_path / "empty", "holds no tokenizer.json"),
    ):
        with pytest.raises(LmcError, match=message):
            run("describe", prompts, "--tokenizer", bad)


@pytest.mark.parametrize(
    "arguments",
    [("--capacity-blocks", "2"), ("--capacity-blocks", "2", "--shards", "1")]
    + [(verb, "--capacity-blocks", "2") for verb in ("ttl", "groups")]
    + [("tiers", "--host", "0,2", "--disk", "0")],
)
def test_a_small_capacity_is_reported_as_a_note(trace: Path, arguments: tuple[str, ...]) -> None:
    verb = arguments[:1] if "-" not in arguments[0] else ()
    result = json.loads(run(*verb, trace, *arguments[len(verb) :], "--json"))
    [note] = [note for note in result["notes"] if "below the longest request" in note]
    assert (
        note.startswith(f"capacity 2 is below the longest request of {trace.name} (") and "raise the capacity" in note
    )


@pytest.mark.parametrize("verb", ["replay", "tune"])
def test_host_memory_below_a_request_is_a_note(trace: Path, tmp_path: Path, verb: str) -> None:
    lines = [{**line, "timestamp": 10_000 * number + line["timestamp"]} for number in range(3) for line in LINES]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "lmc.yaml").write_text("chunk_tokens: 512\nhost: {capacity: 1MiB}\n")
    options = {"replay": ("--config", tmp_path / "lmc.yaml"), "tune": ("--memory", "1MiB")}[verb]
    result = json.loads(run(verb, trace, *options, "--token-bytes", "2KiB", "--json"))
    assert any(f"is below the longest request of {trace.name} (" in note for note in result["notes"])


def test_token_bytes_is_a_size(trace: Path) -> None:
    options = ("--capacity-bytes", "100MiB", "--json")
    [row] = json.loads(run(trace, "--token-bytes", "10KiB", *options))["rows"]
    assert row["capacity_blocks"] == 20
    assert row == json.loads(run(trace, "--token-bytes", "10240", *options))["rows"][0]


def test_help_imports_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys\nfrom lmc.cli import app\n"
        "try:\n    app(['sim', 'run', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'vllm', 'sglang', 'numba', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_replay_imports_neither_torch_nor_an_engine(trace: Path) -> None:
    code = (
        f"import sys\nfrom lmc.cli import app\n"
        f"try:\n    app(['sim', {str(trace)!r}, '--json'])\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'vllm', 'sglang', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_every_verb_prints_a_table_json_and_csv(trace: Path, tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text(
        "prefill: {token: 1ms}\ntoken_bytes: 1000\ntiers: {host: {bandwidth: 1GB/s}, disk: {bandwidth: 100MB/s}}\n"
    )
    for verb, *options in (
        ["describe"],
        ["ttl", "--ttl", "0.5s,2s,inf", "--capacity-blocks", "2,inf"],
        ["tiers", "--host", "1,50%", "--disk", "0,inf", "--cost", cost],
        ["tiers", "--host", "1MB", "--disk", "0", "--token-bytes", "1000", "--exclusive"],
        ["groups", "--capacity-blocks", "2"],
        ["run", "--shards", "1", "--capacity-blocks", "2"],
    ):
        csv = tmp_path / "rows.csv"
        assert str(trace.name) in run(verb, trace, *options, "--csv", csv)
        assert len(csv.read_text().splitlines()) > 1
        result = json.loads(run(verb, trace, *options, "--json"))
        assert result.get("trace", result)["source"] == trace.name
        for row in result.get("rows", []):
            assert row["total_tokens"] == 4200


def test_ttl_and_tier_rows_count_hits_exactly(trace: Path) -> None:
    rows = json.loads(run("ttl", trace, "--ttl", "0.5s,inf", "--capacity-blocks", "inf", "--json"))["rows"]
    assert [(row["ttl_s"], row["hit_tokens"]) for row in rows] == [(0.5, 1024), ("inf", 2524)]
    (row,) = json.loads(run("tiers", trace, "--host", "1", "--disk", "inf", "--json"))["rows"]
    assert (row["host_hit_tokens"], row["disk_hit_tokens"], row["disk_blocks"]) == (1024, 1500, "inf")


@pytest.fixture
def long_trace(tmp_path: Path) -> Path:
    path = tmp_path / "long.jsonl"
    lines = [
        {
            "timestamp": 1000 * number,
            "input_length": 1024,
            "output_length": 1,
            "hash_ids": [number % 5, 100 + number % 5],
        }
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tune_prints_the_front_and_writes_settings(long_trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "lmc.yaml"
    text = run("tune", long_trace, "--memory", "1MB", "--token-bytes", "100", "--policy", "lru,fifo", "-o", out)
    assert "chosen" in text and f"lmc serve MODEL --config {out}" in text
    assert "chunk_tokens: " in out.read_text()
    result = json.loads(run("tune", long_trace, "--memory", "1MB", "--token-bytes", "100", "--policy", "lru", "--json"))
    assert result["config"]["policy"] == "lru"
    assert result["config"]["chunk_tokens"] == 512  # chunks of 1,024 are whole prompts, which are never loaded
    assert result["expected_hit_rate"] == 0.5 and result["interval"] == [0.5, 0.5]
    assert result["front"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "1MB"), "raise --memory"),
        (("--memory", "1kB", "--token-bytes", "100"), "raise --memory"),
        (("--memory", "lots"), "lots"),
        (("--memory", "1MB", "--dollars-per-hour", "1"), "needs prices"),
        (("--memory", "1MB", "--policy", "magic"), "unknown eviction policy"),
        (("--memory", "1MB", "--cost", "absent.yaml"), "absent.yaml"),
    ],
)
def test_bad_tune_arguments_are_one_line(long_trace: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(LmcError, match=message) as caught:
        run("tune", long_trace, *arguments)
    assert "\n" not in str(caught.value)


def test_replay_runs_the_settings_that_tune_wrote(long_trace: Path, tmp_path: Path) -> None:
    settings = tmp_path / "lmc.yaml"
    run("tune", long_trace, "--memory", "1MB", "--token-bytes", "100", "--policy", "lru", "-o", settings)
    options = (long_trace, "--config", settings, "--token-bytes", "100")
    result = json.loads(run("replay", *options, "--json"))
    # Ten different chunks of 512; five requests are cold, and the last chunk of a whole prompt is never loaded.
    assert result["hit_tokens"] == {"host": 35 * 512}
    assert result["total_tokens"] == 40 * 1024
    two = json.loads(run("replay", *options, "--instances", "2", "--routing", "prefix", "--json"))
    assert sum(two["requests_by_instance"]) == 40
    assert "hits" in run("replay", *options, "--window", "last-half")


def test_replay_compares_one_memory_for_all_with_one_for_each(long_trace: Path, tmp_path: Path) -> None:
    settings, cost = tmp_path / "lmc.yaml", tmp_path / "cost.yaml"
    settings.write_text("host: {capacity: 1GiB}\n")
    cost.write_text(COST)
    options = [long_trace, "--config", settings, "--token-bytes", "128KiB", "--cost", cost, "--instances", "4"]
    both = json.loads(run("replay", *options, "--shared-host", "--json"))
    each = json.loads(run("replay", *options, "--json"))
    assert both["apart"]["hit_tokens"] == each["hit_tokens"] and both["apart"]["ttft_s"] == each["ttft_s"]
    assert both["hit_tokens"]["host"] > each["hit_tokens"]["host"]
    assert "each with a memory of its own" in run("replay", *options, "--shared-host")
    with pytest.raises(LmcError, match="give --instances"):
        run("replay", *options[:-2], "--shared-host")


COST = """
prefill: {fixed: 10ms, token: 30us}
token_bytes: 128KiB
tiers:
  host: {bandwidth: 20GB/s}
  remote: {bandwidth: 1GB/s, latency: 2ms}
"""


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("redis: {url: 'redis://cache'}", ["redis"]),
        ("s3: {bucket: b}", ["s3"]),
        ("mooncake: {master: 'm:1'}", ["mooncake"]),
        ("", ["remote"]),
    ],
)
def test_replay_takes_the_shared_tiers_of_the_settings(
    long_trace: Path, tmp_path: Path, section: str, names: list[str], timed: bool
) -> None:
    """They were once ignored without a word."""
    settings, cost = tmp_path / "lmc.yaml", tmp_path / "cost.yaml"
    settings.write_text(f"host: {{capacity: 1GiB}}\n{section}\n")
    cost.write_text(COST)
    options = [long_trace, "--config", settings, "--instances", "4", "--token-bytes", "128KiB"]
    options += ["--cost", cost] if timed else []
    result = json.loads(run("replay", *options, "--shared", "2TiB", "--json"))
    assert list(result["hit_tokens"]) == ["host", *names] and result["hit_tokens"][names[0]] > 0
    without = json.loads(run("replay", *options, "--json"))
    if section:
        assert without["hit_tokens"] == result["hit_tokens"]
        assert any(f"{names[0]} never evict" in note for note in without["notes"])
    else:
        assert list(without["hit_tokens"]) == ["host"]


def test_shares_of_a_short_trace_give_each_capacity_once(trace: Path) -> None:
    rows = json.loads(run(trace, "--capacity-blocks", "1%,3%,10%,30%,inf", "--json"))["rows"]
    assert [row["capacity_blocks"] for row in rows] == [1, "inf"]
    tiers = json.loads(run("tiers", trace, "--json"))["rows"]
    assert len({json.dumps(row) for row in tiers}) == len(tiers)


def test_bad_replay_settings_are_one_line(long_trace: Path, tmp_path: Path) -> None:
    settings = tmp_path / "lmc.yaml"
    for text, message in (
        ("host: {capacity: 25%}\nchunk_tokens: 512\n", "64GiB"),
        ("host: {capacity: 10GB}\nchunk_tokens: 100\n", "not a multiple"),
        ("hosts: {}\n", "hosts"),
    ):
        settings.write_text(text)
        with pytest.raises(LmcError, match=message):
            run("replay", long_trace, "--config", settings, "--token-bytes", "100")
    settings.write_text("host: {capacity: 10GB}\nchunk_tokens: 512\n")
    with pytest.raises(LmcError, match="give --token-bytes"):
        run("replay", long_trace, "--config", settings)


def test_report_writes_its_folder(long_trace: Path, tmp_path: Path) -> None:
    assert "report.html" in run("report", long_trace, "-o", tmp_path / "out", "--policy", "fifo", "--sizes", "3")
    assert (tmp_path / "out" / "report.html").stat().st_size < 1_000_000
    result = json.loads(run("report", long_trace, "-o", tmp_path / "out", "--policy", "fifo", "--sizes", "3", "--json"))
    assert {row["policy"] for row in result["rows"]["last-half"]} == {"lru", "fifo", "belady"}


def test_run_with_a_cost_model_counts_bytes_and_saved_seconds(trace: Path, tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill: {token: 1ms, pair: 1us}\ntoken_bytes: 1000\n")
    options = ("--capacity-blocks", "inf", "--policy", "lru,fifo", "--cost", cost)
    hits = [1024, 1500]  # of the second and the third request
    for row in json.loads(run(trace, *options, "--json"))["rows"]:
        assert row["hit_tokens"] == sum(hits) and row["hit_bytes"] == 1000 * sum(hits)
        assert row["saved_prefill_s"] == pytest.approx(1e-3 * sum(hits) + 1e-6 * sum(hit**2 for hit in hits) / 2)
    assert "saved prefill" in run(trace, *options)
