"""What tests of the kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stand.interpreted import Kernels, compiled_copies, interpreted, put_interpreted


@pytest.fixture(scope="session")
def interpreted_copies() -> Kernels:
    """Copies that were decorated to be interpreted, apart from the real ones."""
    with interpreted() as found:
        return found


@pytest.fixture
def ops(interpreted_copies: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels as the interpreter runs them, in place for one test: others compile."""
    put_interpreted(monkeypatch, interpreted_copies)
    return interpreted_copies


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    """The kernels as they are compiled for a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    yield from compiled_copies(tmp_path_factory.mktemp("triton"))
