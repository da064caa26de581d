"""What is installed: the files of a wheel, the targets of make, one library for each purpose."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Asks setuptools what it would put into a wheel; builds nothing, and writes only below a folder.
LISTING = """
import sys
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration
given = Distribution({"script_name": "setup.py"})
made = apply_configuration(given, "pyproject.toml")
made.get_command_obj("egg_info").egg_base = sys.argv[1]
build = made.get_command_obj("build_py")
build.ensure_finalized()
build.build_lib = "wheel"
print(*build.get_outputs(include_bytecode=False), sep="\\n")
"""
# Only other projects' tools may want the older of two libraries for the same thing.
FORSAKEN = {"httpx": "httpx2"}


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[^\w.-]", one, maxsplit=1)[0].lower() for one in requirements]


def test_a_wheel_has_every_file_of_the_product_and_no_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LISTING, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    listed = {
        line.removeprefix("wheel/")
        for line in done.stdout.splitlines()
        if line.startswith("wheel/")
    }
    there = {
        path.relative_to(ROOT).as_posix()
        for top in ("adapters", "server")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert len(there) > 200
    assert listed == there


def test_a_dependency_is_named_once() -> None:
    every = names(PROJECT["dependencies"])
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra != "dev":
            every += names(requirements)
    twice = {one for one in every if every.count(one) > 1}
    assert not twice


def test_serving_needs_nothing_of_the_extras() -> None:
    """What `make serve` installs is what the package itself depends on."""
    served = set(names(PROJECT["dependencies"]))
    beyond = {"triton", "locust", "mypy", "schemathesis", "peft", "pytest", "ruff", "pip-audit"}
    assert not served & beyond
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^serve: \$\(SERVING\)$", recipe, flags=re.MULTILINE)
    assert re.search(r"^\$\(STAMP\): \$\(SERVING\)$", recipe, flags=re.MULTILINE)


@pytest.mark.parametrize("old", FORSAKEN)
def test_one_library_serves_one_purpose(old: str) -> None:
    pins = names((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert FORSAKEN[old] in pins
    assert old not in pins
    word = re.compile(rf"^\s*(?:import|from) {old}\b", flags=re.MULTILINE)
    tops = ("adapters", "server", "tests", "loadtests")
    users = [
        path.relative_to(ROOT).as_posix()
        for top in tops
        for path in (ROOT / top).rglob("*.py")
        if word.search(path.read_text(encoding="utf-8"))
    ]
    assert not users, f"import {FORSAKEN[old]}"
