"""A start says how far it is, to whoever listens, and to the process that waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.base.weight_progress import weights_told_as
from server.cli.start_progress import StartProgress
from server.edge.link.worker_state import read_stage, stage_path, write_stage
from server.stages import Stage, listen_to_stages, tell_stage


def test_stages_reach_the_one_listener_and_nobody_without_it() -> None:
    heard: list[Stage] = []
    listen_to_stages(heard.append)
    try:
        tell_stage("loading", 1, 3)
    finally:
        listen_to_stages(None)
    tell_stage("nobody listens")
    assert heard == [Stage("loading", 1, 3)]


def test_weights_that_transformers_counts_become_a_stage() -> None:
    from transformers.utils import logging as transformers_logging

    heard: list[Stage] = []
    listen_to_stages(heard.append)
    try:
        with weights_told_as("weights"):
            for _ in transformers_logging.tqdm(range(250), desc="Loading weights"):
                pass
            with transformers_logging.tqdm(total=4) as bar:
                bar.set_description("ornament")
                bar.update(4)
    finally:
        listen_to_stages(None)
    assert heard[0] == Stage("weights", 0, 250)
    assert [one.done for one in heard[1:4]] == [2, 4, 6]
    assert heard[-1] == Stage("weights", 4, 4)


def test_a_worker_says_how_far_it_is_in_the_run_folder(tmp_path: Path) -> None:
    assert read_stage(tmp_path) is None
    write_stage(tmp_path, Stage("loading", 2, 5))
    assert read_stage(tmp_path) == Stage("loading", 2, 5)
    stage_path(tmp_path, 0).write_text("[1]")
    assert read_stage(tmp_path) is None
    write_stage(tmp_path / "gone", Stage("loading"))  # a full disk is no reason to end


def test_a_start_is_one_line_for_each_stage_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = StartProgress(terminal=False)
    for stage in (Stage("a", 0, 2), Stage("a", 1, 2), Stage("b"), Stage("b")):
        shown.show(stage)
    shown.end()
    assert capsys.readouterr().out.splitlines() == ["  a (2) ...", "  b ..."]


def test_a_terminal_shows_bars_and_keeps_the_time_of_each_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = StartProgress(terminal=True)
    shown.show(Stage("a", 1, 2))
    shown.show(Stage("b"))
    shown.give_up()
    lines = [
        line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines() if "0.0" in line
    ]
    assert [line[0].strip()[-1] for line in lines] == ["a"]  # b was not done
