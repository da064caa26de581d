"""Memory: what a container leaves, and a base that does not fit ends the start with one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig

from server.base import load as base_model
from server.base.load import BaseModelError, load_base
from server.base.memory import available_bytes, static_bytes
from tests.stand import tiny_bases
from tests.stand.live import hira, of_one_machine

MIB = 1 << 20


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    return folder


def none(tmp_path: Path) -> Path:
    return tmp_path / "nothing"


def test_limit_of_a_container_counts(tmp_path: Path) -> None:
    stat = f"anon 5\ninactive_file {3 * MIB}\nactive_file 7"
    group = write(
        tmp_path / "v2", memory__max=100 * MIB, memory__current=40 * MIB, memory__stat=stat
    )
    assert available_bytes(group, none(tmp_path)) == 63 * MIB
    old = write(
        tmp_path / "v1" / "memory",
        memory__limit_in_bytes=100 * MIB,
        memory__usage_in_bytes=40 * MIB,
        memory__stat=f"total_inactive_file {MIB}",
    )
    assert available_bytes(old.parent, none(tmp_path)) == 61 * MIB


def test_limit_of_any_group_above_counts(tmp_path: Path) -> None:
    root = write(tmp_path / "groups", memory__current=MIB)
    write(root / "a", memory__max=30 * MIB, memory__current=10 * MIB)
    write(root / "a" / "b", memory__max=90 * MIB, memory__current=10 * MIB)
    membership = tmp_path / "membership"
    membership.write_text("1:cpu:/x\n0::/a/b\n")
    assert available_bytes(root, membership) == 20 * MIB


@pytest.mark.parametrize("limit", ["max", str(1 << 62), "nonsense"])
def test_no_limit_leaves_the_machines_memory(tmp_path: Path, limit: str) -> None:
    group = write(tmp_path / "v2", memory__max=limit, memory__current=MIB)
    free = psutil.virtual_memory().available
    assert abs(available_bytes(group, none(tmp_path)) - free) < free / 2


def test_base_and_kv_cache_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    options = tiny_bases.options(base, tmp_path / "store")
    monkeypatch.setattr(base_model, "available_bytes", lambda: options.kv_bytes)
    with pytest.raises(BaseModelError, match=r"does not fit.*for the KV cache.*MiB free"):
        load_base(options)


def test_budgets_that_could_outgrow_the_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    options = tiny_bases.options(base, tmp_path / "store")
    monkeypatch.setattr(base_model, "available_bytes", lambda: options.kv_bytes + 64 * MIB)
    load_base(options)
    assert "lower device_bytes" in caplog.text


def test_static_steps_are_in_the_check_of_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    plain = tiny_bases.options(base, tmp_path / "store")
    static = replace(plain, decode_steps="static", encode_batches="static")
    config = AutoConfig.from_pretrained(base)
    known = [static_bytes(one, config, torch.float32, True) for one in (plain, static)]
    inner, hidden = config.intermediate_size, config.hidden_size
    logits = static.max_sequences * config.vocab_size * 25
    assert known == [0, logits + static.max_batch_tokens * (3 * inner + 6 * hidden) * 4]
    assert static_bytes(static, config, torch.float32, False) == known[1] - logits
    free = plain.kv_bytes + 64 * MIB
    monkeypatch.setattr(base_model, "available_bytes", lambda: free)
    load_base(static)
    assert f"static steps take about {known[1] >> 20} MiB" in caplog.text


@pytest.mark.http
@of_one_machine("Ray starts a replica several times and logs each failure")
def test_server_without_the_memory_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    with hira(tmp_path / "data", wait=False, kv_bytes="4096GiB") as live:
        assert live.child.wait(120) == 1
        lines = [one for one in live.log.read_text().splitlines() if one.startswith("hira: ")]
        assert len(lines) == 1
        assert "The base model does not fit into memory" in lines[0]
        assert "Traceback" not in live.log.read_text()
