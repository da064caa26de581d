"""The script `hira` where another distribution has a package of one of our names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.cli.entry import PACKAGE_MARK, PACKAGES
from tests.stand.live import ROOT, environment


def started(*places: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`hira --version` with these folders as where packages are looked for."""
    settings = environment(cwd / "data")
    settings["PYTHONPATH"] = ":".join(map(str, places))
    return subprocess.run(
        [sys.executable, "-c", "from server.cli.entry import main; main()", "--version"],
        cwd=cwd,
        env=settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def installed(place: Path, package: str, distribution: str) -> Path:
    """A distribution of a stranger, as pip lays it out."""
    (place / package).mkdir(parents=True)
    (place / package / "__init__.py").write_text('"""Something else."""\nraise SystemExit(7)\n')
    about = place / f"{distribution}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (about / "top_level.txt").write_text(f"{package}\n")
    return place


@pytest.mark.parametrize("distribution", ["adapters", "something-else"])
def test_another_distribution_before_ours_is_told_and_not_run(
    distribution: str, tmp_path: Path
) -> None:
    place = installed(tmp_path / "site", "adapters", distribution)
    done = started(place, ROOT, cwd=tmp_path)
    assert done.returncode == 1
    first, *parts = done.stderr.splitlines()
    assert first == "hira: another package stands in the place of hira-server's `adapters`"
    assert f"{place / 'adapters' / '__init__.py'}, of {distribution}" in parts[0]
    assert [part.split()[0] for part in parts] == ["found", "expected", "fix"]


def test_ours_before_another_distribution_starts(tmp_path: Path) -> None:
    done = started(ROOT, installed(tmp_path / "site", "adapters", "adapters"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_folder_without_a_package_is_told(tmp_path: Path) -> None:
    (tmp_path / "site" / "server").mkdir(parents=True)
    (tmp_path / "site" / "server" / "__init__.py").write_text("")
    (tmp_path / "site" / "server" / "cli").symlink_to(ROOT / "server" / "cli")
    done = started(tmp_path / "site", ROOT, cwd=tmp_path)
    assert done.returncode == 1
    assert "hira-server's `server`" in done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_our_packages_say_whose_they_are(package: str) -> None:
    assert PACKAGE_MARK in (ROOT / package / "__init__.py").read_text().splitlines()[0]
