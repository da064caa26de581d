"""The walls of the house: who may import whom, and how long a file may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("adapters", "server", "loadtests")
MAX_LINES = 600

# Libraries that may only be imported in one place, or under one folder.
CONFINED = {
    "triton": ("adapters/kernels/triton_ops.py",),
    "litserve": ("server/edge/",),
    "fastapi": ("server/edge/",),
    "starlette": ("server/edge/",),
    "uvicorn": ("server/edge/",),
    "locust": ("loadtests/",),
    "peft": ("server/demo/", "server/recipe/", "loadtests/bench/"),
    "sqlalchemy": ("adapters/",),
    "typer": ("server/cli",),
}
# Modules that must load without torch: they run where memory or start-up time is short.
TORCH_FREE = (
    "adapters/errors.py",
    "adapters/segments.py",
    "server/messages.py",
    "server/options.py",
    "server/scheduler.py",
    "server/settings.py",
    "server/schemas.py",
    "server/errors.py",
)


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_load: bool = False) -> Iterator[str]:
    """Full names of what a file imports; with ``at_load`` only what runs when it is imported."""
    for node in nodes(ast.parse(path.read_text()), at_load=at_load):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def nodes(tree: ast.AST, *, at_load: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        yield from nodes(node, at_load=at_load)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        allowed = CONFINED.get(name.split(".")[0])
        assert allowed is None or place.startswith(allowed), f"{place} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_packages_look_one_way(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        top = name.split(".")[0]
        if place.startswith("adapters/"):
            assert top not in {"server", "loadtests"}, f"{place} imports {name}"
        if place.startswith("server/"):
            assert top != "loadtests", f"{place} imports {name}"
            if name.startswith("server.edge"):
                assert place.startswith(("server/edge/", "server/cli")), f"{place} imports {name}"
        if place.startswith("loadtests/") and not place.startswith("loadtests/bench/"):
            assert top not in {"server", "adapters"}, f"{place} imports {name}"


@pytest.mark.parametrize("place", TORCH_FREE)
def test_torch_is_not_reached(place: str) -> None:
    seen: set[str] = set()
    waiting = [ROOT / place]
    while waiting:
        path = waiting.pop()
        for name in imports(path, at_load=True):
            assert name.split(".")[0] not in {"torch", "transformers", "safetensors"}, (
                f"{place} reaches {name} through {path.relative_to(ROOT)}"
            )
            module = module_file(name)
            if module is not None and name not in seen:
                seen.add(name)
                waiting.append(module)


def module_file(name: str) -> Path | None:
    if name.split(".", maxsplit=1)[0] not in PACKAGES:
        return None
    base = ROOT.joinpath(*name.split("."))
    found = [path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()]
    return found[0] if found else None


def test_imports_have_no_cycle() -> None:
    edges = {
        name_of(path): sorted(
            {name_of(found) for name in imports(path) if (found := module_file(name)) is not None}
            - {name_of(path)}
        )
        for path in sources()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in edges.get(name, []):
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_names_say_what_they_do(path: Path) -> None:
    banned = {"manager", "utils", "helper", "helpers", "data", "info", "process"}
    assert not banned & set(path.stem.split("_")), f"{path}: a banned word in a module name"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not node.name.lower().endswith(("manager", "utils", "helper", "data", "info"))
