"""Settings: one order of precedence, and nothing unknown or malformed is passed over."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from server.options import EngineOptions
from server.settings import AdapterSource, Settings, SettingsFault, load_settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("HIRA_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_command_line_beats_environment_beats_file_beats_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("hira.toml").write_text("port = 9001\nslots = 11\nmax_inputs = 12\n")
    monkeypatch.setenv("HIRA_PORT", "9002")
    monkeypatch.setenv("HIRA_SLOTS", "22")
    settings = load_settings({"port": "9003"})
    assert (settings.port, settings.slots, settings.max_inputs) == (9003, 22, 12)
    assert settings.max_sequences == Settings.model_fields["max_sequences"].default


def test_flags_that_were_not_given_do_not_hide_other_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HIRA_PORT", "9002")
    assert load_settings({"port": None}).port == 9002


def test_lists_tables_and_sizes_are_read_from_every_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("hira.toml").write_text(
        'source_root = ["/a", "/b"]\nkv_bytes = "2MiB"\n'
        '[adapter]\nimdb = "/adapters/imdb"\n[api_keys]\nci = "12345678"\n'
    )
    settings = load_settings({})
    assert settings.source_root == (Path("/a"), Path("/b"))
    assert settings.kv_bytes == 2 << 20
    assert settings.adapters == (AdapterSource("imdb", "/adapters/imdb"),)
    assert settings.api_keys["ci"].get_secret_value() == "12345678"
    monkeypatch.setenv("HIRA_SOURCE_ROOT", "/c, /d")
    monkeypatch.setenv("HIRA_ADAPTER", "one=/1,two=hf://org/two@main")
    settings = load_settings({"kv_bytes": "3GiB"})
    assert settings.source_root == (Path("/c"), Path("/d"))
    assert settings.adapters[1] == AdapterSource("two", "hf://org/two@main")
    assert settings.kv_bytes == 3 << 30
    assert load_settings({"adapter": ["x=/x"]}).adapters == (AdapterSource("x", "/x"),)


@pytest.mark.parametrize(
    ("flags", "environment", "file", "said"),
    [
        ({"port": "80"}, {}, "", ("--port", "1024")),
        ({"port": "many"}, {}, "", ("--port", "'many'")),
        ({"host": "10.0.0.1"}, {}, "", ("host", "0.0.0.0")),
        ({}, {"HIRA_SLOTS": "-1"}, "", ("HIRA_SLOTS", "-1")),
        ({}, {"HIRA_QUANTISATION": "nf4"}, "", ("HIRA_QUANTISATION", "quantization")),
        ({}, {"HIRA_QUANTIZATION": "nf5"}, "", ("HIRA_QUANTIZATION", "'nf4'")),
        ({}, {}, "slotz = 3\n", ("hira.toml", "slotz", "slots")),
        ({}, {}, 'kv_bytes = "3 stones"\n', ("hira.toml: kv_bytes", "stones")),
        ({}, {}, "port = \n", ("hira.toml", "not TOML")),
        ({}, {"HIRA_ADAPTER": "nameless"}, "", ("HIRA_ADAPTER", "NAME=VALUE")),
        ({"adapter": ["a=1", "a=2"]}, {}, "", ("--adapter", "twice")),
        ({"timeout_s": "700"}, {}, "", ("timeout_s", "max_timeout_s")),
    ],
)
def test_fault_is_one_line_that_names_its_source(
    flags: dict[str, object],
    environment: dict[str, str],
    file: str,
    said: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if file:
        Path("hira.toml").write_text(file)
    with pytest.raises(SettingsFault) as caught:
        load_settings(flags)
    (line,) = str(caught.value).splitlines()
    for part in said:
        assert part in line


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(SettingsFault) as caught:
        load_settings({"port": "1", "slots": "0", "dtype": "int4"})
    assert len(str(caught.value).splitlines()) == 3


def test_keys_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIRA_API_KEYS", "ci=s3cret-but-fine,app=s3cret")
    with pytest.raises(SettingsFault) as caught:
        load_settings({})
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("HIRA_API_KEYS", "ci=s3cret-but-fine")
    monkeypatch.setenv("HIRA_ADMIN_KEY", "s3cret-of-the-admin")
    assert "s3cret" not in repr(load_settings({}))


def test_named_file_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingsFault, match=r"nowhere\.toml"):
        load_settings({}, config=tmp_path / "nowhere.toml")
    other = tmp_path / "other.toml"
    other.write_text("slots = 5\n")
    monkeypatch.setenv("HIRA_CONFIG", str(other))
    assert load_settings({}).slots == 5


def test_every_engine_option_comes_from_a_setting() -> None:
    settings = load_settings({"max_input_tokens": "77", "prefix_sharing": True, "token_ms": "50"})
    options = settings.engine_options("/base")
    assert isinstance(options, EngineOptions)
    assert (options.base, options.max_input_tokens) == ("/base", 77)
    assert options.allow_prefix_sharing
    assert options.token_ms == 50.0
    assert pickle.loads(pickle.dumps(options)) == options
    for name in EngineOptions.__dataclass_fields__:
        if name in Settings.model_fields and name != "base":
            assert getattr(options, name) == getattr(settings, name)


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["panel"], name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"store_url": "/a/folder"}, "s3://BUCKET"),
        ({"store_url": "s3://B"}, "s3://BUCKET"),
        ({"store_url": "s3://bucket/../other"}, "s3://BUCKET"),
        ({"store_url": "s3://bucket/a.b/c-d_e/"}, None),
        ({"store_url": "s3://bucket", "store_endpoint": "host:9000"}, "http(s)://HOST"),
        ({"store_url": "s3://bucket", "store_endpoint": "http://me:pass@host"}, "without keys"),
        ({"store_endpoint": "http://host"}, "store_url"),
        ({"store_url": "s3://bucket", "store_cache_bytes": "1KiB"}, "1048576"),
    ],
)
def test_a_store_that_is_none_is_refused(flags: dict[str, str], said: str | None) -> None:
    if said is None:
        assert load_settings(flags).store_url == flags["store_url"]
        return
    with pytest.raises(SettingsFault, match=re.escape(said)) as caught:
        load_settings(flags)
    assert "me:pass" not in str(caught.value)


def test_with_an_object_store_the_folder_holds_what_is_used(tmp_path: Path) -> None:
    plain = load_settings({"data_dir": str(tmp_path)})
    assert (plain.store_dir, plain.remote_store) == (tmp_path / "store", None)
    remote = load_settings(
        {"data_dir": str(tmp_path), "store_url": "s3://bucket/hira", "max_timeout_s": "100"}
    )
    assert remote.store_dir == tmp_path / "store-cache"
    assert remote.remote_store is not None
    assert remote.remote_store.url == "s3://bucket/hira"
    assert remote.remote_store.least_idle_s > 100
    assert remote.engine_options("base").remote_store == remote.remote_store


@pytest.mark.parametrize("flags", [{"token_ms": 60, "decode_steps": "ahead"}, {"token_ms": 0}])
def test_a_time_that_steps_cannot_be_given_is_refused(flags: dict[str, object]) -> None:
    with pytest.raises(SettingsFault, match=r"token.ms"):
        load_settings(flags)
    assert load_settings({"token_ms": 60, "decode_steps": "static"}).token_ms == 60
