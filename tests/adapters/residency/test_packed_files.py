"""Packed files: what is read from them is what the stored adapter gives, or they are not used."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertForMaskedLM

from adapters.factors import Factors
from adapters.intake.checkpoint import AdapterWeights, Numbers, load_adapter, load_with
from adapters.intake.safetensors_header import TENSOR_FILE
from adapters.layers.inject import inject
from adapters.registry.store import Store
from adapters.residency.packed_files import PackedFiles
from adapters.residency.packing import PackedAdapter, pack_adapter
from adapters.residency.slots import Residency
from tests.stand.folders import SMALL, change_config, hira_folder, lora_folder, small_base
from tests.stand.waits import until

CPU = torch.device("cpu")
BASE = small_base()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLENTY = 1 << 30
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    return {"hira": hira_folder(root / "hira"), "lora": lora_folder(root / "lora", use_rslora=True)}


class Shelf:
    """A store and the packed files beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "store")

    def add(self, folder: Path) -> str:
        return self.store.add(folder)

    def files(
        self, dtype: torch.dtype = torch.float32, *, columns: bool = False, **more: Any
    ) -> PackedFiles:
        options: dict[str, Any] = {"max_bytes": PLENTY, "settled_s": 0.0, **more}
        return PackedFiles(
            self.root / "packed", dtype=dtype, b_by_column=columns, pinned=False,
            stamp=self.store.stamp,
            load_with=lambda version, numbers: load_with(self.store.path(version), BASE, numbers),
            **options,
        )  # fmt: skip

    def packed(
        self, version: str, dtype: torch.dtype = torch.float32, *, columns: bool = False
    ) -> PackedAdapter:
        weights = load_adapter(self.store.sound_path(version), BASE)
        return pack_adapter(weights, dtype, CPU, b_by_column=columns)

    def keep(self, version: str, files: PackedFiles | None = None) -> Path:
        """Make the packed file of a version; returns it."""
        stamp = self.store.stamp(version)
        (files or self.files()).write(version, self.packed(version).image(), stamp)
        return next(path for path in self.all() if path.name.startswith(version))

    def all(self) -> list[Path]:
        return sorted((self.root / "packed").glob("*"))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def bits(tensor: torch.Tensor | None) -> Any:
    if tensor is None:
        return None
    whole = tensor.contiguous().view(INTEGER[tensor.itemsize]).reshape(-1).tolist()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), whole


def told(packed: PackedAdapter) -> dict[str, Any]:
    """All that is served of an adapter, bit for bit."""
    weights = packed.weights
    plain = {one.name: getattr(weights, one.name) for one in fields(weights)}
    plain |= {
        "factors": {
            path: (one.method, one.scale, bits(one.a), bits(one.b), bits(one.bias))
            for path, one in weights.factors.items()
        },
        "slots": {
            path: (one.method, one.scale, bits(one.a), bits(one.b), bits(one.bias))
            for path, one in packed.to_device(CPU).items()
        },
        "head": {path: bits(one) for path, one in weights.head.items()},
        "bytes": packed.nbytes,
    }
    return plain


