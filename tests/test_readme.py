"""The blocks of the README and of docs/ do what they say: curl lines against a running demo, Python
as it is.

The line below a curl line that begins with `#` is what must come out; `...` stands for anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.demo import ADAPTERS_DIR, BASE_DIR
from tests.stand.live import Live, hira

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str, *pages: Path) -> list[str]:
    """The blocks of a language in the pages, or in all."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    return [block for path in pages or PAGES for block in fence.findall(path.read_text())]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hira(tmp_path_factory.mktemp("readme") / "data", anew=True) as server:
        yield server


def test_there_are_blocks_to_run() -> None:
    assert len(blocks("bash", PAGES[0])) == 3
    assert len(blocks("bash")) >= 10
    assert len(blocks("python")) == 3


@pytest.mark.http
@pytest.mark.parametrize("block", blocks("bash"))
def test_curl_lines_answer_as_shown(live: Live, block: str) -> None:
    lines = block.splitlines()
    expected = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    script = "\n".join(line for line in lines if not line.startswith("# "))
    found = subprocess.run(
        ["bash", "-ec", script.replace("http://127.0.0.1:8000", live.url)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    for line in expected:
        pattern = ".*".join(map(re.escape, line.split("...")))
        assert re.match(pattern, found, flags=re.DOTALL), f"{found[:500]!r} is not like {line!r}"


@pytest.mark.http
def test_two_generation_adapters_differ(live: Live) -> None:
    generators = [
        one["id"]
        for one in live.client.get("/v1/models").json()["data"]
        if one["id"] in ("hira-shakespeare", "hira-wiki", "hira-news")
    ]
    assert len(generators) == 2
    texts = [
        live.client.post(f"/generate?adapter={name}", json={"inputs": "The king"}).json()
        for name in generators
    ]
    assert texts[0] != texts[1]


@pytest.mark.http
@pytest.mark.parametrize("block", [one for one in blocks("python") if "OpenAI" in one])
def test_the_openai_client_is_answered(live: Live, block: str) -> None:
    script = block.replace("http://127.0.0.1:8000", live.url)
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip()


@pytest.mark.http
def test_an_adapter_that_the_pages_train_can_be_served(live: Live, tmp_path: Path) -> None:
    (block,) = (one for one in blocks("python") if "get_peft_model" in one)
    script = block.replace("server/demo/base", str(BASE_DIR))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    key = (live.folder / "admin.key").read_text().strip()
    command = [
        *(sys.executable, "-c", "from server.cli.main import main; main()"),
        *("adapters", "add", "my-adapter", "my-adapter", "--url", live.url, "--key", key),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, env=environment)
    answer = live.client.post("/predict?adapter=my-adapter", json={"inputs": "fine"})
    assert [one["label"] for one in answer.json()]


def test_every_demo_adapter_has_a_card_with_its_score() -> None:
    folders = [path for path in ADAPTERS_DIR.iterdir() if path.is_dir()]
    assert len(folders) >= 5
    for folder in folders:
        assert re.search(r"accuracy|perplexity", (folder / "README.md").read_text(), re.IGNORECASE)
