"""What a name was on, and back, over HTTP and by the command line, while it is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.demo import ADAPTERS_DIR
from server.edge.target import drawn_arm
from tests.stand.folders import change_config
from tests.stand.live import ROOT, Live, hira

pytestmark = pytest.mark.http

NAME = "hira-imdb"
HTTP_PROCESSES = 2  # what one acknowledges, the other obeys


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("versions") / "data"
    with hira(folder, dtype="fp32", api_processes=HTTP_PROCESSES) as server:
        yield server


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same adapter under configurations that make it other versions."""
    root = tmp_path_factory.mktemp("made")
    made = [shutil.copytree(ADAPTERS_DIR / NAME, root / str(one)) for one in range(3)]
    return [
        change_config(folder, base_model_name_or_path=f"x{one}") for one, folder in enumerate(made)
    ]


def call(live: Live, method: str, path: str, **arguments: Any) -> httpx2.Response:
    return live.client.request(method, f"/admin{path}", headers=live.admin, **arguments)


def put(live: Live, name: str, folder: Path, **fields: str) -> dict[str, Any]:
    """Upload an adapter; returns the record."""
    files = [("files", (one.name, one.read_bytes())) for one in folder.iterdir() if one.is_file()]
    data = {"name": name, "replace": "true", **fields}
    answer = call(live, "POST", "/adapters", data=data, files=files)
    assert answer.is_success, answer.text
    record: dict[str, Any] = answer.json()
    return record


def answering(live: Live, name: str) -> httpx2.Response:
    return live.client.post(f"/predict?adapter={name}", json={"inputs": "a film"})


def command(live: Live, *arguments: str) -> subprocess.CompletedProcess[str]:
    key = live.admin["Authorization"].removeprefix("Bearer ")
    code = "from server.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "adapters", *arguments, "--url", live.url, "--key", key],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        timeout=120,
        check=False,
    )


def test_a_name_goes_back_and_says_so(live: Live, folders: list[Path]) -> None:
    first = put(live, "moved", folders[0], pinned="true")["version"]
    second = put(live, "moved", folders[1])["version"]
    told = call(live, "GET", "/adapters/moved/versions").json()
    assert told["kept_versions"] == 3
    assert [
        (one["number"], one["version"], one["act"], one["current"], one["kept"])
        for one in told["versions"]
    ] == [(2, second, "replaced", True, True), (1, first, "registered", False, True)]
    answer = call(live, "POST", "/adapters/moved/rollback", json={})
    assert answer.status_code == 200, answer.text
    record = answer.json()
    assert (record["version"], record["before"], record["pinned"]) == (first, second, True)
    assert answering(live, "moved").headers["X-Adapter-Version"] == first
    newest = call(live, "GET", "/adapters/moved/versions").json()["versions"][0]
    assert (newest["act"], newest["restores"], newest["current"]) == ("rolled_back", 1, True)


def test_what_cannot_be_is_refused_by_name(live: Live, folders: list[Path]) -> None:
    one = put(live, "refused", folders[0])["version"]
    two = put(live, "refused", folders[1])["version"]

    def refused(name: str = "refused", **body: Any) -> tuple[int, str]:
        answer = call(live, "POST", f"/adapters/{name}/rollback", json=body)
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code, answer.json()["code"]

    assert refused("nobody") == (404, "adapter_not_found")
    assert refused(version="f" * 32) == (404, "version_not_found")
    assert refused(version=two) == (409, "already_current")
    assert refused(versions=two) == (422, "invalid_request")
    call(live, "DELETE", "/adapters/moved")  # it may be on the same content
    shutil.rmtree(live.folder / "store" / "versions" / one)
    assert refused() == (410, "version_gone")
    assert refused(version=one[:12]) == (410, "version_gone")
    told = call(live, "GET", "/adapters/refused/versions").json()["versions"]
    assert [entry["kept"] for entry in told] == [True, False]
    assert call(live, "GET", "/adapters/nobody/versions").status_code == 404
    assert live.client.get("/admin/adapters/refused/versions").status_code == 401
    assert answering(live, "refused").headers["X-Adapter-Version"] == two


