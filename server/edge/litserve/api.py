"""The LitAPI: builds the engine in the worker process. The loop drives it, the spec feeds it.

LitServe starts one worker per LitAPI, and a base model must be in memory once: so there is one
LitAPI, whatever the number of endpoints.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final, Literal

from litserve import LitAPI
from litserve.loops import LitLoop
from litserve.specs.base import LitSpec

from server.edge.link.engine_like import ENGINE, ENGINE_FAILED, EngineLike, build_engine
from server.edge.link.thread_deaths import watch_threads
from server.edge.link.worker_state import fault_path, replace_text, write_stage
from server.edge.litserve import logs
from server.edge.litserve.parent_death import die_with_parent
from server.options import EngineOptions
from server.stages import listen_to_stages, tell_stage

SETUP_FAILED: Final = 3  # exit status of a worker whose engine could not be built

logger = logging.getLogger(__name__)


def abandon(part: str) -> None:
    """End the worker at once: HTTP processes see it and tell clients, the main one restarts it."""
    logger.error("The worker ends without its %s, and is started anew", part)
    os._exit(ENGINE_FAILED)


class HiraAPI(LitAPI):
    """Pickled into the worker process, where `setup` runs once.

    Args:
        options: For the engine.
        run_dir: Where the worker says how it is.
        spec: The endpoints.
        loop: What drives the engine.
        engine: ``module:attribute`` of what builds the engine from the options.
        log_level, log_format: Of the worker process.
    """

    def __init__(
        self,
        options: EngineOptions,
        run_dir: Path,
        *,
        spec: LitSpec,
        loop: LitLoop,
        engine: str = ENGINE,
        log_level: str = "warning",
        log_format: Literal["text", "json"] = "text",
    ) -> None:
        # stream=True makes LitServe append every message to the response queue that we give it.
        super().__init__(spec=spec, loop=loop, stream=True)
        self.options = options
        self.run_dir = run_dir
        self.engine_path = engine
        self.log_level = log_level
        self.log_format: Literal["text", "json"] = log_format
        self.main_pid = os.getpid()
        self.engine: EngineLike | None = None

    def setup(self, device: str) -> None:
        """Build the engine; ``device`` is LitServe's opinion, the engine follows its options.

        A failure ends the process with one line in the run folder, which the main process reads.
        """
        die_with_parent(self.main_pid)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        logs.configure(self.log_level, access=False, form=self.log_format)
        watch_threads(abandon)  # before the engine makes its own
        listen_to_stages(lambda stage: write_stage(self.run_dir, stage))
        tell_stage("loading torch in the worker")
        try:
            self.engine = build_engine(self.engine_path, self.options)
        except Exception as error:  # noqa: BLE001  # whatever it is, the operator must read it
            line = " ".join(str(error).split()) or type(error).__name__
            if not hasattr(error, "code"):
                line = f"{type(error).__name__}: {line}"
            replace_text(fault_path(self.run_dir, 0), line[:2000])
            sys.exit(SETUP_FAILED)
        finally:
            listen_to_stages(None)

    def decode_request(self, request: Any) -> Any:
        """Unused: the spec's endpoints decode."""
        return request

    def predict(self, x: Any) -> Any:
        """Unused: the loop drives the engine."""
        return x

    def encode_response(self, output: Any) -> Any:
        """Unused: the spec's endpoints encode."""
        return output
