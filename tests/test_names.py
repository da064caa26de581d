"""One word means one thing: a top-level name of the product stands in one module only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stand.names import defined_names, shared_names

# Names that may stand in several modules, and why.
LANES = "the lanes may not import each other; each words its failures for its own requests"
EXCEPTIONS = {
    "T": "a type variable means nothing beyond its signature",
    "logger": "each module logs under its own name",
    "main": "the entry point of a command",
    "load_tokenizer": "the server's own reading of tokenizer.json, and transformers' for training",
    "refusal": LANES,
}


def test_a_name_is_defined_in_one_module() -> None:
    shared = {name: paths for name, paths in shared_names().items() if name not in EXCEPTIONS}
    assert not shared, "rename by what each is, or define it once and import it"


@pytest.mark.parametrize("name", ["T", "logger", "main"])
def test_lasting_exceptions_are_needed(name: str) -> None:
    assert name in shared_names()


def test_names_are_found_wherever_a_module_defines_them() -> None:
    source = """
import os
from os import path
__all__ = ["A"]
A = 1
B: int = 2
(C, [D]) = 3, [4]
if A:
    E = 5
else:
    def _f(): G = 6
try:
    class H: I = 7
except ValueError:
    J = 8
async def k(): ...
"""
    assert defined_names(source) == {"A", "B", "C", "D", "E", "f", "H", "J", "k"}
    assert "f" not in defined_names(source, private=False)


def test_a_private_name_is_the_same_word(tmp_path: Path) -> None:
    for package, text in (("adapters", "_rows = 1\n"), ("server", "def rows(): ...\n")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text(text, encoding="utf-8")
    assert shared_names(tmp_path) == {"rows": ["adapters/one.py", "server/one.py"]}
    assert not shared_names(tmp_path, private=False)
