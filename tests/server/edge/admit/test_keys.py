"""Keys: a file of hashes, what each key may do, and what a broken file says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from server.edge.admit.key_file import (
    KEY_FILE_BYTES,
    MAX_KEYS,
    ApiKey,
    Quotas,
    digest_of,
    new_key,
    parse_keys,
    read_key_file,
)
from server.edge.admit.keys import Keyring, keyring_of
from server.errors import Refusal
from server.settings import Settings, SettingsFault, load_settings

APP, OPS, OLD = (new_key() for _ in range(3))
FILE = Path("keys.toml")


def digest(key: str) -> str:
    return digest_of(key.encode())


TEXT = f"""
[app]
sha256 = "{digest(APP)}"
adapters = ["imdb-*", "base"]
requests_per_minute = 60
tokens_per_day = 1000
expires = 2999-01-01T00:00:00Z

[ops]
sha256 = "{digest(OPS)}"
admin = true

[old]
sha256 = "{digest(OLD)}"
expires = 2020-01-01T00:00:00Z
"""


def settings(folder: Path, **flags: object) -> Settings:
    folder.mkdir(exist_ok=True)
    return load_settings({"data_dir": folder, **flags})


def bearer(key: str) -> str:
    return f"Bearer {key}"


def code_of(call: object, *arguments: object) -> str:
    with pytest.raises(Refusal) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.code


def test_a_file_says_what_each_key_may() -> None:
    keys = parse_keys(TEXT.encode(), FILE)
    app, ops = keys[digest(APP)], keys[digest(OPS)]
    assert app.quotas == Quotas(requests_per_minute=60, tokens_per_day=1000)
    assert not app.admin
    assert not app.metrics
    assert [app.may_ask(one) for one in ("imdb-1", "imdb", "base", "news")] == [
        True,
        False,
        True,
        False,
    ]
    assert ops.admin
    assert ops.metrics
    assert ops.may_ask("anything")
    assert not ops.quotas.any
    assert not app.is_expired()
    assert keys[digest(OLD)].is_expired()
    assert not keys[digest(OLD)].is_expired(0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[app\n", "not TOML"),
        ("app = 1\n", "outside of a table"),
        ('[app]\nkey = "in clear"\n', "may hold a key in clear"),
        ("[app]\n", "sha256: Field required"),
        ('[app]\nsha256 = "abc"\n', "sha256"),
        (f'["a b"]\nsha256 = "{"0" * 64}"\n', "name of a key is not allowed"),
        (f'[a]\nsha256 = "{"0" * 64}"\nadapterz = ["x"]\n', "adapterz"),
        (f'[a]\nsha256 = "{"0" * 64}"\nadapters = []\n', "adapters"),
        (f'[a]\nsha256 = "{"0" * 64}"\nadapters = ["Imdb"]\n', "adapters.0"),
        (f'[a]\nsha256 = "{"0" * 64}"\nrequests_per_day = 0\n', "requests_per_day"),
        (f'[a]\nsha256 = "{"0" * 64}"\nrequests_per_day = "9"\n', "requests_per_day"),
        (f'[a]\nsha256 = "{"0" * 64}"\nexpires = 2027-01-01T00:00:00\n', "no zone"),
        (f'[a]\nsha256 = "{"0" * 64}"\nadmin = true\nadapters = ["x"]\n', "leave adapters out"),
        (f'[a]\nsha256 = "{"0" * 64}"\n[b]\nsha256 = "{"0" * 64}"\n', "[b] has the key of [a]"),
        ("".join(f"[k{n}]\n" for n in range(MAX_KEYS + 1)), "too many keys"),
    ],
)
def test_a_broken_file_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(SettingsFault) as caught:
        parse_keys(text.encode(), FILE)
    assert said in str(caught.value)
    assert "in clear" not in str(caught.value).replace("a key in clear", "")


def test_all_faults_of_a_file_are_told_at_once() -> None:
    text = '[a]\nsha256 = "1"\n[b]\nsha256 = "2"\nadmin = 3\n'
    with pytest.raises(SettingsFault) as caught:
        parse_keys(text.encode(), FILE)
    assert len(caught.value.faults) == 3


def test_a_file_that_is_missing_or_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsFault, match="cannot be read"):
        read_key_file(tmp_path / "none.toml")
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (KEY_FILE_BYTES + 1))
    with pytest.raises(SettingsFault, match="larger than"):
        read_key_file(large)


def test_who_may_do_what(tmp_path: Path) -> None:
    ring = keyring_of(settings(tmp_path), parse_keys(TEXT.encode(), FILE))
    assert ring.admit_admin(bearer(OPS)).name == "ops"
    found = ring.admit_inference(bearer(APP))
    assert found is not None
    assert found.name == "app"
    ring.admit_metrics(bearer(OPS))
    assert code_of(ring.admit_admin, bearer(APP)) == "key_wrong"
    assert code_of(ring.admit_metrics, bearer(APP)) == "key_wrong"
    assert code_of(ring.admit_metrics, None) == "key_missing"
    assert code_of(ring.admit_inference, None) == "key_missing"
    assert code_of(ring.admit_inference, bearer(digest(APP))) == "key_wrong"
    assert code_of(ring.admit_inference, bearer(OLD)) == "key_expired"
    assert not (tmp_path / "admin.key").exists()


def test_the_simple_settings_go_on_beside_a_file_and_without(tmp_path: Path) -> None:
    simple = settings(tmp_path, admin_key="secret-admin", api_keys=["web=secret-web"])
    for from_file in (None, parse_keys(TEXT.encode(), FILE)):
        ring = keyring_of(simple, from_file)
        assert ring.admit_admin(bearer("secret-admin")).name == "admin"
        assert ring.admit_inference(bearer("secret-web")) == ApiKey("web")
        assert code_of(ring.admit_admin, bearer("secret-web")) == "key_wrong"
    assert keyring_of(settings(tmp_path), None).admit_inference(None) is None
    generated = (tmp_path / "admin.key").read_text().strip()
    keyring_of(settings(tmp_path), None).admit_admin(bearer(generated))


def test_a_name_or_a_key_twice_and_no_admin_are_told(tmp_path: Path) -> None:
    both = settings(tmp_path, api_keys=["app=secret-one", f"other={OPS}"])
    with pytest.raises(SettingsFault) as caught:
        keyring_of(both, parse_keys(TEXT.encode(), FILE))
    assert [one.text.split("]")[0] for one in caught.value.faults[:2]] == [
        "keys_file: [app",
        "keys_file: [ops",
    ]
    alone = f'[app]\nsha256 = "{digest(APP)}"\n'
    with pytest.raises(SettingsFault, match="there is no admin key"):
        keyring_of(settings(tmp_path), parse_keys(alone.encode(), FILE))


def test_an_expired_key_is_refused_from_its_second_on() -> None:
    soon = time.time() + 0.2
    ring = Keyring({digest(APP): ApiKey("app", expires=soon)}, open_to_all=False)
    assert ring.admit_inference(bearer(APP)) is not None
    time.sleep(0.3)
    assert code_of(ring.admit_inference, bearer(APP)) == "key_expired"


def test_new_keys_are_long_and_never_the_same() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) >= 48
