"""The command line: quick, clear when it is misused, and true to the settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from adapters.registry.faults import RegistryUnusable, database_faults
from adapters.registry.registry import Registry
from adapters.registry.store import Store, version_of
from adapters.registry.tables import SchemaTooNew
from server.cli.main import app
from server.settings import Settings
from tests.stand.live import ROOT, environment, free_port
from tests.stand.made import make_adapter

runner = CliRunner()


def hira(*arguments: str, cwd: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from server.cli.main import main; main()", *arguments],
        cwd=cwd,
        env=environment(cwd / "data", **settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def plain(text: str) -> str:
    """Without the colours and the frames of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[httpx2.Request]]:
    """Replace the network: answers by ``METHOD path``; returns the requests that were made."""

    def install(answers: dict[str, Any]) -> list[httpx2.Request]:
        seen: list[httpx2.Request] = []

        def handle(request: httpx2.Request) -> httpx2.Response:
            request.read()
            seen.append(request)
            answer = answers[f"{request.method} {request.url.path}"]
            if isinstance(answer, httpx2.Response):
                return answer
            return httpx2.Response(200, json=answer)

        original = httpx2.Client

        def client(**arguments: Any) -> httpx2.Client:
            return original(transport=httpx2.MockTransport(handle), **arguments)

        monkeypatch.setattr(httpx2, "Client", client)
        return seen

    return install


def test_help_needs_no_torch_and_no_server(tmp_path: Path) -> None:
    code = (
        "import sys; from server.cli.main import app\n"
        "heavy = {'torch', 'transformers', 'litserve', 'fastapi'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), check=True
    )
    assert hira("--help", cwd=tmp_path).returncode == 0


def test_every_setting_but_keys_is_a_flag() -> None:
    shown = plain(runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output)
    for name in Settings.model_fields:
        flag = f"--{name.replace('_', '-')}"
        if name in {"admin_key", "api_keys"}:
            assert flag not in shown
        else:
            assert flag in shown


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        (["--port", "80"], {}, ["hira: --port: LitServe listens", "  found     '80'"]),
        (["--quantization", "nf5"], {}, ["hira: --quantization: ", "  found     'nf5'"]),
        (
            [],
            {"slotz": 3},
            ["hira: HIRA_SLOTZ: no such", "  fix       did you mean slots?"],
        ),
        (["--config", "missing.toml"], {}, ["hira: missing.toml: cannot be read"]),
        (
            ["--source-root", "/a", "--source-root", "/b", "--port", "x"],
            {},
            ["hira: --port", "  f"],
        ),
        (["--prot", "1"], {}, ["hira: no such option", "  fix       did you mean --port?"]),
    ],
)
def test_misuse_of_serve_is_told_with_its_fix_and_status_2(
    arguments: list[str], settings: dict[str, object], said: list[str], tmp_path: Path
) -> None:
    done = hira("serve", *arguments, cwd=tmp_path, **settings)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == len(said)
    assert all(line.startswith(one) for line, one in zip(lines, said, strict=True))


