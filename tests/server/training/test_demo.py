"""The adapters of the demo, made anew from texts of a few lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from adapters.inspection.audit import audit
from server.demo import ADAPTERS_DIR
from server.training import demo

KEPT = sorted(folder.name for folder in ADAPTERS_DIR.iterdir())
TEXTS = {
    "hira-sst2": "text\tlabel\nfine\t1\nbad\t0\ngood\t1\npoor\t0\n",
    "hira-wiki": " = A title = \n\n A well @-@ known <unk> .\n" * 20,
}


@pytest.mark.parametrize("name", KEPT)
def test_recipe_of_every_adapter_is_that_of_the_one_that_is_kept(name: str) -> None:
    recipe, _, labels = demo.RECIPES[name]
    config = json.loads((ADAPTERS_DIR / name / "adapter_config.json").read_text())
    assert (recipe.method, recipe.rank) == (config["peft_type"].lower(), config["r"])
    assert recipe.task_type == config["task_type"]
    assert set(recipe.targets) == set(config["target_modules"])
    assert labels == (audit(ADAPTERS_DIR / name).labels or ())
    assert demo.RECIPES.keys() == set(KEPT)


@pytest.mark.parametrize("name", TEXTS)
def test_an_adapter_is_made_like_the_one_that_is_kept(name: str, tmp_path: Path) -> None:
    source = tmp_path / demo.RECIPES[name][1]
    source.parent.mkdir()
    source.write_bytes(gzip.compress(TEXTS[name].encode()))
    demo.main([name, "--data", str(tmp_path), "--out", str(tmp_path / "made")])
    made, kept = audit(tmp_path / "made" / name), audit(ADAPTERS_DIR / name)
    assert made.contradictions == ()
    assert made.tensors is not None
    assert kept.tensors is not None
    assert (made.tensors.ranks, made.tensors.head) == (kept.tensors.ranks, kept.tensors.head)
    assert (made.labels, made.tensors.layers) == (kept.labels, kept.tensors.layers)


def test_wiki_text_is_spaced_as_people_do() -> None:
    found = demo.ordinary_spacing(
        'the well @-@ known " Town Hall " ( <unk> ) has 1 @,@ 000 seats .'
    )
    assert found == 'the well-known "Town Hall" has 1,000 seats.'


def test_an_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["hira-none", "--data", str(tmp_path)])
    assert "found hira-none, expected one of hira-imdb" in capsys.readouterr().err
