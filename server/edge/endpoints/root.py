"""The server's root as the address of one model: clients that know no paths post there.

What answers is the call of the adapter's task, or else of the base's own; a body that can only be
for another call goes to that one.
"""

from __future__ import annotations

from typing import Any

from fastapi import Depends, Request, Response
from pydantic import RootModel

from server.edge.endpoints.adapter_named import Named, adapter_names
from server.edge.endpoints.answers import json_response
from server.edge.endpoints.body import ValidatedBody, checked, sent_json
from server.edge.endpoints.ranking import Ranking
from server.edge.endpoints.schemas import EmbedRequest, GenerateRequestBody, PredictRequest
from server.edge.endpoints.schemas_ranking import AnyRerankRequest, SimilarityRequest
from server.edge.endpoints.tei_tgi import TeiTgi


class AnyBody(RootModel[dict[str, Any]]):
    """The body of /predict, /embed, /generate, /rerank or /similarity."""


ANY_BODY: Any = Depends(sent_json(AnyBody))


class RootEndpoint:
    """The endpoint; one object per server.

    Args:
        tei_tgi, ranking: What answers.
    """

    def __init__(self, tei_tgi: TeiTgi, ranking: Ranking) -> None:
        self.tei_tgi = tei_tgi
        self.ranking = ranking

    async def answer(
        self, request: Request, adapter: str | None = Named, sent: AnyBody = ANY_BODY
    ) -> Response:
        """Answer by the task of the adapter, or of the base where none is named."""
        content = sent.root
        own = content.get("adapter")
        names = (*adapter_names(request, adapter), own if isinstance(own, str) else None)
        inputs = content.get("inputs")
        if isinstance(inputs, dict) and "question" not in inputs:
            body = checked(SimilarityRequest, content)
            return await self.ranking.similarity(request, body, adapter)
        path = "/rerank" if "query" in content else self.tei_tgi.service.targets.own_path(names)
        match path:
            case "/rerank":
                ranked = checked(AnyRerankRequest, content)
                return await self.ranking.rerank(request, adapter, ranked)
            case "/generate":
                return await self._generate(request, checked(GenerateRequestBody, content), adapter)
            case "/embed":
                embedded = ValidatedBody(checked(EmbedRequest, content))
                return await self.tei_tgi.embed(request, adapter, embedded)
            case _:
                predicted = ValidatedBody(checked(PredictRequest, content))
                return await self.tei_tgi.predict(request, adapter, predicted)

    async def _generate(
        self, request: Request, body: GenerateRequestBody, adapter: str | None
    ) -> Response:
        """As text-generation-inference answers there: a list with one answer, or a stream."""
        if body.stream:
            return await self.tei_tgi.generate_stream(request, body, adapter)
        answer, headers = await self.tei_tgi.continued(request, body, adapter)
        return await json_response(self.tei_tgi.service, [answer], headers)
