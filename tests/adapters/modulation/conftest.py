"""What tests of layers on the GPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stand.interpreted import Kernels, interpreted


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    """The kernels as the interpreter runs them, in place of those for a GPU."""
    with interpreted() as found:
        yield found
