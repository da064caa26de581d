"""The manifest for KubeRay against the operator's published schema, and what the server needs."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from loadtests.clusters import SWITCHES
from server.cluster.local import ENVIRONMENT, hard_stop_s
from server.settings import load_settings

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "kubernetes" / "rayservice.yaml"
SERVICE: dict[str, Any] = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
SCHEMA = Path(__file__).with_name("schemas") / "rayservice-1.6.2.json.gz"
SERVE: dict[str, Any] = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
CLUSTER: dict[str, Any] = SERVICE["spec"]["rayClusterConfig"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
PODS = [one["template"]["spec"] for one in GROUPS]
SPARE_S = 10.0


def closed(schema: Any) -> Any:
    """The schema with fields that it does not know refused, which the API server would drop."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(one) for name, one in schema.items()}
    keeps = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if made.get("type") == "object" and isinstance(made.get("properties"), dict) and not keeps:
        made["additionalProperties"] = False
    return made


def faults(manifest: dict[str, Any]) -> list[str]:
    schema = closed(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    return [str(one) for one in jsonschema_rs.Draft202012Validator(schema).iter_errors(manifest)]


def test_the_manifest_is_valid_and_the_schema_finds_what_is_not() -> None:
    assert faults(SERVICE) == []
    broken = json.loads(json.dumps(SERVICE))
    container = broken["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    container["containers"][0]["livenesProbe"] = {}
    assert faults(broken)


def test_the_application_is_the_one_of_this_package_with_settings_that_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (application,) = SERVE["applications"]
    module, _, name = application["import_path"].partition(":")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert f"def {name}(" in source
    options = source.partition("class ClusterOptions")[2].partition("def ")[0]
    for option in application["args"]["cluster"]:
        assert f"\n    {option}: " in options, option
    settings = load_settings(application["args"]["settings"])
    for pod in PODS:
        assert pod["terminationGracePeriodSeconds"] >= settings.drain_s + SPARE_S
    (stop,) = (
        one["lifecycle"]["preStop"]["exec"]["command"]
        for pod in PODS[1:]
        for one in pod["containers"]
    )
    assert settings.drain_s < float(stop[1]) < PODS[1]["terminationGracePeriodSeconds"]
    assert SERVICE["spec"]["rayClusterDeletionDelaySeconds"] >= settings.drain_s + SPARE_S
    mounted = {one["mountPath"] for pod in PODS for one in pod["containers"][0]["volumeMounts"]}
    assert str(settings.data_dir) in mounted


def test_there_is_room_for_all_replicas() -> None:
    cluster = SERVE["applications"][0]["args"]["cluster"]
    (workers,) = CLUSTER["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    most = workers["maxReplicas"] * float(container["resources"]["requests"]["cpu"])
    assert most >= cluster["max_replicas"] * cluster["cpus"] + cluster["http_replicas"]


def test_ray_is_the_one_that_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    ours = [one for one in pins.splitlines() if one.startswith("ray==")]
    extra = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = CLUSTER["rayVersion"]
    assert f"ray[serve]>={version.rpartition('.')[0]}" in extra
    assert not ours or ours == [f"ray=={version}"]


@pytest.mark.parametrize("pod", PODS, ids=["head", "engines"])
def test_every_pod_is_confined_watched_and_sized(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    for container in pod["containers"]:
        assert container["image"].rpartition(":")[2][0].isdigit()
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert container["readinessProbe"]
        assert container["livenessProbe"]


def test_all_nodes_have_the_same_store_and_its_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(SERVE["applications"][0]["args"]["settings"])
    assert settings.remote_store is not None
    for pod in PODS:
        variables = {one["name"] for one in pod["containers"][0]["env"]}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"} <= variables
        (room,) = (one["emptyDir"]["sizeLimit"] for one in pod["volumes"] if one["name"] == "data")
        assert int(room.removesuffix("Gi")) << 30 > settings.remote_store.cache_bytes


def test_the_audit_log_does_not_go_with_a_pod(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(SERVE["applications"][0]["args"]["settings"])
    assert settings.audit_log == "stdout"
    for pod in PODS:  # without it Ray has the output of replicas in files of the pod
        variables = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
        assert variables["RAY_LOG_TO_STDERR"] == "1"


def test_every_node_has_the_switches_that_the_page_of_clusters_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = page.partition("## On a real cluster")[2].partition("\n## ")[0]
    switches = dict(re.findall(r"`(RAY_\w+)=([^`]+)`", section))
    assert len(switches) > 5
    settings = load_settings(SERVE["applications"][0]["args"]["settings"])
    assert int(switches["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) == hard_stop_s(settings)
    assert switches == SWITCHES
    own = switches.keys() - {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"}  # which goes by the settings
    assert {name: ENVIRONMENT.get(name) for name in own} == {name: switches[name] for name in own}
    for pod in PODS:
        variables = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
        assert {name: variables.get(name) for name in switches} == switches
