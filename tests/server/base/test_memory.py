"""Memory: what a container leaves, and a base that does not fit ends the start with one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoConfig

from server.base import load as base_model
from server.base.load import BaseModelError, load_base
from server.base.memory import StaticBytes, available_bytes, later_bytes, static_bytes
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
    tmp_path: Path,
) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    plain = tiny_bases.options(base, tmp_path / "store")
    static = replace(plain, decode_steps="static", encode_batches="static")
    config = AutoConfig.from_pretrained(base)
    nothing, both, texts = (
        static_bytes(one, config, torch.float32, generates)
        for one, generates in ((plain, True), (static, True), (static, False))
    )
    inner, hidden, vocabulary = config.intermediate_size, config.hidden_size, config.vocab_size
    widest = static.max_batch_tokens * (3 * inner + 6 * hidden) * 4
    assert nothing == StaticBytes(0, 0)
    # Graphs share their memory, buffers do not.
    assert both.graphs == texts.graphs == widest
    assert both.buffers - texts.buffers == (static.max_sequences + 1) * vocabulary
    assert texts.buffers == static.max_batch_tokens * (hidden * 4 + 28)
    wide = replace(static, max_sequences=1 << 16)
    assert static_bytes(wide, config, torch.float32, True).graphs == (vocabulary << 16) * 24
    used = 16 * plain.max_batch_tokens * (3 * inner + 6 * hidden)
    budgets = static.device_bytes + static.folded_bytes + static.head_bytes
    assert later_bytes(static, config, torch.float32) == budgets + used // 4
    # Every token of a prompt scored: logits of all, twice, and those that are sampled beside them.
    config.vocab_size = vocabulary = 1 << 15
    scored = (2 << 10) * vocabulary * 4 + static.max_sequences * vocabulary * 24
    layer = max(static.max_batch_tokens, 1 << 10) * (3 * inner + 6 * hidden) * 4
    assert scored > layer
    assert later_bytes(static, config, torch.float32, 1 << 10) == budgets + scored


def test_buffers_of_static_steps_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    plain = tiny_bases.options(base, tmp_path / "store")
    # The base takes less than a MiB, and what a static step notes of so many sequences more.
    monkeypatch.setattr(base_model, "available_bytes", lambda: plain.kv_bytes + MIB)
    load_base(plain)
    told = r"and 9 MiB for the buffers of static steps.*with lower max_sequences"
    with pytest.raises(BaseModelError, match=told):
        load_base(replace(plain, decode_steps="static", max_sequences=100_000))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), r"does not fit into memory.*found: MemoryError"),
        (RuntimeError(), r"weights cannot be loaded.*found: RuntimeError"),
        (RuntimeError("no\n such"), r"weights cannot be loaded.*RuntimeError: no such"),
    ],
)
def test_an_error_without_a_text_ends_the_start_with_a_line_as_well(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: str) -> None:
        raise error

    monkeypatch.setattr(base_model, "weights_told_as", fails)
    base = tiny_bases.base_folder(tmp_path, "llama")
    with pytest.raises(BaseModelError, match=told):
        load_base(tiny_bases.options(base, tmp_path / "store"))


def test_static_steps_that_take_more_than_is_left_are_told_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_bases.base_folder(tmp_path, "llama")
    plain = tiny_bases.options(base, tmp_path / "store")
    static = replace(plain, encode_batches="static")
    config = AutoConfig.from_pretrained(base)
    known = static_bytes(static, config, torch.float32, True)
    budgets = plain.device_bytes + plain.folded_bytes + plain.head_bytes
    monkeypatch.setattr(base_model, "choose_device", lambda _: torch.device("cuda"))

    def goes_no_further(_: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(base_model, "weights_told_as", goes_no_further)
    for room, told in ((known.graphs - MIB, True), (known.graphs + 2 * MIB, False)):
        caplog.clear()
        free = plain.kv_bytes + budgets + known.buffers + room
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
        with pytest.raises(BaseModelError, match="cannot be loaded"):
            load_base(static)
        line = f"Static steps take about {known.graphs >> 20} MiB"
        assert (line in caplog.text) == told
        assert "lower device_bytes" not in caplog.text


def test_buffers_of_the_kernels_forms_are_those_of_the_largest_layers() -> None:
    class Conv1D(torch.nn.Module):  # as GPT-2's: in, out
        weight = torch.empty(64, 512, device="meta")

    layers = torch.nn.Sequential(torch.nn.Linear(256, 48, device="meta"), Conv1D())
    found = base_model.most_form_bytes(SimpleNamespace(base_model=layers), 1, torch.bfloat16)
    # One row of rank 128: W0, 256 rows of inputs and of products, and 128 expanded rows.
    assert found == 2 * 512 * 64 + 256 * (2 * 256 + 4 * 512) + 128 * 2 * 256


@pytest.mark.http
@of_one_machine("Ray starts a replica several times and logs each failure")
def test_server_without_the_memory_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    with hira(tmp_path / "data", wait=False, kv_bytes="4096GiB") as live:
        assert live.child.wait(120) == 1
        lines = [one for one in live.log.read_text().splitlines() if one.startswith("hira: ")]
        assert len(lines) == 1
        assert "The base model does not fit into memory" in lines[0]
        assert "Traceback" not in live.log.read_text()
