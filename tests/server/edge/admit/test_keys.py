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
from server.edge.admit.keys import Keyring, keyring_of, resolve_admin_key
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
        (f"number = {'9' * 5000}\n", "not TOML"),
        (f"list = {'[' * 3000}\n", "not TOML"),
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


def test_the_generated_admin_key_is_nobody_elses_to_read_and_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "admin.key"
    key, place = resolve_admin_key(None, tmp_path)
    assert place == file
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    assert resolve_admin_key(None, tmp_path) == (key, file)
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("\n")  # of a start that was killed
    fresh, _ = resolve_admin_key(None, tmp_path)
    assert len(fresh) >= 40
    assert fresh != key
    assert file.read_text().strip() == fresh


@pytest.mark.parametrize("header", ["bearer {}", "BEARER {}", "Bearer  {} "])
def test_a_scheme_is_a_scheme_however_it_is_written(header: str) -> None:
    ring = Keyring({digest(APP): ApiKey("app")}, open_to_all=False)
    assert ring.admit_inference(header.format(APP)) == ApiKey("app")


@pytest.mark.parametrize("header", ["Basic {}", "{}", "Bearer", "Bearer  ", "", " {}"])
def test_what_is_no_bearer_token_is_no_key(header: str) -> None:
    ring = Keyring({digest(APP): ApiKey("app")}, open_to_all=False)
    assert code_of(ring.admit_inference, header.format(APP)) == "key_missing"


def test_bytes_that_are_no_text_are_a_wrong_key() -> None:
    ring = Keyring({digest(APP): ApiKey("app")}, open_to_all=False)
    assert code_of(ring.admit_inference, "Bearer \udcff\udcfe") == "key_wrong"


def test_an_admin_key_that_stands_among_the_others_once_more_stays_one(tmp_path: Path) -> None:
    simple = settings(
        tmp_path, admin_key="secret-admin", api_keys=["web=secret-admin", "a=key-a-123"]
    )
    ring = keyring_of(simple, None)
    assert ring.admit_admin(bearer("secret-admin")).name == "admin"
    assert [one.name for one in ring.named()] == ["a", "admin"]
    assert code_of(ring.admit_inference, None) == "key_missing"
    ring.admit_metrics(None)


def test_metrics_may_be_read_by_a_key_that_may_nothing_else_of_an_admin() -> None:
    text = f'[scrape]\nsha256 = "{digest(APP)}"\nmetrics = true\n'
    ring = Keyring(parse_keys(text.encode(), FILE), open_to_all=False, open_metrics=False)
    ring.admit_metrics(bearer(APP))
    assert code_of(ring.admit_admin, bearer(APP)) == "key_wrong"


def test_keys_are_named_in_order() -> None:
    ring = Keyring({"2": ApiKey("b"), "1": ApiKey("c"), "3": ApiKey("a")}, open_to_all=True)
    assert [one.name for one in ring.named()] == ["a", "b", "c"]


def test_as_many_keys_and_bytes_as_are_allowed_are_taken(tmp_path: Path) -> None:
    entries = [f'[k{n}]\nsha256 = "{n:064x}"\n' for n in range(MAX_KEYS)]
    assert len(parse_keys("".join(entries).encode(), FILE)) == MAX_KEYS
    full = tmp_path / "full.toml"
    full.write_bytes(entries[0].encode().ljust(KEY_FILE_BYTES, b"#"))
    assert len(read_key_file(full)) == 1


def test_a_key_expires_in_the_second_that_is_named() -> None:
    key = ApiKey("app", expires=1000.0)
    assert [key.is_expired(now) for now in (999.9, 1000.0)] == [False, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe", "not TOML"),
        (
            f'[a]\nsha256 = "{"0" * 64}"\nexpires = 9999-12-31T23:59:59-23:00\n'.encode(),
            "outside of the years",
        ),
    ],
)
def test_a_file_that_python_cannot_hold_is_told(text: bytes, said: str) -> None:
    with pytest.raises(SettingsFault, match=said):
        parse_keys(text, FILE)


def test_no_fault_shows_what_may_be_a_key() -> None:
    secret = "a-key-in-the-wrong-place"
    for text in (
        f'[a]\nsha256 = "{secret}"\n',
        f'[a]\nadmin = true\nexpires = "{secret}"\nkey_of_a = "{secret}"\n',
        f'[a]\npassword = "{secret}"\n',
    ):
        with pytest.raises(SettingsFault) as caught:
            parse_keys(text.encode(), FILE)
        extra = [
            one for one in caught.value.faults if "password" in one.text or "key_of" in one.text
        ]
        assert all("the fields are sha256" in (one.fix or "") for one in extra)
        assert secret not in " ".join(
            f"{one.text} {one.found}" for one in caught.value.faults if "expires" not in one.text
        )
    with pytest.raises(SettingsFault) as caught:
        parse_keys(f'[a]\nsha256 = "{"0" * 64}"\nrequests_per_day = -5\n'.encode(), FILE)
    assert (caught.value.faults[0].found, caught.value.faults[0].fix) == ("-5", None)


def test_new_keys_are_long_and_never_the_same() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) >= 48
