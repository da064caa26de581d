"""Where each client runs: its own environment, because what several of them require excludes what
the server requires (``openai`` below 3, ``huggingface_hub`` below 1).

``python -m tests.clients --install`` makes those that are missing, in ``.clients`` of the checkout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.stand.client_calls import Served

ROOT: Final = Path(__file__).parents[2]
HOMES: Final = ROOT / ".clients"
PROGRAMS: Final = ROOT / "tests" / "clients" / "programs"
REQUIREMENTS: Final = ROOT / "tests" / "clients" / "requirements"
JAVASCRIPT: Final = "openai@6.49.0"
TRY_S: Final = 900.0  # of imports and calls, on a machine that does other work


@dataclass(frozen=True)
class Outcome:
    """What became of one call."""

    client: str
    version: str
    call: str
    error: str | None


@dataclass(frozen=True)
class Environment:
    """One environment and the program that is run in it.

    Args:
        name: Of its folder, and of its file of requirements.
        program: A module of ``tests.clients.programs``, or a file for node.
        needs: What has to be importable for a program that runs in the server's own environment.
    """

    name: str
    program: str
    needs: tuple[str, ...] = ()

    @property
    def home(self) -> Path:
        return HOMES / self.name

    @property
    def is_javascript(self) -> bool:
        return self.program.endswith(".mjs")

    def lacking(self) -> str | None:
        """Why it cannot be run here; None where it can."""
        if self.needs:
            missing = [one for one in self.needs if importlib.util.find_spec(one) is None]
            return f"not installed: {', '.join(missing)}" if missing else None
        if self.is_javascript and shutil.which("node") is None:
            return "there is no node"
        there = self.home / ("node_modules/openai" if self.is_javascript else "bin/python")
        if there.exists():
            return None
        return f"the environment of {self.name} is not there: python -m tests.clients --install"

    def install(self) -> None:
        """Make the environment with the pinned versions.

        Raises:
            subprocess.CalledProcessError: pip or npm failed.
        """
        if self.needs or self.lacking() is None:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        if self.is_javascript:
            npm = ["npm", "install", "--silent", "--no-fund", "--no-audit", JAVASCRIPT]
            (self.home / "package.json").write_text('{"private": true}\n')
            subprocess.run(npm, cwd=self.home, check=True)
            return
        subprocess.run([sys.executable, "-m", "venv", self.home], check=True)
        pip = [str(self.home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        wanted = str(REQUIREMENTS / f"{self.name}.txt")
        subprocess.run([*pip, "--disable-pip-version-check", "-r", wanted], check=True)

    def run(self, served: Served) -> list[Outcome]:
        """Run its program against two servers.

        Raises:
            AssertionError: It ended before its last call.
        """
        done = subprocess.run(
            [*self._command(), served.encoder, served.decoder],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
                "CLIENT_HOME": str(self.home),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # what it would fetch is no part of this
                "HF_HUB_OFFLINE": "0",
            },
            capture_output=True,
            text=True,
            timeout=TRY_S,
            check=False,
        )
        lines = [one for one in done.stdout.splitlines() if one.startswith('{"client"')]
        assert done.returncode == 0, done.stderr[-2000:]
        return [Outcome(**json.loads(one)) for one in lines]

    def _command(self) -> Sequence[str]:
        if self.is_javascript:
            return ["node", str(PROGRAMS / self.program)]
        python = sys.executable if self.needs else str(self.home / "bin" / "python")
        return [python, "-m", f"tests.clients.programs.{self.program}"]


ENVIRONMENTS: Final = (
    Environment("hub", "hub_calls", needs=("huggingface_hub",)),
    Environment("openai", "openai_calls", needs=("openai", "httpx2")),
    Environment("text-generation", "text_generation_calls"),
    Environment("langchain", "langchain_calls"),
    Environment("llama-index", "llama_index_calls"),
    Environment("litellm", "litellm_calls"),
    Environment("openai-js", "openai_js_calls.mjs"),
)