def varied(source: Path, target: Path, stored: torch.dtype, seed: int) -> Path:
    """The adapter with other numbers: of other magnitudes, some of them zero or minus zero."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        numbers = torch.randn(tensor.shape, generator=generator) * 10.0 ** (seed % 5 - 3)
        kind = torch.randint(0, 4, tensor.shape, generator=generator)
        numbers = torch.where(kind == 0, torch.zeros(()), numbers)
        return torch.where(kind == 1, -torch.zeros(()), numbers).to(stored)

    save_file(
        {name: draw(tensor) for name, tensor in load_file(source / TENSOR_FILE).items()},
        target / TENSOR_FILE,
    )
    return target


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    method=st.sampled_from(["hira", "lora"]),
    stored=st.sampled_from([*DTYPES, torch.float64]),
    served=st.sampled_from(DTYPES),
    columns=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_it_serves_the_numbers_of_the_stored_adapter_bit_for_bit(
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    *,
    method: str,
    stored: torch.dtype,
    served: torch.dtype,
    columns: bool,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("varied")
    shelf = Shelf(root)
    version = shelf.add(varied(folders[method], root / "source", stored, seed))
    files = shelf.files(served, columns=columns)
    assert files.read(version) is None
    slow = shelf.packed(version, served, columns=columns)
    files.write(version, slow.image(), shelf.store.stamp(version))
    fast = shelf.files(served, columns=columns).read(version)
    assert fast is not None
    assert told(fast) == told(slow)
    for other in set(DTYPES) - {served}:
        assert shelf.files(other, columns=columns).read(version) is None
    assert shelf.files(served, columns=not columns).read(version) is None


SHAPES = st.sampled_from([((3, 8), (6, 3)), ((2, 4, 3, 3), (5, 2, 1, 1)), ((1, 1), (1, 1))])


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.tuples(SHAPES, st.booleans()), min_size=1, max_size=5),
    served=st.sampled_from(DTYPES),
    columns=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_biases_and_convolutions_come_back_too(
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    *,
    shapes: list[tuple[tuple[tuple[int, ...], tuple[int, ...]], bool]],
    served: torch.dtype,
    columns: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"layer.{number}": Factors(
            "hira",
            torch.randn(a, generator=generator),
            torch.randn(b, generator=generator),
            1.0,
            torch.randn(b[0], generator=generator) if has_bias else None,
        )
        for number, ((a, b), has_bias) in enumerate(shapes)
    }
    head = {"score.weight": torch.randn(2, 3, generator=generator).half(), "empty": torch.zeros(0)}
    plain = load_adapter(folders["hira"], BASE)
    slow = pack_adapter(
        replace(plain, factors=factors, head=head), served, CPU, b_by_column=columns
    )

    def load_with(_: str, numbers: Numbers) -> AdapterWeights:
        made = {path: Factors("hira", a, b, 1.0, c) for path, (a, b, c) in numbers.factors.items()}
        return replace(
            plain, factors=made, head=numbers.head,
            nonzero=numbers.nonzero, zero_sides=numbers.zero_sides,
        )  # fmt: skip

    files = PackedFiles(
        tmp_path_factory.mktemp("packed"), dtype=served, b_by_column=columns, pinned=False,
        max_bytes=PLENTY, stamp=lambda _: (("a", 1, 2, 3, 4),), load_with=load_with,
    )  # fmt: skip
    files.write("0" * 32, slow.image(), (("a", 1, 2, 3, 4),))
    fast = files.read("0" * 32)
    assert fast is not None
    assert told(fast) == told(slow)
    kept = next(files.folder.iterdir())
    kept.rename(kept.with_name(kept.name.replace("0" * 32, "1" * 32)))
    assert files.read("1" * 32) is None, "it is another adapter's"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 10**9), change=st.integers(1, 255), cut=st.booleans())
def test_a_packed_file_that_has_changed_anywhere_is_never_served(
    shelf: Shelf, folders: dict[str, Path], place: int, change: int, cut: bool
) -> None:
    version = shelf.add(folders["hira"])
    for path in shelf.all():
        path.unlink()
    path = shelf.keep(version)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] ^= change
    path.write_bytes(content[:place] if cut else content)
    files = shelf.files()
    assert files.read(version) is None
    assert not path.exists(), "it is made anew"
    shelf.keep(version, files)
    assert files.read(version) is not None


def test_a_packed_file_of_another_version_or_a_longer_one_is_never_served(
    shelf: Shelf, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = shelf.add(folders["hira"]), shelf.add(folders["lora"])
    path = shelf.keep(one)
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with caplog.at_level(logging.WARNING):
        assert shelf.files().read(one) is None
    assert f"{path} is damaged" in caplog.text
    path.with_name(path.name.replace(one, other)).write_bytes(content)
    assert shelf.files().read(other) is None


def test_a_header_that_says_something_else_is_not_believed(
    shelf: Shelf, folders: dict[str, Path]
) -> None:
    version = shelf.add(folders["hira"])
    path = shelf.keep(version)
    content = path.read_bytes()
    nonzero = f'"nonzero":{shelf.packed(version).weights.nonzero}'.encode()
    assert content.count(nonzero) == 1
    path.write_bytes(content.replace(nonzero, b'"nonzero":' + b"1" * (len(nonzero) - 10)))
    assert shelf.files().read(version) is None


def test_stored_files_that_were_touched_are_read_again(
    shelf: Shelf, folders: dict[str, Path]
) -> None:
    """Whatever the time of modification says, and whether or not the content changed."""
    version = shelf.add(folders["hira"])
    shelf.keep(version)
    files = shelf.files()
    path = shelf.store.path(version) / TENSOR_FILE
    seen = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert files.read(version) is None
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(last)
    assert files.read(version) is None
    files.write(version, shelf.packed(version).image(), shelf.store.stamp(version))
    assert files.read(version) is not None


def test_nothing_is_kept_of_files_that_changed_while_they_were_read(
    shelf: Shelf, folders: dict[str, Path]
) -> None:
    version = shelf.add(folders["hira"])
    before = shelf.store.stamp(version)
    image = shelf.packed(version).image()
    os.utime(shelf.store.path(version) / TENSOR_FILE)
    shelf.files().write(version, image, before)
    assert shelf.all() == []


def test_nothing_is_kept_of_files_so_young_that_a_change_could_leave_no_trace(
    shelf: Shelf, folders: dict[str, Path]
) -> None:
    version = shelf.add(folders["hira"])
    image, stamp = shelf.packed(version).image(), shelf.store.stamp(version)
    shelf.files(settled_s=3600.0).write(version, image, stamp)
    assert shelf.all() == []


def test_the_files_used_longest_ago_give_way(shelf: Shelf, folders: dict[str, Path]) -> None:
    versions = [
        shelf.add(varied(folders["hira"], shelf.root / str(n), torch.float32, n)) for n in range(4)
    ]
    size = shelf.keep(versions[0]).stat().st_size
    files = shelf.files(max_bytes=int(3.5 * size))
    for age, version in enumerate(versions[:3]):
        os.utime(shelf.keep(version, files), (1000 + age, 1000 + age))
    assert files.read(versions[0]) is not None, "a use"
    shelf.keep(versions[3], files)
    kept = {path.name[:32] for path in shelf.all()}
    assert kept == {versions[0], versions[2], versions[3]}
    assert files.nbytes() == sum(path.stat().st_size for path in shelf.all()) <= 3.5 * size
    shelf.files(max_bytes=size // 2).write(
        versions[1], shelf.packed(versions[1]).image(), shelf.store.stamp(versions[1])
    )
    assert {path.name[:32] for path in shelf.all()} == kept, "larger than all of the room"


def test_files_of_versions_that_nobody_names_go(shelf: Shelf, folders: dict[str, Path]) -> None:
    one, other = shelf.add(folders["hira"]), shelf.add(folders["lora"])
    shelf.keep(one)
    shelf.keep(other)
    strange = shelf.root / "packed" / "notes.txt"
    strange.write_text("not ours")
    files = shelf.files()
    files.keep_only({other})
    assert [path.name[:32] for path in shelf.all()] == sorted([other, strange.name])
    assert files.read(one) is None
    assert files.nbytes() == shelf.all()[0].stat().st_size


def test_where_none_can_be_written_that_is_said_once(
    shelf: Shelf, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    version = shelf.add(folders["hira"])
    (shelf.root / "packed").write_text("a file where the folder should be")
    files = shelf.files()
    with caplog.at_level(logging.WARNING):
        assert files.read(version) is None
        for _ in range(3):
            files.write(version, shelf.packed(version).image(), shelf.store.stamp(version))
    assert caplog.text.count("read from the store in full") == 1


# With a residency: what whoever asks for an adapter gets.


@contextmanager
def serving(shelf: Shelf, loads: list[str], **more: Any) -> Iterator[Residency]:
    adapted = inject(DistilBertForMaskedLM(DistilBertConfig(**SMALL)))

    def load(version: str) -> AdapterWeights:
        loads.append(version)
        return load_adapter(shelf.store.sound_path(version), BASE)

    made = Residency(
        adapted, load, slots=2, device_bytes=PLENTY, host_bytes=0, folded_bytes=0,
        dtype=torch.float32, grace_s=0.0, files=shelf.files(**more),
    )  # fmt: skip
    try:
        yield made
    finally:
        made.close()


def settle(made: Residency, version: str) -> str:
    made.prefetch(version)
    until(lambda: made.state(version) in ("ready", "failed"), "it is neither ready nor failed")
    return made.state(version)


def test_only_the_first_load_reads_the_stored_adapter(
    shelf: Shelf, folders: dict[str, Path]
) -> None:
    version, loads = shelf.add(folders["hira"]), list[str]()
    with serving(shelf, loads) as made:
        assert settle(made, version) == "ready"
        slow = told_of(made.weights(version))
        assert made.snapshot().ready_made == 0
    assert len(shelf.all()) == 1
    with serving(shelf, loads) as made:
        assert settle(made, version) == "ready"
        assert told_of(made.weights(version)) == slow
        assert (made.snapshot().loads, made.snapshot().ready_made) == (1, 1)
    assert loads == [version]


def told_of(weights: AdapterWeights) -> Mapping[str, Any]:
    return {path: (bits(one.a), bits(one.b)) for path, one in weights.factors.items()}


def test_a_changed_stored_adapter_fails_alone_though_its_packed_file_is_whole(
    shelf: Shelf, folders: dict[str, Path]
) -> None:
    changed, cut, sound = (
        shelf.add(varied(folders["hira"], shelf.root / str(n), torch.float32, n)) for n in range(3)
    )
    for version in (changed, cut, sound):
        shelf.keep(version)
    path = shelf.store.path(changed) / TENSOR_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    path = shelf.store.path(cut) / TENSOR_FILE
    os.truncate(path, path.stat().st_size - 4)
    loads: list[str] = []
    with serving(shelf, loads) as made:
        assert settle(made, changed) == "failed"
        assert "have changed" in str(made.error(changed))
        assert settle(made, cut) == "failed"
        assert settle(made, sound) == "ready"
    assert loads == [changed, cut]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "other bytes": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_packed_file_costs_one_more_reading_and_no_answer(
    shelf: Shelf, folders: dict[str, Path], damage: str
) -> None:
    version, loads = shelf.add(folders["hira"]), list[str]()
    path = shelf.keep(version)
    DAMAGES[damage](path)
    with serving(shelf, loads) as made:
        assert settle(made, version) == "ready"
        assert told_of(made.weights(version)) == told_of(shelf.packed(version).weights)
    assert loads == [version]
    assert shelf.files().read(version) is not None


def test_the_configuration_is_checked_at_every_load(
    shelf: Shelf, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A release that refuses more refuses what a former one has packed."""
    source = shutil.copytree(folders["hira"], tmp_path / "other")
    version = shelf.add(source)
    shelf.keep(version)

    def refuse(_: str, numbers: Numbers) -> AdapterWeights:
        return load_with(change_config(source, peft_type="OTHER"), BASE, numbers)

    files = shelf.files()
    assert files.read(version) is not None
    strict = PackedFiles(
        shelf.root / "packed", dtype=torch.float32, b_by_column=False, pinned=False,
        max_bytes=PLENTY, stamp=shelf.store.stamp, load_with=refuse, settled_s=0.0,
    )  # fmt: skip
    assert strict.read(version) is None
