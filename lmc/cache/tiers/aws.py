"""What AWS's own variables and files say about the S3 tier, where the settings say nothing: keys, region and endpoint.

Variables come before the files, as in AWS's own tools. obstore reads the variables and asks instance and web identities by itself, but no
files.
"""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from pathlib import Path

from lmc.errors import ConfigError

_KEYS = {
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_IDENTITIES = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")


def aws_settings(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """endpoint, region, access_key_id, secret_access_key and session_token, as far as they are given.

    Raises ConfigError for files that cannot be read and for a profile that was asked for and is not there or holds no keys.
    """
    asked = environment.get("AWS_PROFILE")
    name = asked or "default"
    profile = _profile(environment, home, name)
    if asked and not profile:
        raise ConfigError(
            f"s3: AWS_PROFILE names {asked!r}, which neither the credentials file nor the config file has"
        )
    found = {}
    endpoint = _first(environment, _ENDPOINTS) or profile.get("endpoint_url")
    region = _first(environment, _REGIONS) or profile.get("region")
    if endpoint:
        found["endpoint"] = endpoint
    if region:
        found["region"] = region
    if _first(environment, _IDENTITIES):
        return found
    keys = {ours: profile[theirs] for ours, theirs in _KEYS.items() if profile.get(theirs)}
    if asked and not {"access_key_id", "secret_access_key"} <= set(keys):
        raise ConfigError(
            f"s3: profile {asked!r} holds no access keys, and lmc asks no other program for them; "
            f"put what `aws configure export-credentials --profile {asked} --format env` prints into the environment"
        )
    return found | keys


def _profile(environment: Mapping[str, str], home: Path, name: str) -> dict[str, str]:
    """Both files' lines of one profile; the credentials file counts first."""
    credentials = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials")
    config = Path(environment.get("AWS_CONFIG_FILE") or home / ".aws" / "config")
    section = name if name == "default" else f"profile {name}"
    return _section(config, section) | _section(credentials, name)


def _section(file: Path, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(file.expanduser().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise ConfigError(f"s3: cannot read {file}: {type(error).__name__}") from None  # the text may hold a key
    return dict(parser[name]) if parser.has_section(name) else {}


def _first(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((environment[name] for name in names if environment.get(name)), None)
