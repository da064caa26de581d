"""`hira keys`: a key is shown once, its entry is one that the server takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.edge.admit.key_file import digest_of, parse_keys, read_key_file

runner = CliRunner()


def run(*arguments: str) -> tuple[int, str, str]:
    done = runner.invoke(app, ["keys", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_a_new_key_comes_with_its_entry() -> None:
    status, out, _ = run(
        *("new", "search", "--adapter", "imdb-*", "-a", "base", "--requests-per-minute", "60"),
        *("--tokens-per-day", "1000", "--expires", "30d"),
    )
    assert status == 0
    key = next(line for line in out.splitlines() if line.startswith("hira_"))
    entry = out[out.index("[search]") :]
    assert key not in entry
    found = parse_keys(entry.encode(), Path("x"))[digest_of(key.encode())]
    assert found.name == "search"
    assert found.adapters == ("imdb-*", "base")
    assert found.quotas.requests_per_minute == 60
    assert found.quotas.tokens_per_day == 1000
    assert found.expires is not None
    assert 29 < (found.expires - time.time()) / 86400 <= 30


def test_entries_are_put_into_a_file_and_the_rest_stays(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    status, out, _ = run("new", "ops", "--admin", "--file", str(file))
    assert status == 0
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("# ours\n" + file.read_text())
    assert run("new", "dotted.name", "--file", str(file))[0] == 0
    assert {one.name for one in read_key_file(file).values()} == {"ops", "dotted.name"}
    assert read_key_file(file)[digest_of(out.strip().encode())].admin
    assert file.read_text().startswith("# ours\n")
    before = file.read_text()
    status, out, err = run("new", "ops", "--file", str(file))
    assert status == 1
    assert "not TOML" in err
    assert "hira_" not in out
    assert file.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == ["keys.toml"]


def test_of_keys_made_at_once_none_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    command = "from server.cli.main import app; app()"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", command, "keys", "new", f"k{number}", "--file", str(file)],
            stdout=subprocess.DEVNULL,
        )
        for number in range(6)
    ]
    assert [one.wait(120) for one in children] == [0] * 6
    assert {one.name for one in read_key_file(file).values()} == {f"k{one}" for one in range(6)}
    assert [one.name for one in tmp_path.iterdir()] == ["keys.toml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_a_file_stays_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    assert run("new", "ops", "--admin", "--file", str(file))[0] == 0
    os.chown(file, 12345, 54321)
    file.chmod(0o640)
    assert run("new", "app", "--file", str(file))[0] == 0
    there = file.stat()
    assert (there.st_uid, there.st_gid, there.st_mode & 0o777) == (12345, 54321, 0o640)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("new", "no space"), "name of a key is not allowed"),
        (("new", "a", "--expires", "tomorrow"), "--expires is no moment"),
        (("new", "a", "--expires", "9999-12-31T23:00:00-14:00"), "--expires is no moment"),
        (("new", "a", "--admin", "--adapter", "x"), "leave adapters out"),
        (("new", "a", "--adapter", "Imdb"), "adapters.0"),
    ],
)
def test_a_mistake_makes_no_key(arguments: tuple[str, ...], said: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert said in err
    assert "hira_" not in out


def test_check_lists_the_keys_or_the_faults(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    digest = digest_of(b"x")
    file.write_text(f'[old]\nsha256 = "{digest}"\nexpires = 2020-01-01T00:00:00Z\n')
    status, out, _ = run("check", str(file))
    assert (status, out) == (0, "old\t*\t2020-01-01T00:00:00Z (expired)\n")
    file.write_text(f'[old]\nsha256 = "{digest}"\nexpires = 9999-12-31T23:00:00-14:00\n')
    status, _, err = run("check", str(file))
    assert (status, "outside of the years" in err) == (1, True)
    file.write_text('[old]\nkey = "clear"\n')
    status, _, err = run("check", str(file))
    assert status == 1
    assert "clear" in err


def test_usage_is_shown_with_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"requests_per_day": 10, "tokens_per_day": None}
    row = {"requests": 3, "prompt_tokens": 7, "generated_tokens": 0}
    told = {
        "keys": [{"name": "app", "limits": limits}],
        "days": [
            {"day": "2026-11-26", "key": "gone", **row},
            {"day": "2026-11-27", "key": "app", **row},
        ],
        "fault": None,
    }
    seen: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(200, json=told)

    original = httpx2.Client
    monkeypatch.setattr(
        httpx2, "Client", lambda **more: original(transport=httpx2.MockTransport(handle), **more)
    )
    status, out, _ = run("usage", "--days", "2", "--key", "k-1")
    assert status == 0
    assert str(seen[0].url).endswith("/admin/keys?days=2")
    assert [line.split("\t") for line in out.splitlines()[1:]] == [
        ["2026-11-26", "gone", "3", "-", "7", "0", "-"],
        ["2026-11-27", "app", "3", "10", "7", "0", "-"],
    ]
    told["fault"] = "keys.toml: not TOML"
    assert run("usage", "--key", "k-1")[0] == 1
