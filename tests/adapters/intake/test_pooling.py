"""What sentence-transformers' files say of a vector, and that they travel with an adapter."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterError, CorruptFile, SourceForbidden, UnsupportedOption
from adapters.intake.archive import WANTED, unpack
from adapters.intake.checkpoint import load_adapter
from adapters.intake.pooling import Declaration, base_pooling, pooling_files, read_pooling
from adapters.intake.sources import Sources
from adapters.registry.store import Store, version_of
from tests.stand.folders import hira_folder, small_base

MODELS = "sentence_transformers.models."
FLAGS = ("cls_token", "mean_tokens", "lasttoken", "max_tokens", "mean_sqrt_len_tokens")


def modules(*kinds: str, prefix: str = MODELS) -> list[dict[str, Any]]:
    return [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": prefix + kind}
        for n, kind in enumerate(("Transformer", *kinds))
    ]


def flags(*chosen: str) -> dict[str, Any]:
    return {"word_embedding_dimension": 64} | {
        f"pooling_mode_{name}": name in chosen for name in (*FLAGS, "weightedmean_tokens")
    }


def declare(
    folder: Path,
    pooling: Any,
    *kinds: str,
    listed: Any = None,
    **others: Any,
) -> Path:
    """Write a declaration into a folder, nested as the library saves it."""
    kinds = kinds or ("Pooling",)
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules(*kinds) if listed is None else listed))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read(folder: Path) -> Declaration:
    return read_pooling(pooling_files(folder), 32)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        (flags("cls_token"), "cls"),
        (flags("mean_tokens"), "mean"),
        (flags("lasttoken"), "last"),
        (flags(), "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode": "mean", **flags("cls_token")}, "mean"),
        ({"embedding_dimension": 64}, "mean"),
    ],
)
def test_a_pooling_is_read_by_flags_and_by_name(tmp_path: Path, pooling: Any, mode: str) -> None:
    assert read(declare(tmp_path, pooling)) == Declaration(mode, False)  # type: ignore[arg-type]
    assert read(declare(tmp_path, pooling, "Pooling", "Normalize")).normalize
    assert read(declare(tmp_path, pooling, "Pooling", "Dropout")).mode == mode


def test_the_newer_names_of_the_modules_are_known(tmp_path: Path) -> None:
    prefix = "sentence_transformers.sentence_transformer.modules."
    listed = modules("Pooling", "Normalize", prefix=prefix)
    assert read(declare(tmp_path, {"pooling_mode": "cls"}, listed=listed)).mode == "cls"


@pytest.mark.parametrize(
    ("pooling", "named"),
    [
        (flags("max_tokens"), "max"),
        (flags("mean_sqrt_len_tokens"), "mean_sqrt_len_tokens"),
        (flags("weightedmean_tokens"), "weightedmean"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode_new": True}, "pooling_mode_new"),
        (flags("cls_token", "mean_tokens"), "Several"),
        ({"pooling_mode": ["cls", "mean"]}, "Several"),
    ],
)
def test_another_pooling_is_refused_by_name(tmp_path: Path, pooling: Any, named: str) -> None:
    with pytest.raises(UnsupportedOption, match=named):
        read(declare(tmp_path, pooling))


@pytest.mark.parametrize(
    ("listed", "named"),
    [
        (modules("Pooling", "Dense"), "Dense"),
        (modules("Pooling", "Dense", "Normalize"), "Dense"),
        (modules("Normalize", "Pooling"), "Normalize"),
        (modules("Pooling", "Pooling"), "Pooling"),
        (modules("Pooling", prefix="custom_st."), "custom_st.Transformer"),
        ([*modules(), {**modules("Pooling")[1], "path": "pooling"}], "folder"),
    ],
)
def test_another_module_is_refused_by_name(tmp_path: Path, listed: Any, named: str) -> None:
    with pytest.raises(UnsupportedOption, match=named):
        read(declare(tmp_path, flags("cls_token"), listed=listed))


@pytest.mark.parametrize(
    ("pooling", "listed"),
    [
        ({"pooling_mode": 1}, None),
        ({"pooling_mode": []}, None),
        ({"pooling_mode_cls_token": "yes"}, None),
        ([], None),
        ({}, {"modules": []}),
        ({}, [1]),
        ({}, [{"type": "a"}]),
        ({}, modules() * 65),
    ],
)
def test_a_malformed_declaration_is_corrupt(tmp_path: Path, pooling: Any, listed: Any) -> None:
    with pytest.raises(CorruptFile):
        read(declare(tmp_path, pooling, listed=listed))


def test_a_pooling_that_is_named_and_missing_is_refused(tmp_path: Path) -> None:
    folder = declare(tmp_path, {})
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CorruptFile) as caught:
        read(folder)
    assert "1_Pooling/config.json" in str(caught.value.found)


def test_a_default_prompt_is_refused_and_other_prompts_are_noted(tmp_path: Path) -> None:
    prompts: dict[str, Any] = {
        "prompts": {"query": "query: ", "document": ""},
        "default_prompt_name": None,
    }
    folder = declare(tmp_path, flags("cls_token"), config_sentence_transformers=prompts)
    (note,) = read(folder).notes
    assert "(query)" in note
    for default, fault in (("query", UnsupportedOption), ("other", CorruptFile)):
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps({**prompts, "default_prompt_name": default})
        )
        with pytest.raises(fault, match=r"prompt|malformed"):
            read(folder)
    prompts["default_prompt_name"] = "document"
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    assert read(folder).mode == "cls"


def test_what_is_not_used_is_noted_by_name(tmp_path: Path) -> None:
    folder = declare(
        tmp_path,
        {"pooling_mode": "cls", "include_prompt": False},
        sentence_bert_config={"max_seq_length": 16, "do_lower_case": True},
    )
    notes = " ".join(read(folder).notes)
    for name in ("include_prompt", "max_seq_length = 16", "do_lower_case"):
        assert name in notes
    (folder / "modules.json").unlink()
    assert read(folder).mode is None
    assert "1_Pooling/config.json without modules.json" in read(folder).notes[0]


def test_a_base_that_declares_what_is_not_served_is_no_error_yet(tmp_path: Path) -> None:
    assert base_pooling(tmp_path, 32) == Declaration()
    found = base_pooling(declare(tmp_path, flags("max_tokens")), 32)
    assert isinstance(found, UnsupportedOption)
    assert "max" in found.message


def test_an_adapters_declaration_is_loaded_stored_and_part_of_its_version(tmp_path: Path) -> None:
    base = small_base()
    folder = hira_folder(tmp_path / "adapter")
    store = Store(tmp_path / "store")
    plain = store.add(folder)
    assert load_adapter(store.path(plain), base).pooling.mode is None
    seen = {plain}
    for pooling in (flags("cls_token"), flags("mean_tokens")):
        version = store.add(declare(folder, pooling, "Pooling", "Normalize"))
        assert version == version_of(folder)
        assert version not in seen
        seen.add(version)
        kept = load_adapter(store.sound_path(version), base).pooling
        assert kept == load_adapter(folder, base).pooling
        assert kept.normalize
    (store.path(version) / "1_Pooling.json").write_text(json.dumps(flags("cls_token")))
    assert not store.is_sound(version)
    assert [one for one in store.versions() if not store.is_sound(one)] == [version]
    declare(store.path(plain), flags("cls_token"))  # beside what was stored without any
    assert not store.is_sound(plain)


def test_a_declaration_that_is_not_honoured_refuses_the_adapter(tmp_path: Path) -> None:
    folder = declare(hira_folder(tmp_path / "adapter"), flags("max_tokens"))
    with pytest.raises(UnsupportedOption, match="max"):
        load_adapter(folder, small_base())


def test_notes_of_a_declaration_are_the_adapters(tmp_path: Path) -> None:
    folder = declare(
        hira_folder(tmp_path / "adapter"), flags("cls_token"),
        sentence_bert_config={"max_seq_length": 16},
    )  # fmt: skip
    assert any("max_seq_length" in note for note in load_adapter(folder, small_base()).notes)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_every_way_in_brings_the_declaration(tmp_path: Path, kind: str) -> None:
    adapter = declare(hira_folder(tmp_path / "root" / "adapter"), flags("cls_token"))
    target = tmp_path / "unpacked"
    target.mkdir()
    if kind == "folder":
        with Sources(tmp_path / "staging", [tmp_path / "root"]).fetch(str(adapter)) as copy:
            assert read(copy).mode == "cls"
            assert version_of(copy) == version_of(adapter)
        return
    packed = tmp_path / f"adapter.{kind}"
    files = {p: p.relative_to(adapter.parent) for p in adapter.rglob("*") if p.is_file()}
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            for path, name in files.items():
                archive.write(path, str(name))
    else:
        with tarfile.open(packed, "w") as tar:
            for path, name in files.items():
                member = tarfile.TarInfo(str(name))
                member.size = path.stat().st_size
                tar.addfile(member, io.BytesIO(path.read_bytes()))
    unpack(packed, target, max_bytes=1 << 24)
    assert {path.name for path in target.iterdir()} <= set(WANTED.values())
    assert (target / "config.json").read_bytes() == (adapter / "config.json").read_bytes()
    assert version_of(target) == version_of(adapter)


@pytest.mark.parametrize("what", ["folder", "file", "plain"])
def test_a_link_in_the_poolings_place_is_forbidden(tmp_path: Path, what: str) -> None:
    adapter = declare(tmp_path / "root" / "adapter", flags("cls_token"))
    outside = tmp_path / "outside"
    (adapter / "1_Pooling").rename(outside)
    if what == "folder":
        (adapter / "1_Pooling").symlink_to(outside)
    elif what == "file":
        (adapter / "1_Pooling").mkdir()
        (adapter / "1_Pooling" / "config.json").symlink_to(outside / "config.json")
    else:
        (adapter / "1_Pooling").write_text("{}")
    sources = Sources(tmp_path / "staging", [tmp_path / "root"])
    with pytest.raises(AdapterError) as caught, sources.fetch(str(adapter)):
        pass
    assert isinstance(caught.value, SourceForbidden)
