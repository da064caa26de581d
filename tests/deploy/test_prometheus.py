"""The scrape configuration and the alerts, as Prometheus' own tool sees them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.errors import TABLE
from tests.stand.promql import series_of

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
CASES = Path(__file__).with_name("alerts_test.yml")
PROMTOOL = shutil.which("promtool")
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
CODES = {"code": frozenset(TABLE)}
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")


def promtool(*arguments: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_scrape_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", str(FOLDER / "prometheus.yml"))


@needs_promtool
def test_alerts_fire_when_they_should_and_not_when_all_is_well() -> None:
    promtool("test", "rules", str(CASES))


def test_every_alert_has_a_case_in_which_it_fires_and_is_silent_when_all_is_well() -> None:
    cases = yaml.safe_load(CASES.read_text(encoding="utf-8"))["tests"]
    names = {rule["alert"] for rule in RULES}
    well = {one["alertname"] for one in cases[0]["alert_rule_test"] if "exp_alerts" not in one}
    fires = {
        one["alertname"]
        for case in cases[1:]
        for one in case["alert_rule_test"]
        if one.get("exp_alerts")
    }
    assert well == names
    assert fires == names


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_what_it_means_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert set(rule["annotations"]) == {"summary", "fix"}
    for series in series_of(rule["expr"]):
        for label, operator, value in series.matchers:
            assert operator != "=" or value in CODES.get(label, {value}), f"no code {value}"


def test_targets_are_read_where_the_configuration_looks() -> None:
    said = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = said["scrape_configs"]
    assert job["job_name"] == "hira", "the alerts and the dashboard ask for it"
    assert list(FOLDER.glob(job["file_sd_configs"][0]["files"][0]))
    assert [FOLDER / one for one in said["rule_files"]] == [FOLDER / "alerts.yml"]
