"""Which of the versions that share the requests of a name answers one."""

from __future__ import annotations

import hashlib
import random
import statistics
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.registry.names import Names
from adapters.registry.records import AdapterRecord, Canary
from server.edge.target import Targets, drawn_arm
from server.errors import Refusal

STABLE = AdapterRecord(
    name="a",
    version="v1",
    method="hira",
    task="text-classification",
    labels=("A", "B"),
    ranks=(4, 4),
    targets=("q",),
    tensor_bytes=1,
    parameters=1,
    sparsity=0.0,
    pinned=True,
    created=datetime.now(UTC),
    source="x",
    base_name=None,
    notes=(),
    base_digest="base",
    aliases=("prod",),
)


def targets(share: float, base_digest: str = "base") -> Targets:
    canary = Canary(replace(STABLE, version="v2", aliases=(), base_digest=base_digest), share)
    registry: Any = SimpleNamespace(records=lambda: {"a": replace(STABLE, canary=canary)})
    names = Names(registry, lambda: 0, base_digest="base")
    names.refresh()
    base: Any = SimpleNamespace(name="base", answers_to=lambda name: name == "base", task="")
    return Targets(names, base)


@pytest.mark.parametrize("share", [0.0, 1.0, 10.0, 50.0, 99.0, 100.0])
def test_shares_are_what_was_asked_for(share: float) -> None:
    rng = random.Random(share)
    keys = [f"{rng.getrandbits(128):x}" for _ in range(20_000)]
    drawn = [drawn_arm("a", "v2", share, key) == "canary" for key in keys]
    spread = statistics.NormalDist(share / 100, (share * (100 - share)) ** 0.5 / 100 / 141.4)
    if share in (0.0, 100.0):
        assert set(drawn) == {share == 100.0}
    else:
        assert abs(sum(drawn) / len(drawn) - share / 100) < 5 * spread.stdev


def test_a_draw_is_the_digest_as_a_number() -> None:
    rng = random.Random(7)
    for _ in range(500):
        key, share = f"{rng.getrandbits(64):x}", rng.uniform(0, 100)
        number = int(hashlib.sha256(f"n\0v\0{key}".encode()).hexdigest()[:16], 16) / 16**16
        assert (drawn_arm("n", "v", share, key) == "canary") == (number * 100 < share)


def test_a_larger_share_keeps_who_had_the_canary_and_another_canary_draws_anew() -> None:
    keys = [f"user {one}" for one in range(2000)]
    few, many = (
        {key for key in keys if drawn_arm("a", "v2", share, key) == "canary"} for share in (10, 30)
    )
    assert few < many
    other = {key for key in keys if drawn_arm("a", "v3", 10, key) == "canary"}
    assert len(few & other) < len(few) / 2


def test_the_drawn_version_is_resolved_with_its_arm_and_alias() -> None:
    found = targets(50)
    for key in map(str, range(50)):
        one = found.resolve(("prod",), "/predict", key=key)
        assert one.arm == drawn_arm("a", "v2", 50, key)
        assert one.version == {None: None, "stable": "v1", "canary": "v2"}[one.arm]
        assert (one.adapter, one.alias) == ("a", "prod")
    plain = found.resolve(("a",), "/predict")
    assert (plain.version, plain.arm, plain.alias) == ("v1", None, None)
    assert [found.arm_of("a", one) for one in ("v1", "v2", "v3")] == ["stable", "canary", None]
    assert found.arm_of("b", "v1") is None


def test_a_canary_of_another_base_takes_no_part() -> None:
    assert targets(100).resolve(("a",), "/predict", key="k").version == "v2"
    one = targets(100, "other").resolve(("a",), "/predict", key="k")
    assert (one.version, one.arm) == ("v1", None)


def test_a_key_is_held_to_the_name_that_was_asked_for_not_to_what_it_points_to() -> None:
    found = targets(50)
    found.may_ask = lambda name: name == "prod"
    assert found.resolve(("prod",), "/predict").adapter == "a"
    with pytest.raises(Refusal) as refused:
        found.resolve(("a",), "/predict")
    found.may_ask = lambda name: name == "a"
    with pytest.raises(Refusal) as unknown:
        found.resolve(("prod",), "/predict")
    assert [one.value.code for one in (refused, unknown)] == ["adapter_forbidden"] * 2
