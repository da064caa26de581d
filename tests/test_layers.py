"""The walls of the house: who may import whom.

`MAY_IMPORT` is the whole plan, one direction only. Imports under TYPE_CHECKING count as any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("adapters", "server", "loadtests")
# Each place and the places that it may import from besides itself; a module of a root by its name.
ADAPTERS = {
    "adapters.errors": (),
    "adapters.tasks": (),
    "adapters.signature": ("errors",),
    "adapters.segments": ("errors",),
    "adapters.factors": ("signature",),
    "adapters.kernels": ("errors", "segments"),
    "adapters.intake": ("errors", "signature", "factors", "tasks"),
    "adapters.registry": ("errors", "signature", "intake"),
    "adapters.inspection": ("errors", "signature", "tasks", "intake"),
    "adapters.modulation": ("errors", "signature", "factors", "segments", "kernels"),
    "adapters.layers": ("errors", "signature", "segments", "kernels", "modulation"),
    "adapters.residency": ("errors", "factors", "intake", "modulation", "layers"),
}
SERVER = {
    "server.version": (),
    "server.stages": (),
    "server.messages": (),
    "server.options": (),
    "server.errors": ("messages",),
    "server.settings": ("options",),
    "server.metrics": (),
    "server.base": ("options", "stages"),
    "server.inputs": ("messages", "options", "base"),
    "server.failures": ("messages", "inputs"),
    "server.encoding": ("messages", "options", "stages", "base", "inputs", "failures"),
    "server.generation": ("messages", "options", "stages", "base", "inputs", "failures"),
    "server.engine": (
        *("messages", "options", "stages", "base", "inputs", "failures", "encoding"),
        "generation",
    ),
    "server.edge": (
        *("version", "messages", "options", "errors", "settings", "metrics", "base", "inputs"),
        *("stages", "demo"),
    ),
    "server.cluster": (
        *("version", "messages", "options", "errors", "settings", "metrics", "edge"),
    ),
    "server.comparison": (
        *("messages", "options", "stages", "base", "inputs", "encoding", "engine"),
    ),
    "server.cli": (
        *("version", "stages", "options", "settings", "base", "edge", "cluster", "training"),
        *("comparison", "demo", "inputs"),
    ),
    "server.demo": (),
    "server.training": ("base", "options", "inputs", "demo"),
}
EDGE = {
    "server.edge.target": (),
    "server.edge.admit": (),
    "server.edge.link": ("admit",),
    "server.edge.templates": ("admit",),
    "server.edge.grammars": ("admit",),
    "server.edge.tracing": ("admit",),
    "server.edge.service": ("target", "admit", "grammars", "link", "templates", "tracing"),
    "server.edge.endpoints": ("target", "admit", "link", "service", "tracing"),
    "server.edge.litserve": ("target", "admit", "link", "service", "endpoints"),
    "server.edge.processes": ("target", "admit", "link", "service", "endpoints", "litserve"),
}
# Places of `adapters` that few may know of, and who they are.
ONLY_FOR = {
    "adapters.inspection": ("server.cli", "server.training", "server.edge.endpoints.admin"),
}
# The one module of the server that is simulated with, as it is.
SIMULATED = ("loadtests/cluster_sim/", "server.cluster.routing")
# Libraries that may only be imported in one place, or under one folder.
CONFINED = {
    "llguidance": ("server/inputs/grammar_engine.py",),
    "triton": (
        "adapters/kernels/triton_ops.py",
        "adapters/kernels/triton_scratch.py",
        "adapters/kernels/triton_one_row.py",
        "adapters/kernels/triton_expanded.py",
    ),
    "litserve": ("server/edge/litserve/",),
    "ray": ("server/cluster/",),
    "fastapi": ("server/edge/", "server/cluster/"),
    "starlette": ("server/edge/", "server/cluster/"),
    "uvicorn": ("server/edge/",),
    "locust": ("loadtests/",),
    "opentelemetry": ("server/edge/tracing.py",),
    "pythonjsonlogger": ("server/edge/litserve/logs.py",),
    "peft": ("server/training/", "loadtests/bench/"),
    "sqlalchemy": ("adapters/registry/",),
    "s3fs": ("adapters/registry/objects.py",),
    "typer": ("server/cli/",),
}
# Modules that must load without torch: they run where memory or start-up time is short.
TORCH_FREE = (
    "adapters/errors.py",
    "adapters/segments.py",
    "adapters/modulation/strategy.py",
    "server/messages.py",
    "server/options.py",
    "server/encoding/fair_batches.py",
    "server/settings.py",
    "server/edge/processes/preflight.py",
    "server/edge/endpoints/schemas.py",
    "server/edge/endpoints/schemas_admin.py",
    "server/errors.py",
    "server/cluster/routing.py",
)


@cache
def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path, *, at_load: bool = False) -> tuple[str, ...]:
    """Full names of what a file imports; with ``at_load`` only what runs when it is imported."""
    found: list[str] = []
    for node in nodes(tree_of(path), at_load=at_load):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found += (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    return tuple(found)


def nodes(tree: ast.AST, *, at_load: bool) -> Iterator[ast.AST]:
    waiting = list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if at_load and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def place_in(name: str, depth: int) -> str:
    """The room or package at a depth that a module belongs to: ``adapters.intake`` at 2."""
    return ".".join(name.split(".")[:depth])


def strays(path: Path, plan: dict[str, tuple[str, ...]], depth: int) -> Iterator[str]:
    """Imports within one top folder that its plan does not have."""
    top = next(iter(plan)).rpartition(".")[0]
    own = place_in(name_of(path), depth)
    for name in {target for one in imports(path) if (target := module_of(one)) is not None}:
        place = place_in(name, depth)
        if name.startswith(f"{top}.") and place != own:
            allowed = {f"{top}.{one}" for one in plan[own]}
            if place not in allowed:
                yield f"{name_of(path)} imports {name}"


@cache
def module_of(name: str) -> str | None:
    """The module of this project that an imported name is, or is in."""
    found = module_file(name) or module_file(name.rpartition(".")[0])
    return None if found is None else name_of(found)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_every_import_is_in_the_plan(path: Path) -> None:
    name = name_of(path)
    for plan, depth in ((ADAPTERS, 2), (SERVER, 2), (EDGE, 3)):
        top = next(iter(plan)).rpartition(".")[0]
        if name.startswith(f"{top}."):
            assert place_in(name, depth) in plan, f"{name} stands in no room of the plan"
            assert not list(strays(path, plan, depth))


def test_the_plan_has_one_direction() -> None:
    for plan in (ADAPTERS, SERVER, EDGE):
        top = next(iter(plan)).rpartition(".")[0]
        left = {room: {f"{top}.{one}" for one in below} for room, below in plan.items()}
        assert {one for below in left.values() for one in below} <= left.keys()
        while left:
            bottom = {room for room, below in left.items() if not below & left.keys()}
            assert bottom, f"a circle among {sorted(left)}"
            left = {room: below for room, below in left.items() if room not in bottom}


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_rooms_for_few_are_known_to_few(path: Path) -> None:
    for name in imports(path):
        for room, known_to in ONLY_FOR.items():
            if name.startswith(room) and not name_of(path).startswith(room):
                assert name_of(path).startswith(known_to), f"{name_of(path)} imports {name}"


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
        if place.startswith(SIMULATED[0]) and name.startswith(SIMULATED[1]):
            continue
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


@cache
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
def test_names_say_what_they_do(path: Path) -> None:
    banned = {"manager", "utils", "helper", "helpers", "data", "info", "process"}
    assert not banned & set(path.stem.split("_")), f"{path}: a banned word in a module name"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            assert not node.name.lower().endswith(("manager", "utils", "helper", "data", "info"))


TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Reads of private names that tests still make, by file. A file that is not here makes none; a
# figure only falls.
PRIVATE_READS = {
    "adapters/layers/test_layers.py": 1,
    "adapters/modulation/test_autotune.py": 1,
    "adapters/registry/test_registry.py": 1,
    "adapters/registry/test_store.py": 1,
    "adapters/residency/test_packing.py": 3,
    "loadtests/test_residency_window.py": 1,
    "server/base/test_rope.py": 2,
    "server/edge/endpoints/test_answers.py": 1,
    "server/edge/endpoints/test_uploads.py": 1,
    "server/edge/link/test_dispatcher.py": 3,
    "server/edge/link/test_thread_deaths.py": 1,
    "server/edge/processes/test_registry_away.py": 7,
    "server/edge/processes/test_supervise.py": 3,
    "server/encoding/test_declared_pooling.py": 1,
    "server/encoding/test_lane.py": 2,
    "server/engine/test_adapter_bytes.py": 6,
    "server/engine/test_engine.py": 13,
    "server/engine/test_failure_tracker.py": 2,
    "server/engine/test_quarantine.py": 1,
    "server/engine/test_self_check.py": 1,
    "server/generation/test_attention.py": 1,
    "server/generation/test_lane.py": 1,
    "server/inputs/test_images.py": 1,
    "server/inputs/test_token_bound.py": 3,
    "server/training/test_recipe.py": 3,
    "stand/forked_servers.py": 6,  # four are os._exit, which is documented
}


def private_reads(tree: ast.AST) -> Iterator[str]:
    """Names with one leading underscore that are read from something but ``self``, or imported."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            names = [] if own else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [one.name for one in node.names]
        yield from (name for name in names if name[0] == "_" and name[:2] != "__")


def test_private_names_are_found_where_they_are_read() -> None:
    tree = ast.parse("from a import _b, c\nself._d = e._f.g._h\ni.__class__")
    assert sorted(private_reads(tree)) == ["_b", "_f", "_h"]


def test_tests_read_no_more_private_names_than_they_did() -> None:
    found = {
        path.relative_to(ROOT / "tests").as_posix(): count
        for path in TESTS
        if (count := len(list(private_reads(tree_of(path)))))
    }
    assert found == PRIVATE_READS, "use a public face; a figure that fell is to be lowered here"


def test_no_module_imports_a_test_module() -> None:
    """What several tests need stands in ``tests/stand``."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in TESTS
        for name in imports(path)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    ]
    assert found == []
