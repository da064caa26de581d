"""The compose file against the published schema, and against what the server needs."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from server.settings import load_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SCHEMA = Path(__file__).with_name("schemas") / "compose-spec.json.gz"
SPARE_S = 10.0  # beyond drain_s, until the server is killed


def faults(compose: dict[str, Any]) -> list[str]:
    schema = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    return [str(one) for one in jsonschema_rs.Draft7Validator(schema).iter_errors(compose)]


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found, text
    return float(found[1])


def test_the_file_is_valid_and_the_schema_finds_what_is_not() -> None:
    assert faults(COMPOSE) == []
    misspelt = {**COMPOSE, "services": {"server": {**SERVICES["server"], "helthcheck": {}}}}
    assert faults(misspelt)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_pinned_confined_watched_and_sized(name: str) -> None:
    service = SERVICES[name]
    tag = service["image"].rpartition(":")[2]
    assert re.match(r"v?\d+\.\d+", tag), "a tag that moves is no pin"
    assert not service["user"].startswith("0"), "root"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert seconds(service["stop_grace_period"]) > 0
    assert set(service["deploy"]["resources"]) == {"reservations", "limits"}


def test_ports_are_open_to_this_machine_alone() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_server_is_given_settings_that_there_are_and_time_to_drain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    server = SERVICES["server"]
    for name, value in server["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:\?[^}]*\}", "a-long-secret-of-no-worth", value))
    settings = load_settings()
    assert settings.registry_url == "postgresql+psycopg://hira@postgres/hira"
    assert seconds(server["stop_grace_period"]) >= settings.drain_s + SPARE_S
    assert {"postgres", "s3"} <= set(server["build"]["args"]["EXTRAS"].split(","))
    assert settings.store_endpoint == "http://store:8333"
    assert "-s3.port=8333" in SERVICES["store"]["command"]
    assert "-master.telemetry=false" in SERVICES["store"]["command"]
    (identity,) = json.loads(COMPOSE["configs"]["store-keys"]["content"])["identities"]
    (keys,) = identity["credentials"]
    assert keys["accessKey"] == server["environment"]["AWS_ACCESS_KEY_ID"]
    assert keys["secretKey"] == server["environment"]["AWS_SECRET_ACCESS_KEY"]


def test_the_server_runs_as_the_user_of_the_image_and_writes_only_where_it_may() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    server = SERVICES["server"]
    assert f"--uid {server['user'].partition(':')[0]} " in image
    assert "data:/data" in server["volumes"]
    assert "HIRA_DATA_DIR=/data" in image


def test_secrets_have_no_default_and_the_example_names_them_all() -> None:
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\$\{(\w+)", text))
    assert wanted == set(re.findall(r"\$\{(\w+):\?", text))
    example = (FOLDER / "env.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)=$", example, flags=re.MULTILINE)) == wanted


def test_files_that_are_mounted_are_there() -> None:
    for service in SERVICES.values():
        for one in service.get("volumes", []):
            source = one.split(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]
