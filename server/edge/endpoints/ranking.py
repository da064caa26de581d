"""The calls that compare texts: /rerank and /v1/score by cross-encoders, /similarity by vectors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import Depends, Request, Response

from server.edge.endpoints.adapter_named import Named, adapter_names
from server.edge.endpoints.answers import (
    answer_headers,
    check_fields,
    check_inputs,
    encode,
    json_response,
    resolved,
    tokenized,
)
from server.edge.endpoints.body import sent_json
from server.edge.endpoints.schemas_ranking import (
    AnyRerankRequest,
    DocumentsRequest,
    ScoreRequest,
    SimilarityRequest,
)
from server.edge.endpoints.tei_tgi import check_prompt_name
from server.edge.service import Service
from server.edge.target import Target
from server.inputs.text import Side
from server.messages import EncodeResult

ANY_RERANK_BODY: Any = Depends(sent_json(AnyRerankRequest))
DOCUMENTS_BODY: Any = Depends(sent_json(DocumentsRequest))
SCORE_BODY: Any = Depends(sent_json(ScoreRequest))
SIMILARITY_BODY: Any = Depends(sent_json(SimilarityRequest))


class Ranking:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def rerank(
        self,
        request: Request,
        adapter: str | None = Named,
        sent: AnyRerankRequest = ANY_RERANK_BODY,
    ) -> Response:
        """Order texts by their relevance to a query, the most relevant first."""
        body = sent.root
        if isinstance(body, DocumentsRequest):
            return await self.rerank_documents(request, body)
        target = self._target(request, (*adapter_names(request, adapter), body.adapter), "adapter")
        result = await self._scores(
            request,
            target,
            [(body.query, text) for text in body.texts],
            "texts",
            raw=body.raw_scores,
            truncation=body.truncate,
            side=body.side,
        )
        ranks: list[dict[str, Any]] = [
            {"index": index, "score": score} for index, score in _ordered(result.outputs)
        ]
        if body.return_text:
            ranks = [{**one, "text": body.texts[one["index"]]} for one in ranks]
        return await json_response(self.service, ranks, answer_headers(target, result))

    async def rerank_documents(
        self, request: Request, body: DocumentsRequest = DOCUMENTS_BODY
    ) -> Response:
        """The same with the bodies of Cohere, Jina and vLLM; ``model`` names the adapter."""
        target = self._openai_target(request, body)
        texts = body.texts
        result = await self._scores(
            request,
            target,
            [(body.query, text) for text in texts],
            "documents",
            raw=not body.use_activation,
            truncation=body.truncation,
        )
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": score}
            for index, score in _ordered(result.outputs)[: body.top_n or None]
        ]
        if body.return_documents:
            results = [{**one, "document": {"text": texts[one["index"]]}} for one in results]
        answer = {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": body.model or target.shown,
            "results": results,
            "usage": _ranking_usage(result),
        }
        return await json_response(self.service, answer, answer_headers(target, result))

    async def score(self, request: Request, body: ScoreRequest = SCORE_BODY) -> Response:
        """The relevance of pairs of texts, in the order in which they came."""
        target = self._openai_target(request, body)
        result = await self._scores(
            request,
            target,
            body.pairs,
            "text_2",
            raw=not body.use_activation,
            truncation=body.truncation,
        )
        answer = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.model or target.shown,
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(result.outputs)
            ],
            "usage": _ranking_usage(result),
        }
        return await json_response(self.service, answer, answer_headers(target, result))

    async def similarity(
        self,
        request: Request,
        body: SimilarityRequest = SIMILARITY_BODY,
        adapter: str | None = Named,
    ) -> Response:
        """The cosine between a sentence and each of some others, by the vectors of /embed."""
        service, parameters = self.service, body.parameters
        check_prompt_name(parameters.prompt_name, "parameters.prompt_name")
        names = (*adapter_names(request, adapter), body.adapter)
        target = resolved(request, service, names, "/embed", call="/similarity")
        sentences = [body.inputs.source_sentence, *body.inputs.sentences]
        # One sentence has none to be compared with.
        check_inputs(len(sentences) if len(sentences) > 1 else 0, service, "inputs.sentences")
        inputs = await tokenized(
            request,
            service,
            sentences,
            target.task,
            truncation=parameters.truncate,
            side=parameters.side,
        )
        result = await encode(
            request, service, target, inputs, task=target.task, options={"normalize": True}
        )
        source, *others = result.outputs
        cosines = [sum(a * b for a, b in zip(source, one, strict=True)) for one in others]
        return await json_response(service, cosines, answer_headers(target, result))

    def _target(
        self, request: Request, names: Sequence[str | None], field: str, user: object = None
    ) -> Target:
        call = request.url.path
        return resolved(request, self.service, names, "/rerank", field, call=call, user=user)

    def _openai_target(self, request: Request, body: DocumentsRequest | ScoreRequest) -> Target:
        check_fields(request, body)
        names = (body.model, *adapter_names(request, None))
        return self._target(request, names, "model", getattr(body, "user", None))

    async def _scores(
        self,
        request: Request,
        target: Target,
        pairs: Sequence[tuple[str, str]],
        field: str,
        *,
        raw: bool,
        truncation: bool,
        side: Side | None = None,
    ) -> EncodeResult:
        """A score for each pair, in order.

        Args:
            pairs: Query and text of each.
            field: Where the body has the texts, for an error.
            raw: Bare logits in place of their sigmoids.
            truncation: Cut pairs that are too long: the longer text first.
            side: Where.
        """
        check_inputs(len(pairs), self.service, field)
        inputs = await tokenized(
            request, self.service, pairs, target.task, truncation=truncation, side=side, field=field
        )
        return await encode(
            request,
            self.service,
            target,
            inputs,
            task=target.task,
            options={"raw_scores": True} if raw else None,
        )


def _ordered(scores: Sequence[float]) -> list[tuple[int, float]]:
    """Places and scores, the highest first; equal ones as they came."""
    return sorted(enumerate(scores), key=lambda one: -one[1])


def _ranking_usage(result: EncodeResult) -> dict[str, int]:
    return {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens}
