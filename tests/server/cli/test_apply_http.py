"""Many adapters in one go against a real server: all of them, or none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.stand.live import ROOT, Live, environment, hira
from tests.stand.made import make_adapter

pytestmark = pytest.mark.http


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hira(tmp_path_factory.mktemp("apply") / "data") as server:
        yield server


def command(live: Live, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    key = live.admin["Authorization"].removeprefix("Bearer ")
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments, "--url", live.url, "--key", key],
        cwd=cwd,
        env={**environment(cwd), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def versions(live: Live) -> dict[str, tuple[str, bool]]:
    rows = live.client.get("/admin/adapters?limit=1000", headers=live.admin).json()["adapters"]
    return {one["name"]: (one["version"], one["pinned"]) for one in rows}


def test_a_manifest_is_applied_as_a_whole(live: Live, tmp_path: Path) -> None:
    before = versions(live)
    lines = []
    for place in range(6):
        make_adapter(tmp_path / f"m{place}", seed=place, labels=("A", "B") if place % 2 else ())
        lines.append(f"  m{place}: {{source: m{place}, pinned: {str(place == 0).lower()}}}")
    manifest = tmp_path / "adapters.yaml"

    # Two broken ones among them: both are named, nothing is applied.
    broken = tmp_path / "m2" / "adapter_config.json"
    whole = broken.read_text()
    broken.write_text(json.dumps({**json.loads(whole), "peft_type": "IA3"}))
    tensors = tmp_path / "m4" / "adapter_model.safetensors"
    bytes_whole = tensors.read_bytes()
    tensors.write_bytes(bytes_whole[:1000])
    manifest.write_text("adapters:\n" + "\n".join(lines))
    refused = command(live, "apply", str(manifest), cwd=tmp_path)
    assert refused.returncode == 1
    assert "hira: m2: unsupported_method: " in refused.stderr
    assert "hira: m4: corrupt_file: " in refused.stderr
    assert "nothing was applied: 2 of 6" in refused.stderr
    assert versions(live) == before

    # One that is not there at all hides nothing of the others.
    manifest.write_text("adapters:\n" + "\n".join([*lines, "  m9: nowhere"]))
    refused = command(live, "apply", str(manifest), cwd=tmp_path)
    assert refused.returncode == 2
    for said in ("m9: ", "m2: unsupported_method: ", "m4: corrupt_file: ", "nothing was applied"):
        assert f"hira: {said}" in refused.stderr
    assert versions(live) == before
    manifest.write_text("adapters:\n" + "\n".join(lines))

    broken.write_text(whole)
    tensors.write_bytes(bytes_whole)
    planned = command(live, "apply", str(manifest), "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "6 changes, 0 unchanged; nothing applied" in planned.stdout
    assert versions(live) == before
    applied = command(live, "apply", str(manifest), cwd=tmp_path)
    assert "6 changes applied, 0 unchanged" in applied.stdout
    after = versions(live)
    assert {name for name in after if name not in before} == {f"m{place}" for place in range(6)}
    assert after["m0"][1]
    answer = live.client.post("/predict?adapter=m1", json={"inputs": "fine"})
    assert {one["label"] for one in answer.json()} == {"A", "B"}
    again = command(live, "apply", str(manifest), cwd=tmp_path)
    assert "no change: 6 adapters are as they shall be" in again.stdout
    assert versions(live) == after

    # One name moves, one pin goes, one name goes.
    shutil.rmtree(tmp_path / "m5")
    make_adapter(tmp_path / "m5", seed=77, labels=("A", "B"), rank=8)
    named = [*lines[:1], *lines[2:], *(f"  {name}: {{source: '{source}', remote: true}}"
             for name, source in demo_sources(live, before))]  # fmt: skip
    text = "adapters:\n" + "\n".join(named).replace("pinned: true", "pinned: false")
    manifest.write_text(text + "\nprune: true\n")
    moved = command(live, "apply", str(manifest), cwd=tmp_path)
    assert moved.returncode == 1  # the demo's folders are below no source root
    assert "source_forbidden" in moved.stderr
    assert versions(live) == after
    manifest.write_text(f"adapters:\n{lines[5]}\n  m0: {{source: m0, pinned: false}}\n")
    moved = command(live, "apply", str(manifest), cwd=tmp_path)
    assert moved.returncode == 0, moved.stderr
    assert "~ m5  replaced" in moved.stdout
    assert "ranks: [4, 4] -> [8, 8]" in moved.stdout
    assert "v m0  unpinned" in moved.stdout

    # Aliases move with the names, or not at all.
    only = f"adapters:\n{lines[1]}\n"
    manifest.write_text(f"{only}aliases: {{prod: m1, itself: itself, chained: prod}}\n")
    refused = command(live, "apply", str(manifest), cwd=tmp_path)
    assert refused.returncode == 1
    assert "hira: alias_to_itself: " in refused.stderr
    assert "hira: alias_of_alias: " in refused.stderr
    manifest.write_text(f"{only}aliases: {{prod: m1}}\n")
    applied = command(live, "apply", str(manifest), cwd=tmp_path)
    assert "+ prod  alias created  m1" in applied.stdout
    assert "1 changes applied, 1 unchanged" in applied.stdout
    assert "no change" in command(live, "apply", str(manifest), cwd=tmp_path).stdout
    manifest.write_text(only)
    assert "no change" in command(live, "apply", str(manifest), cwd=tmp_path).stdout
    assert live.client.get("/v1/models/prod").json()["alias_of"] == "m1"
    manifest.write_text(f"{only}aliases: {{}}\n")
    without = command(live, "apply", str(manifest), cwd=tmp_path)
    assert "- prod  alias removed  m1" in without.stdout


def demo_sources(live: Live, names: dict[str, tuple[str, bool]]) -> list[tuple[str, str]]:
    rows = live.client.get("/admin/adapters", headers=live.admin).json()["adapters"]
    return [(one["name"], one["source"]) for one in rows if one["name"] in names]


def test_folders_are_registered_together_under_their_own_names(live: Live, tmp_path: Path) -> None:
    for place in range(3):
        make_adapter(tmp_path / "runs" / f"r{place}", seed=100 + place, labels=("A", "B"))
    (tmp_path / "runs" / "notes.txt").write_text("no adapter")
    paths = sorted(str(one.relative_to(tmp_path)) for one in (tmp_path / "runs").iterdir())
    added = command(live, "adapters", "add", *paths, cwd=tmp_path)
    assert added.returncode == 0, added.stderr
    assert "left out, no adapters: runs/notes.txt" in added.stderr
    assert "3 changes applied" in added.stdout
    shutil.rmtree(tmp_path / "runs" / "r1")
    make_adapter(tmp_path / "runs" / "r1", seed=9, labels=("A", "B"))
    refused = command(live, "adapters", "add", *paths, cwd=tmp_path)
    assert refused.returncode == 1
    assert "1 names are on another version" in refused.stderr


def test_applying_refuses_what_nobody_can_serve(live: Live) -> None:
    def apply(**body: object) -> httpx2.Response:
        return live.client.post("/admin/apply", json=body, headers=live.admin)

    known = versions(live)
    version = known["hira-imdb"][0]
    wrong = apply(
        adapters=[
            {"name": "new", "version": "0" * 32},
            {"name": "Bad Name", "version": version},
            {"name": "base", "version": version},
            {"name": "fine", "version": version},
        ],
        remove=["nobody"],
    )
    assert wrong.status_code == 404
    told = [(one["code"], one["field"]) for one in wrong.json()["problems"]]
    assert told == [
        ("adapter_not_found", "adapters.0"),
        ("invalid_name", "adapters.1"),
        ("invalid_name", "adapters.2"),
        ("adapter_not_found", "remove"),
    ]
    twice = apply(adapters=[{"name": "a", "version": version}], remove=["a"])
    assert twice.json()["detail"] == "The name is there twice."
    assert live.client.post("/admin/apply", json={}).status_code == 401
    assert versions(live) == known
    assert apply(adapters=[{"name": "twin", "version": version}]).json()["applied"] is True
    assert apply(remove=["twin"]).json()["changes"][0]["change"] == "removed"
    assert versions(live) == known


def test_status_train_and_embed_speak_to_a_terminal_and_to_programs(
    live: Live, tmp_path: Path
) -> None:
    shown = command(live, "status", "--once", "--every", "0.2", cwd=tmp_path)
    assert shown.stdout.startswith("state\tready\n"), shown.stderr
    assert "hira-imdb\ttext-classification\t" in shown.stdout
    told = json.loads(command(live, "status", "--json", cwd=tmp_path).stdout)
    assert told["status"] == "ready"
    assert told["metrics"]["hira_base_bytes linear"] > 0
    vectors = command(live, "embed", "a", "b", cwd=tmp_path).stdout.splitlines()
    assert [len(json.loads(one)) for one in vectors] == [256, 256]
