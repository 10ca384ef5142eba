"""lmc's metrics, rules and dashboard in a real Prometheus: Debian's package, which scripts/setup-prometheus fetches.

Where there is none, these tests are skipped; test_metrics.py checks names and labels without it.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from lmc.cache.observe.metrics import CacheMetrics
from tests.programs import program
from tests.services import LOCAL, free_port, wait_until

ROOT = Path(__file__).parents[3]
STEPS, STEP_S = 90, 60
ENGINE = """# TYPE vllm:time_to_first_token_seconds histogram
# TYPE vllm:request_prefill_time_seconds histogram
# TYPE vllm:prompt_tokens counter
"""


@pytest.fixture
def exercised() -> CacheMetrics:
    """Metrics of a cache of which everything was used, failures too. Every label has one value."""
    metrics = CacheMetrics(["host", "disk"], ["redis"])
    for one in vars(metrics).values():
        if isinstance(one, MetricWrapperBase):
            use(one)
    return metrics


def use(metric: MetricWrapperBase) -> None:
    values = ["corrupt" if name == "cause" else name for name in metric._labelnames]  # an alert asks for this cause
    child = metric.labels(*values) if values else metric
    if isinstance(child, Counter):
        child.inc(100)
    elif isinstance(child, Gauge):
        child.set(1)
    else:
        assert isinstance(child, Histogram)
        child.observe(0.01)


def history(*registries: CollectorRegistry) -> str:
    """OpenMetrics of ninety minutes in which every counter grew by its value each minute."""
    begin = int(time.time()) // 7200 * 7200 - 7200
    lines = []
    for family in [family for registry in registries for family in registry.collect()]:
        lines.append(f"# TYPE {family.name} {family.type}")
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = ",".join(f"{name}={json.dumps(text)}" for name, text in {**sample.labels, "instance": "i"}.items())
            for step in range(STEPS):
                grown = sample.value * (1 if family.type == "gauge" else step + 1)
                lines.append(f"{sample.name}{{{labels}}} {grown} {begin + step * STEP_S}")
    return "\n".join([*lines, "# EOF", ""])


def engine_metrics() -> CollectorRegistry:
    """What the dashboard shows of vLLM itself."""
    registry = CollectorRegistry()
    for name in ("vllm:time_to_first_token_seconds", "vllm:request_prefill_time_seconds"):
        use(Histogram(name, name, registry=registry))
    use(Counter("vllm:prompt_tokens", "prompt tokens", registry=registry))
    return registry


@contextmanager
def prometheus(folder: Path, registries: list[CollectorRegistry]) -> Iterator[str]:
    (folder / "history").write_text(history(*registries))
    (folder / "prometheus.yml").write_text("global: {}\n")
    subprocess.run(
        [program("promtool"), "tsdb", "create-blocks-from", "openmetrics", folder / "history", folder / "data"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    address = f"{LOCAL}:{free_port()}"
    paths = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    server = subprocess.Popen(
        [program("prometheus"), *paths, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: answers(f"http://{address}/-/ready"), "Prometheus is ready")
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def expressions() -> dict[str, str]:
    """By where they stand; Grafana's variables are filled in."""
    found = {}
    for panel in json.loads((ROOT / "dashboards" / "lmc.json").read_text())["panels"]:
        for number, target in enumerate(panel.get("targets", ())):
            text = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "5m")
            assert "$" not in text
            found[f"dashboard, {panel['title']}, {number}"] = text
    for group in yaml.safe_load((ROOT / "dashboards" / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            found[rule.get("alert") or rule["record"]] = rule["expr"]
    return found


@pytest.mark.program("promtool")
def test_promtool_accepts_the_metrics_page(exercised: CacheMetrics) -> None:
    page = generate_latest(exercised.registry)
    done = subprocess.run([program("promtool"), "check", "metrics"], input=page, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@pytest.mark.program("prometheus", "promtool")
def test_every_expression_of_the_dashboard_and_the_rules_returns_data(exercised: CacheMetrics, tmp_path: Path) -> None:
    at = int(time.time()) // 7200 * 7200 - 7200 + (STEPS - 1) * STEP_S
    empty = {}
    with prometheus(tmp_path, [exercised.registry, engine_metrics()]) as url:
        for where, text in expressions().items():
            query = urllib.parse.urlencode({"query": text, "time": at})
            with urllib.request.urlopen(f"{url}/api/v1/query?{query}") as answer:
                result = json.load(answer)["data"]["result"]
            if not result or any(re.fullmatch("NaN", row["value"][1]) for row in result):
                empty[where] = result
    assert empty == {}