def test_the_command_line_shows_and_rolls_back(live: Live, folders: list[Path]) -> None:
    one = put(live, "typed", folders[0])["version"]
    two = put(live, "typed", folders[1])["version"]
    shown = command(live, "history", "typed").stdout.splitlines()
    assert [line.split("\t")[0] for line in shown] == ["number", "2", "1"]
    assert f"{two} *" in shown[1]
    done = command(live, "rollback", "typed", one[:8])
    assert (done.returncode, done.stdout) == (0, f"typed is on {one}; it was on {two}\n")
    wrong = command(live, "rollback", "typed", "ffffff")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("hira: version_not_found: ")
    told = json.loads(command(live, "history", "typed", "--json").stdout)
    assert told["versions"][0]["restores"] == 1


def test_no_request_after_the_acknowledgement_is_answered_by_what_was_left(
    live: Live, folders: list[Path]
) -> None:
    versions = [put(live, "busy", folder)["version"] for folder in folders]
    acknowledged = [(0.0, versions[-1])]  # when, and by which version from then on
    wrong: list[str] = []
    ended = threading.Event()
    asked = [0] * 4

    def ask(number: int) -> None:
        with httpx2.Client(base_url=live.url, timeout=60) as client:
            while not ended.is_set():
                sent = time.monotonic()
                answer = client.post("/predict?adapter=busy", json={"inputs": "a film"})
                allowed = {version for at, version in acknowledged if at >= sent}
                allowed.add([version for at, version in acknowledged if at < sent][-1])
                if answer.headers["X-Adapter-Version"] not in allowed | {pending[0]}:
                    wrong.append(answer.headers["X-Adapter-Version"])
                asked[number] += 1

    pending = [versions[-1]]  # one may answer from when its move is asked for
    threads = [threading.Thread(target=ask, args=(one,)) for one in range(4)]
    for one in threads:
        one.start()
    turn = 0
    while turn < 12 or sum(asked) <= 20:  # on a busy machine the first answers take their time
        assert turn < 200
        pending[0] = versions[turn % 2]
        answer = call(live, "POST", "/adapters/busy/rollback", json={"version": pending[0]})
        assert answer.is_success, answer.text
        acknowledged.append((time.monotonic(), pending[0]))
        time.sleep(0.1)
        turn += 1
    ended.set()
    for one in threads:
        one.join()
    assert wrong == []


def test_an_alias_is_asked_listed_and_refused(live: Live) -> None:
    put_alias = {"json": {"adapter": NAME}}
    made = call(live, "PUT", "/aliases/production", **put_alias)
    assert made.json() == {"alias": "production", "adapter": NAME, "before": None}
    answer = answering(live, "production")
    assert answer.headers["X-Adapter"] == NAME
    assert answer.headers["X-Adapter-Alias"] == "production"
    by_alias, by_name = (
        {one["label"]: one["score"] for one in told.json()}
        for told in (answer, answering(live, NAME))
    )
    assert by_alias == pytest.approx(by_name, abs=1e-4)  # another strategy may have computed it
    assert "X-Adapter-Alias" not in answering(live, NAME).headers
    models = {one["id"]: one for one in live.client.get("/v1/models").json()["data"]}
    assert models["production"]["alias_of"] == NAME
    assert models[NAME]["alias_of"] is None
    assert live.client.get("/v1/models/production").json() == models["production"]
    assert call(live, "GET", f"/adapters/{NAME}").json()["aliases"] == ["production"]

    def refused(method: str, path: str, **arguments: Any) -> tuple[int, str]:
        answer = call(live, method, path, **arguments)
        return answer.status_code, answer.json()["code"]

    assert refused("PUT", f"/aliases/{NAME}", **put_alias) == (422, "alias_to_itself")
    chain = {"json": {"adapter": "production"}}
    assert refused("PUT", "/aliases/further", **chain) == (422, "alias_of_alias")
    assert refused("PUT", "/aliases/hira-sst2", **put_alias) == (409, "adapter_exists")
    assert refused("PUT", "/aliases/base", **put_alias) == (422, "invalid_name")
    assert refused("DELETE", f"/adapters/{NAME}") == (409, "adapter_aliased")
    assert refused("DELETE", "/aliases/nobody") == (404, "adapter_not_found")
    moved = command(live, "alias", "production", "hira-sst2")
    assert moved.stdout == f"production points to hira-sst2; it pointed to {NAME}\n"
    assert answering(live, "production").headers["X-Adapter"] == "hira-sst2"
    assert command(live, "alias").stdout == "alias\tadapter\nproduction\thira-sst2\n"
    assert command(live, "alias", "production", "hira-sst2", "--remove").returncode == 2
    assert command(live, "alias", "production", "--remove").returncode == 0
    assert answering(live, "production").status_code == 404


