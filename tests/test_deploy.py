"""examples/deploy: syntax, references from file to file, and lmc's settings. Nothing is run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from lmc.cache.settings import load_settings
from lmc.cli import app

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "deploy"
KUBERNETES: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())


def serve_options(words: list[str]) -> None:
    """Every option is one of lmc serve."""
    command: Any = get_command(app)
    known = {option for parameter in command.commands["serve"].params for option in parameter.opts}
    given = {word for word in words if word.startswith("--")}
    assert given and given <= known, given - known


def test_every_file_is_named_in_the_readme() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert not [file.name for file in FOLDER.iterdir() if file.name != "README.md" and file.name not in readme]


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_an_image_copies_what_the_package_is_built_from(name: str) -> None:
    text = (FOLDER / f"{name}.Dockerfile").read_text()
    assert re.search(rf"^FROM \S*{name}\S*:v\d", text, re.MULTILINE)
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    project = (ROOT / "pyproject.toml").read_text()
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "lmc",
        *re.findall(r'^"(\w+)" = "lmc/shipped_files', project, re.MULTILINE),
    }
    assert needed <= set(copied)
    assert 'ENTRYPOINT ["lmc", "serve"]' in text


def test_the_compose_file_fits_together() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (FOLDER / source).exists(), volume
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nothing is open to the network"
    engine = services["engine"]
    build = FOLDER / engine["build"]["context"] / engine["build"]["dockerfile"]
    assert build.is_file()
    serve_options(engine["command"])
    settings = load_settings(
        None, {name: text for name, text in engine["environment"].items() if name.startswith("LMC_")}
    )
    assert settings.config.redis.url == "redis://redis:6379"
    scraped = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["scrape_configs"]
    targets = [target for job in scraped for block in job["static_configs"] for target in block["targets"]]
    assert f"engine:{settings.config.metrics.port}" in targets and "engine:8000" in targets
    if promtool := shutil.which("promtool"):
        done = subprocess.run(
            [promtool, "check", "config", "--syntax-only", str(FOLDER / "prometheus.yaml")], check=False
        )
        assert done.returncode == 0


def test_the_unit_runs_a_command_that_there_is() -> None:
    text = (FOLDER / "lmc.service").read_text()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    words = shlex.split(lines["ExecStart"])
    assert words[0].endswith("/lmc") and words[1] == "serve"
    serve_options(words[2:])
    assert int(lines["TimeoutStopSec"]) >= 60 and lines["KillMode"] == "mixed"
    assert {"[Unit]", "[Service]", "[Install]"} <= set(text.splitlines())


def by_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in KUBERNETES if document["kind"] == kind}


def test_the_manifests_fit_together(tmp_path: Path) -> None:
    deployments, services, maps = by_kind("Deployment"), by_kind("Service"), by_kind("ConfigMap")
    for name, service in services.items():
        pod = deployments[name]["spec"]["template"]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for deployment in deployments.values():
        spec = deployment["spec"]
        assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        for volume in spec["template"]["spec"].get("volumes", ()):
            assert "configMap" not in volume or volume["configMap"]["name"] in maps
        for container in spec["template"]["spec"]["containers"]:
            mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounts <= {volume["name"] for volume in spec["template"]["spec"].get("volumes", ())}
    pod = deployments["lmc-engine"]["spec"]["template"]
    [engine] = pod["spec"]["containers"]
    serve_options(engine["args"])
    (tmp_path / "lmc.yaml").write_text(maps["lmc"]["data"]["lmc.yaml"])
    config = load_settings(tmp_path / "lmc.yaml").config
    assert config.redis.url == f"redis://lmc-redis:{services['lmc-redis']['spec']['ports'][0]['port']}"
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(config.metrics.port)
    assert pod["spec"]["enableServiceLinks"] is False
    [policy] = by_kind("NetworkPolicy").values()
    assert policy["spec"]["podSelector"]["matchLabels"] == deployments["lmc-redis"]["spec"]["selector"]["matchLabels"]


def test_the_workflow_calls_commands_that_there_are() -> None:
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "bench.yaml").read_text())
    words = [
        line.split() for step in workflow["jobs"]["bench"]["steps"] for line in str(step.get("run", "")).splitlines()
    ]
    called = [line[1:] for line in words if line and line[0].endswith("/lmc")]
    assert [line[1] for line in called] == ["quickstart", "quickstart", "compare"]
    group: Any = get_command(app)
    for line in called:
        name = "compare" if line[1] == "compare" else "run"
        known = {option for parameter in group.commands["bench"].commands[name].params for option in parameter.opts}
        assert {word for word in line if word.startswith("--")} <= known
