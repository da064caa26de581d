"""The LitSpec: all inference endpoints, over one queue to one worker.

LitServe's own request handlers make a queue operation per request and per token, do not notice a
client that leaves, and hang when the worker dies. The endpoints here go through the dispatcher
instead; it receives the worker's messages as LitServe's response task appends them to the one
response queue that `attach` registers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import MutableMapping
from typing import Any, cast

from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem

from server.edge.endpoints.inference import inference_routes
from server.edge.endpoints.openai import OpenAI
from server.edge.endpoints.ranking import Ranking
from server.edge.endpoints.tei_tgi import TeiTgi
from server.edge.link.dispatcher import Dispatcher
from server.edge.link.envelopes import EVENTS_UID


class HiraSpec(LitSpec):
    """See the module. In the worker process only its path is left of it."""

    def __init__(
        self, native: TeiTgi, ranking: Ranking, openai: OpenAI, dispatcher: Dispatcher
    ) -> None:
        super().__init__()
        self.api_path = "/predict"
        self.dispatcher: Dispatcher | None = dispatcher
        self.routes = inference_routes(native, ranking, openai)
        for route in self.routes:
            self.add_endpoint(route.path, route.endpoint, list(route.methods))

    def __getstate__(self) -> dict[str, Any]:
        # What goes to the worker process: it answers no HTTP.
        return {
            "api_path": self.api_path,
            "_endpoints": [],
            "_server": None,
            "_max_batch_size": 1,
            "response_buffer": None,
            "request_queue": None,
            "response_queue_id": None,
            "dispatcher": None,
            "routes": [],
        }

    @property
    def stream(self) -> bool:
        return True

    def attach(self, buffer: MutableMapping[str, ResponseBufferItem]) -> None:
        """Let LitServe's response task append to the dispatcher, under the one key that is used."""
        # The item's queue only ever sees append(), and its event only set().
        as_queue = cast(deque[Any], self.dispatcher)
        buffer[EVENTS_UID] = ResponseBufferItem(event=asyncio.Event(), response_queue=as_queue)

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """Unused: the endpoints decode."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """Unused: the endpoints encode."""
        return output
