"""The dashboard: well formed, in the words of PromQL, and provisioned where Grafana looks."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stand.promql import filled, series_of

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
BOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [one for one in BOARD["panels"] if one["type"] != "row"]
EXPRESSIONS = [(one["title"], each) for one in PANELS for each in one["targets"]]
VARIABLES = {"job": "hira", "instance": ".*"}
WIDTH = 24  # of Grafana's grid
PROMTOOL = shutil.which("promtool")


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    across = range(place["x"], place["x"] + place["w"])
    return set(itertools.product(across, range(place["y"], place["y"] + place["h"])))


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [one["id"] for one in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for one in BOARD["panels"]:
        own = cells(one)
        assert not own & taken, one["title"]
        assert max(x for x, _ in own) < WIDTH
        taken |= own


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for one in PANELS:
        assert one["description"].endswith("."), one["title"]
        assert one["fieldConfig"]["defaults"]["unit"], one["title"]
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_legends_name_labels_that_the_expression_keeps() -> None:
    for title, target in EXPRESSIONS:
        kept = {label for one in series_of(target["expr"]) for label in one.grouped}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, title


def test_variables_that_expressions_use_are_there() -> None:
    there = {one["name"] for one in BOARD["templating"]["list"]}
    assert there == {"datasource", *VARIABLES}
    for _, target in EXPRESSIONS:
        filled(target["expr"], interval="5m", variables=VARIABLES)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_every_expression_is_promql(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    rules = [
        {
            "record": f"panel:number_{number}",
            "expr": filled(one["expr"], interval="5m", variables=VARIABLES),
        }
        for number, (_, one) in enumerate(EXPRESSIONS)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(
        [PROMTOOL, "check", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_provisioning_names_the_data_source_and_the_folder_that_compose_mounts() -> None:
    provisioning = FOLDER / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "hira.yml").read_text())[
        "providers"
    ]
    services = yaml.safe_load((FOLDER.parent / "compose.yaml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    folder = provider["options"]["path"]
    mounted = [one.split(":")[1] for one in services["grafana"]["volumes"]]
    assert f"{folder}/dashboard.json" in mounted