def test_a_canary_answers_its_share_and_says_so(live: Live, folders: list[Path]) -> None:
    stable = put(live, "tried", folders[0])["version"]
    begun = command(live, "canary", "tried", str(folders[1]), "--share", "30", "--json")
    assert begun.returncode == 0, begun.stderr
    canary = json.loads(begun.stdout)["canary"]
    versions = {"stable": stable, "canary": canary["version"]}
    assert (canary["share"], canary["served"]) == (30.0, True)
    arms: list[str] = []
    for turn in range(60):
        answer = live.client.post(
            "/predict?adapter=tried", json={"inputs": "x"}, headers={"X-Request-Id": f"r{turn}"}
        )
        arms.append(answer.headers["X-Adapter-Arm"])
        assert answer.headers["X-Adapter-Version"] == versions[arms[-1]]
        assert arms[-1] == drawn_arm("tried", canary["version"], 30, f"request r{turn}")
    assert set(arms) == {"stable", "canary"}
    for arm in set(arms):
        line = f'hira_canary_requests_total{{adapter="tried",arm="{arm}",status="200"}}'
        assert live.metric(line) == arms.count(arm)
    for user in ("ann", "bob", "eve", "joe", "sue"):
        body = {"model": "tried", "input": "x", "user": user}
        answers = [live.client.post("/v1/embeddings", json=body) for _ in range(3)]
        drawn = {one.headers["X-Adapter-Arm"] for one in answers}
        assert drawn == {drawn_arm("tried", canary["version"], 30, f"user {user}")}
        assert "X-Ignored-Fields" not in answers[0].headers
    plain = {"model": "hira-sst2", "input": "x", "user": "ann"}
    named = live.client.post("/v1/embeddings", json=plain).headers
    assert (named["X-Ignored-Fields"], "X-Adapter-Arm" in named) == ("user", False)
    for share in (100.5, -1):
        answer = call(live, "PUT", "/adapters/tried/canary", json={"share": share})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_share")
    assert "30 % to" in command(live, "list", "--prefix", "tried").stdout
    promoted = call(live, "POST", "/adapters/tried/canary/promote").json()
    assert (promoted["version"], promoted["before"]) == (versions["canary"], stable)
    answer = answering(live, "tried")
    assert answer.headers["X-Adapter-Version"] == versions["canary"]
    assert "X-Adapter-Arm" not in answer.headers
    again = call(live, "PUT", "/adapters/tried/canary", json={"version": stable, "share": 100})
    assert again.is_success, again.text
    assert answering(live, "tried").headers["X-Adapter-Version"] == stable
    assert command(live, "canary", "tried", "--abort").returncode == 0
    assert answering(live, "tried").headers["X-Adapter-Version"] == versions["canary"]
    gone = call(live, "DELETE", "/adapters/tried/canary")
    assert (gone.status_code, gone.json()["code"]) == (404, "canary_not_found")
    assert command(live, "canary", "tried", "--abort", "--promote").returncode == 2


def test_a_canary_of_another_task_is_refused(live: Live) -> None:
    record = put(live, "teller", ADAPTERS_DIR / "hira-wiki", stage="true")
    body = {"version": record["version"], "share": 10}
    answer = call(live, "PUT", f"/adapters/{NAME}/canary", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "task_mismatch")


def test_what_has_lost_its_bytes_says_so_where_it_is_listed(
    live: Live, folders: list[Path], tmp_path: Path
) -> None:
    # Versions that no other test asks for: what a worker has loaded goes on without its bytes.
    made = [
        change_config(shutil.copytree(folders[0], tmp_path / one), base_model_name_or_path=one)
        for one in ("kept", "canary", "lost")
    ]
    put(live, "losing", made[0])
    staged = put(live, "losing", made[1], stage="true")["version"]
    lost = put(live, "lost", made[2])["version"]
    body = {"version": staged, "share": 0}
    assert call(live, "PUT", "/adapters/losing/canary", json=body).is_success
    store = live.folder / "store" / "versions"
    for version in (staged, lost):
        shutil.rmtree(store / version)
    (shown,) = call(live, "GET", "/adapters?prefix=losing").json()["adapters"]
    assert shown["residency"] == "disk"
    assert shown["canary"]["residency"] in {"lost", "host", "device"}
    assert call(live, "GET", "/adapters/lost").json()["residency"] == "lost"
