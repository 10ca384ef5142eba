"""AWS's own files and variables, as its tools read them; and an S3 server that checks which keys a request was signed with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmc.cache.sections import S3Config
from lmc.cache.tiers.aws import aws_settings
from lmc.cache.tiers.s3 import S3Tier, open_store
from lmc.errors import ConfigError
from tests import services
from tests.contracts.tier import SCOPE, key, load, payload

CREDENTIALS = """
[default]
aws_access_key_id = default-id
aws_secret_access_key = default-secret%with/signs

[work]
aws_access_key_id = work-id
aws_secret_access_key = work-secret
aws_session_token = work-token
"""
CONFIG = """
[default]
region = eu-west-1

[profile work]
region = eu-north-1
endpoint_url = http://store:9000

[profile sso]
sso_session = x
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws" / "config").write_text(CONFIG)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_default_profile(home: Path) -> None:
    assert aws_settings({}, home) == {
        "region": "eu-west-1",
        "access_key_id": "default-id",
        "secret_access_key": "default-secret%with/signs",
    }


def test_another_profile(home: Path) -> None:
    assert aws_settings({"AWS_PROFILE": "work"}, home) == {
        "region": "eu-north-1",
        "endpoint": "http://store:9000",
        "access_key_id": "work-id",
        "secret_access_key": "work-secret",
        "session_token": "work-token",
    }


def test_variables_come_first(home: Path) -> None:
    environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_REGION": "r", "AWS_ENDPOINT_URL": "http://e", "AWS_PROFILE": "work"}
    assert aws_settings(environment, home) == {"region": "r", "endpoint": "http://e"}  # obstore reads the keys itself


def test_files_elsewhere(home: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    found = aws_settings({"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "other")}, home)
    assert (found["access_key_id"], found["region"]) == ("a", "eu-west-1")
    assert aws_settings({}, tmp_path / "nobody") == {}


@pytest.mark.parametrize(("profile", "message"), [("absent", "neither"), ("sso", "export-credentials")])
def test_a_profile_that_cannot_be_used_is_refused(home: Path, profile: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aws_settings({"AWS_PROFILE": profile}, home)


def test_a_broken_file_is_refused_without_its_content(home: Path) -> None:
    (home / ".aws" / "credentials").write_text("aws_secret_access_key = hush\n")
    with pytest.raises(ConfigError, match="cannot read") as caught:
        aws_settings({}, home)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["host:9000", "s3://host", "http://", "http://u:hush@host"])
def test_a_wrong_endpoint_is_refused_and_not_shown(home: Path, endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"s3\.endpoint") as caught:
        open_store(S3Config(bucket="chunks", endpoint=endpoint))
    assert "hush" not in str(caught.value)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with services.s3_server("chunks") as endpoint:
        yield endpoint


@pytest.mark.service
def test_nothing_but_awss_own_settings_is_needed(home: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for profile in ("default", "work"):
        monkeypatch.setenv("AWS_PROFILE", profile)
        tier = S3Tier(S3Config(bucket="chunks", prefix=profile, timeout=20), SCOPE)
        tier.put(key(1), payload(1))
        assert load(tier, 1) == payload(1)
