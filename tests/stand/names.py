"""Top-level names of the product that several modules define.

A reader who searches for a word should land in one place. `python -m tests.stand.names` prints each
function, class, constant and type alias that two modules or more of `adapters/` and `server/`
define, and how many there are; another tree may be given as an argument. `tests/test_names.py`
holds the list at its exceptions. A private name counts as the word behind its underscore.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("adapters", "server")


def defined_names(source: str, *, private: bool = True) -> set[str]:
    """The names that a module's text defines at its top level, also under `if` and `try`.

    Imports define nothing, nor do names of Python's own such as `__all__`.

    Args:
        source: Of one module.
        private: Whether names with a leading underscore count, as the word behind it.
    """
    found = {name for name in _defined(ast.parse(source).body) if not name.startswith("__")}
    return {name.lstrip("_") for name in found if private or not name.startswith("_")} - {""}


def shared_names(root: Path = ROOT, *, private: bool = True) -> Mapping[str, list[str]]:
    """The names that two modules or more below `root` define, with the paths of those modules."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for name in defined_names(path.read_text(encoding="utf-8"), private=private):
                found[name].append(str(path.relative_to(root)))
    return {name: paths for name, paths in sorted(found.items()) if len(paths) > 1}


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Assign():
                for target in node.targets:
                    yield from _targets(target)
            case ast.AnnAssign():
                yield from _targets(node.target)
            case ast.If() | ast.Try() | ast.With():
                for part in ("body", "orelse", "finalbody"):
                    yield from _defined(getattr(node, part, []))
                for handler in getattr(node, "handlers", []):
                    yield from _defined(handler.body)
            case _:
                alias = getattr(node, "name", None)  # `type X = ...` of Python 3.12
                if isinstance(alias, ast.Name):
                    yield alias.id


def _targets(target: ast.expr) -> Iterator[str]:
    match target:
        case ast.Name():
            yield target.id
        case ast.Tuple() | ast.List():
            for element in target.elts:
                yield from _targets(element)
        case _:
            pass


def main() -> None:
    """Print the shared names of this tree, or of the one that is named."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    names = shared_names(root)
    for name, paths in names.items():
        sys.stdout.write(f"{name}: {', '.join(paths)}\n")
    public = len(shared_names(root, private=False))
    sys.stdout.write(f"{len(names)} names in two modules or more; {public} of public ones alone\n")


if __name__ == "__main__":
    main()