def test_a_start_speaks_at_once_and_tells_every_mistake_before_torch_is_loaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = (
            "import sys\nfrom server.cli.main import main\n"
            "try:\n    main()\n"
            "finally:\n    print('heavy', {'torch', 'fastapi', 'sqlalchemy'} & set(sys.modules))"
        )
        arguments = [
            *("serve", "--port", str(port), "--base", "./modell", "--device", "cuda"),
            *("--chat-template", "no.jinja", "--adapter", "a=half", "--adapter", "b=nowhere"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env={**environment(tmp_path / "file" / "data"), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].endswith(" starts")
    assert done.stdout.splitlines()[-1] == "heavy set()"
    told = [line for line in done.stderr.splitlines() if line.startswith("hira: ")]
    assert told == [
        f"hira: data_dir {tmp_path / 'file' / 'data'} cannot be used",
        f"hira: port {port} on 127.0.0.1 cannot be used",
        "hira: the base model's folder does not exist",
        "hira: the file of the chat template is not there",
        "hira: there is no CUDA device",
        "hira: adapter a: its folder holds no adapter_config.json",
        "hira: adapter b: its folder does not exist",
    ]
    assert "  fix       did you mean model?" in done.stderr


def test_port_in_use_is_told_with_its_fix_and_status_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = hira("serve", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"hira: port {port} on 127.0.0.1 cannot be used",
        "  found     Address already in use",
        "  expected  a port that nobody listens on",
        "  fix       choose another with --port, or stop the other server",
    ]


def test_base_that_is_not_there_is_told_with_its_path(tmp_path: Path) -> None:
    done = hira("serve", "--base", str(tmp_path / "nowhere"), cwd=tmp_path, port=18765)
    assert done.returncode == 1
    assert done.stderr.startswith("hira: the base model's folder does not exist\n")
    assert "nowhere" in done.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://me:hunter2@host/db", "nonsense://me:***@host/db cannot be used: "),
        ("nonsense://host/db?password=hunter2", "nonsense://host/db cannot be used: "),
        ("://hunter2", "registry_url is not a URL"),
        ("sqlite:///broken.sqlite", "sqlite:///broken.sqlite cannot be used: "),
    ],
)
def test_registry_that_cannot_be_used_is_told_without_its_password(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(RegistryUnusable) as caught, database_faults(url):
        Registry(url, Store(tmp_path / "store")).check()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_start_without_a_usable_registry_ends_with_one_line(tmp_path: Path) -> None:
    url, said = "nonsense://me:hunter2@host/db", "nonsense://me:***@host/db cannot be used: "
    done = hira("serve", cwd=tmp_path, port=free_port(), registry_url=url)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert said in line
    assert "hunter2" not in done.stderr + done.stdout


def test_registry_of_a_later_release_is_one_line() -> None:
    with (
        pytest.raises(RegistryUnusable, match=r"d\.sqlite cannot be used: schema 9"),
        database_faults("d.sqlite"),
    ):
        raise SchemaTooNew("schema 9")


def test_database_that_tells_its_password_is_not_quoted() -> None:
    url = "postgresql://me:p%40ss@host/db"
    with pytest.raises(RegistryUnusable) as caught, database_faults(url):
        raise sa.exc.OperationalError("select", {}, Exception(f"no host in {url} for p@ss"))
    assert "ss@" not in str(caught.value).replace("***@", "")
    assert "p@ss" not in str(caught.value)
    assert "p%40ss" not in str(caught.value)


def test_data_folder_in_use_is_one_line(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = hira("serve", cwd=tmp_path, port=18766)
    assert done.returncode == 1
    assert "in use by another server" in done.stderr


def test_adapters_list_reads_every_page(answering: Any) -> None:
    row = {
        "name": "imdb",
        "method": "hira",
        "task": "text-classification",
        "ranks": [4, 8],
        "bytes": 1 << 20,
        "residency": "device",
        "pinned": True,
        "requests": 3,
    }
    seen = answering({"GET /admin/adapters": {"adapters": [row], "total": 2}})
    done = runner.invoke(app, ["adapters", "list", "--key", "k", "--prefix", "im"])
    assert done.exit_code == 0
    assert [request.url.params["offset"] for request in seen] == ["0", "1"]
    assert seen[0].headers["Authorization"] == "Bearer k"
    cells = done.output.splitlines()[1].split("\t")
    assert cells == [
        "imdb",
        "hira",
        "text-classification",
        "4 to 8",
        "1.00 MiB",
        "device",
        "yes",
        "3",
    ]
    done = runner.invoke(app, ["adapters", "list", "--json"])
    assert [one["name"] for one in json.loads(done.output)] == ["imdb", "imdb"]


def test_adapters_add_streams_files_as_a_form(answering: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(os.urandom(300_000))
    (tmp_path / "optimizer.pt").write_bytes(b"not sent")
    seen = answering({"POST /admin/adapters": {"name": "mine"}})
    done = runner.invoke(app, ["adapters", "add", "mine", str(tmp_path), "--pinned"])
    assert done.exit_code == 0, done.output
    body = seen[0].content
    assert int(seen[0].headers["Content-Length"]) == len(body)
    assert b'name="pinned"\r\n\r\ntrue\r\n' in body
    assert (tmp_path / "adapter_model.safetensors").read_bytes() in body
    assert b"optimizer.pt" not in body


def test_adapters_add_remote_sends_the_source(answering: Any) -> None:
    seen = answering({"POST /admin/adapters": {"name": "mine"}})
    runner.invoke(app, ["adapters", "add", "mine", "hf://org/mine", "--remote", "--replace"])
    assert json.loads(seen[0].content) == {
        "name": "mine",
        "source": "hf://org/mine",
        "replace": True,
        "pinned": False,
        "preload": False,
    }


def written_with_a_fault(folder: Path) -> Path:
    """A manifest of one adapter that is not there and two folders that are."""
    for place in range(2):
        make_adapter(folder / f"m{place}", seed=place)
    manifest = folder / "adapters.yaml"
    manifest.write_text("adapters: {m0: m0, m1: m1, m9: nowhere}")
    return manifest


def test_of_a_manifest_with_a_fault_only_what_is_new_is_sent(
    answering: Any, tmp_path: Path
) -> None:
    manifest = written_with_a_fault(tmp_path)
    known = {"name": "m0", "version": version_of(tmp_path / "m0")}
    seen = answering(
        {
            "GET /admin/adapters": {"adapters": [known], "total": 1},
            "POST /admin/adapters": {"name": "m1", "version": "1"},
        }
    )
    done = runner.invoke(app, ["apply", str(manifest), "--key", "k"])
    assert done.exit_code == 2
    assert [request.method for request in seen] == ["GET", "POST"]
    assert b"m1" in seen[1].content


def test_a_wrong_key_is_told_once_beside_the_faults_of_a_manifest(
    answering: Any, tmp_path: Path
) -> None:
    manifest = written_with_a_fault(tmp_path)
    refusal = httpx2.Response(401, json={"code": "unauthorized", "detail": "No such key."})
    seen = answering({"GET /admin/adapters": refusal, "POST /admin/adapters": refusal})
    done = runner.invoke(app, ["apply", str(manifest), "--key", "wrong"])
    assert done.exit_code == 2
    assert len(seen) == 1
    assert done.stderr.count("No such key.") == 1
    assert "m9: " in done.stderr
    assert "nothing was applied" in done.stderr


def test_adapters_remove_and_pin(answering: Any) -> None:
    seen = answering(
        {
            "DELETE /admin/adapters/mine": httpx2.Response(204),
            "PATCH /admin/adapters/mine": {"name": "mine", "pinned": False},
        }
    )
    assert runner.invoke(app, ["adapters", "remove", "mine"]).exit_code == 0
    assert runner.invoke(app, ["adapters", "pin", "mine", "--off"]).exit_code == 0
    assert json.loads(seen[1].content) == {"pinned": False}


def test_errors_of_the_server_are_shown_with_their_fix(answering: Any) -> None:
    problem = {"code": "shape_mismatch", "detail": "q_proj does not fit.", "fix": "Train it anew."}
    answering({"POST /predict": httpx2.Response(422, json={**problem, "problems": [problem] * 2})})
    done = runner.invoke(app, ["predict", "text", "--adapter", "imdb"])
    assert done.exit_code == 1
    assert done.stderr.count("hira: shape_mismatch: q_proj does not fit.") == 2
    assert "Train it anew." in done.stderr


def test_predict_prints_labels(answering: Any) -> None:
    answering({"POST /predict": [[{"label": "POSITIVE", "score": 0.9}]]})
    done = runner.invoke(app, ["predict", "good", "-a", "imdb"])
    assert done.output.splitlines() == ["good", "  0.9000  POSITIVE"]


def test_generate_prints_words_as_they_come(answering: Any) -> None:
    events = [
        {"token": {"text": " a", "special": False}},
        {"token": {"text": " b", "special": False}, "generated_text": " a b"},
        {"token": {"text": "</s>", "special": True}, "generated_text": " a b"},
    ]
    body = "".join(f"data:{json.dumps(one)}\n\n" for one in events)
    answering({"POST /generate_stream": httpx2.Response(200, text=body)})
    assert runner.invoke(app, ["generate", "x"]).output == " a b\n"


def test_inspect_believes_the_tensors(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "mood", seed=1, labels=("BAD", "GOOD"), rank=4)
    fine = runner.invoke(app, ["inspect", str(folder)])
    assert fine.exit_code == 0, fine.output
    assert "rank by target\tq_proj 4, v_proj 4" in fine.output
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    wrong = runner.invoke(app, ["inspect", str(folder), "--json"])
    assert wrong.exit_code == 1
    (finding,) = [
        one for one in json.loads(wrong.output)["findings"] if one["severity"] == "contradiction"
    ]
    assert (finding["subject"], finding["proof"]) == ("rank", "r = 4")


def test_inspect_reads_archives_and_says_what_it_cannot_read(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "mood", seed=1, labels=("BAD", "GOOD"))
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    assert runner.invoke(app, ["inspect", packed]).exit_code == 0
    (tmp_path / "broken.zip").write_bytes(b"PK no archive")
    broken = runner.invoke(app, ["inspect", str(tmp_path / "broken.zip")])
    assert broken.exit_code == 1
    assert broken.stderr.startswith("hira: corrupt_file: ")
    assert "neither" in runner.invoke(app, ["inspect", str(tmp_path / "nowhere")]).stderr


def test_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = hira("predict", "x", "--url", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("hira: no server answers at http://127.0.0.1:9")


def test_names_are_written_as_one_part_of_a_path(answering: Any) -> None:
    seen = answering({"DELETE /admin/adapters/a/b?c": httpx2.Response(204)})
    assert runner.invoke(app, ["adapters", "remove", "a/b?c"]).exit_code == 0
    assert seen[0].url.raw_path == b"/admin/adapters/a%2Fb%3Fc"


def test_version_is_an_option_and_a_command() -> None:
    shown = runner.invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.output == runner.invoke(app, ["version"]).output != ""


def test_module_runs_from_the_source_folder() -> None:
    command = [sys.executable, "-m", "server.cli", "version"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip()
