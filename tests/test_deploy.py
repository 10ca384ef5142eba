"""examples/deploy: syntax, references from file to file, and lmc's settings. Nothing is run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from typer.main import get_command

from lmc.cache.settings import load_settings
from lmc.cli import app
from tests.programs import program

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


@pytest.mark.program("promtool")
def test_promtool_accepts_the_scrape_configuration() -> None:
    subprocess.run(
        [program("promtool"), "check", "config", "--syntax-only", str(FOLDER / "prometheus.yaml")], check=True
    )


def test_the_unit_runs_a_command_that_there_is() -> None:
    text = (FOLDER / "lmc.service").read_text()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    words = shlex.split(lines["ExecStart"])
    assert words[0].endswith("/lmc") and words[1] == "serve"
    serve_options(words[2:])
    assert int(lines["TimeoutStopSec"]) >= 60 and lines["KillMode"] == "mixed"
    assert {"[Unit]", "[Service]", "[Install]"} <= set(text.splitlines())


def by_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def fit_together(documents: list[dict[str, Any]]) -> None:
    """Names, labels, ports and volumes lead somewhere; the engine's options and settings are lmc's."""
    deployments, services, maps = (by_kind(documents, kind) for kind in ("Deployment", "Service", "ConfigMap"))
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
    options = engine["args"]
    serve_options(options[: options.index("--")] if "--" in options else options)
    with TemporaryDirectory() as folder:
        file = Path(folder, "lmc.yaml")
        file.write_text(maps["lmc"]["data"]["lmc.yaml"])
        config = load_settings(file, {one["name"]: one["value"] for one in engine.get("env", ())}).config
    if "lmc-redis" in services:
        assert config.redis.url == f"redis://lmc-redis:{services['lmc-redis']['spec']['ports'][0]['port']}"
        [policy] = by_kind(documents, "NetworkPolicy").values()
        labels = deployments["lmc-redis"]["spec"]["selector"]["matchLabels"]
        assert policy["spec"]["podSelector"]["matchLabels"] == labels
    else:
        assert config.redis.url is None and by_kind(documents, "NetworkPolicy") == {}
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(config.metrics.port)
    assert pod["spec"]["enableServiceLinks"] is False


def test_the_manifests_fit_together() -> None:
    fit_together(KUBERNETES)


CHART = FOLDER / "chart"
GIVEN: list[dict[str, Any]] = [
    {"image": "registry/lmc", "model": "some/model"},
    {
        "image": "registry/lmc", "model": "some/model", "engine": "sglang", "replicas": 5, "secrets": "lmc-secrets",
        "engineArgs": ["--tp-size", "2"], "lmc": {"host": {"capacity": "8GiB"}, "metrics": {"host": "0.0.0.0", "port": 9500}},
    },
    {"image": "registry/lmc", "model": "some/model", "redis": {"enabled": False}},
]  # fmt: skip


def values(given: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    for name, value in given.items():
        merged[name] = {**merged[name], **value} if isinstance(value, dict) else value
    return merged


def rendered(text: str, given: dict[str, Any]) -> str:
    """What Helm makes of the few forms that the chart uses; any other form is an error. Where there is a Helm, it is compared with it."""
    out: list[str] = []
    shown = [True]
    for line in text.splitlines():
        if condition := re.fullmatch(r"\{\{- if (\S+) \}\}", line):
            shown.append(shown[-1] and bool(looked_up(condition[1], given)))
        elif line == "{{- end }}":
            shown.pop()
        elif shown[-1]:
            out.append(re.sub(r"\{\{ (.*?) \}\}", lambda found: evaluated(found[1], given), line))
    assert shown == [True] and "{{" not in "\n".join(out)
    return "\n".join(out)


def looked_up(path: str, given: dict[str, Any]) -> Any:
    found: Any = {"Values": given, "Release": {"Name": "lmc"}}
    for name in path.removeprefix(".").split("."):
        found = found[name]
    return found


def evaluated(expression: str, given: dict[str, Any]) -> str:
    first, *pipes = expression.split(" | ")
    words = shlex.split(first)
    value = looked_up(words[-1], given)
    if words[0] == "toYaml":
        value = yaml.safe_dump(value).rstrip("\n")
    elif words[0] == "required":
        assert value, words[1]
    else:
        assert len(words) == 1, expression
    for pipe in pipes:
        name, *numbers = pipe.split()
        if name == "indent":
            value = "\n".join(" " * int(numbers[0]) + line for line in str(value).splitlines())
        else:
            value = {"quote": json.dumps(str(value)), "sha256sum": "0" * 64}[name]
    return str(value)


def kind_and_name(document: dict[str, Any]) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def of_the_chart(given: dict[str, Any]) -> list[dict[str, Any]]:
    texts = [rendered(file.read_text(), values(given)) for file in sorted((CHART / "templates").iterdir())]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@pytest.mark.parametrize("given", GIVEN)
def test_the_chart_fits_together(given: dict[str, Any]) -> None:
    documents = of_the_chart(given)
    fit_together(documents)
    [engine] = by_kind(documents, "Deployment")["lmc-engine"]["spec"]["template"]["spec"]["containers"]
    assert engine["args"][0] == "some/model" and engine["image"] == "registry/lmc"
    assert engine["args"][-2:] == given.get("engineArgs", engine["args"][-2:])


@pytest.mark.program("helm")
@pytest.mark.parametrize("given", GIVEN)
def test_helm_renders_the_chart_as_these_tests_do(given: dict[str, Any], tmp_path: Path) -> None:
    helm, documents = program("helm"), of_the_chart(given)
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(given))
    subprocess.run([helm, "lint", CHART, "-f", tmp_path / "values.yaml"], check=True)
    made = subprocess.run(
        [helm, "template", "lmc", CHART, "-f", tmp_path / "values.yaml"], check=True, capture_output=True, text=True
    ).stdout
    theirs = list(yaml.safe_load_all(made))
    for document in documents + theirs:
        annotations = document.get("spec", {}).get("template", {}).get("metadata", {}).get("annotations", {})
        annotations.pop("checksum/settings", None)
    assert sorted(documents, key=kind_and_name) == sorted(theirs, key=kind_and_name)


def test_the_chart_says_what_is_missing() -> None:
    with pytest.raises(AssertionError, match="set image"):
        rendered((CHART / "templates" / "engine.yaml").read_text(), values({}))


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
