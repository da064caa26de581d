"""The inference endpoints: every path, what answers it, and what the OpenAPI document says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from server.edge.endpoints.body import described_json, form_schema
from server.edge.endpoints.model_facts import ServedModelEndpoint
from server.edge.endpoints.openai import OpenAI
from server.edge.endpoints.openapi import SSE_TYPE
from server.edge.endpoints.ranking import Ranking
from server.edge.endpoints.responses import Responses
from server.edge.endpoints.root import AnyBody, RootEndpoint
from server.edge.endpoints.routes import OPENAI_STATUSES, Endpoint
from server.edge.endpoints.schemas import (
    EmbedRequest,
    GenerateAnswer,
    GenerateRequestBody,
    Prediction,
    PredictRequest,
    StreamEvent,
)
from server.edge.endpoints.schemas_conversation import ChatRequest
from server.edge.endpoints.schemas_openai import CompletionRequest, EmbeddingRequest
from server.edge.endpoints.schemas_openai_answers import (
    ChatCompletion,
    Completion,
    EmbeddingList,
    Model,
    ModelList,
    OpenAIError,
)
from server.edge.endpoints.schemas_ranking import (
    AnyRerankRequest,
    DocumentsRequest,
    Rank,
    Reranked,
    ScoreList,
    ScoreRequest,
    SimilarityRequest,
)
from server.edge.endpoints.schemas_responses import ResponseAnswer, ResponseRequest
from server.edge.endpoints.schemas_tokens import (
    AnyDetokenizeRequest,
    AnyTokenizeRequest,
    CountedTokens,
    DecodeRequest,
    DetokenizedPrompt,
    PlacedToken,
    ServedModel,
)
from server.edge.endpoints.tei_tgi import TeiTgi
from server.edge.endpoints.tokens import TokenEndpoints
from server.version import package_version


def inference_routes(native: TeiTgi, ranking: Ranking, openai: OpenAI) -> list[Endpoint]:
    def plain(
        path: str, endpoint: Callable[..., Any], answer: Any, body: dict[str, Any], **more: Any
    ) -> Endpoint:
        return Endpoint(path, endpoint, ("POST",), "Native", answer, extra=body, **more)

    def v1(
        path: str,
        endpoint: Callable[..., Any],
        answer: Any,
        body: type[BaseModel] | None = None,
        *,
        streams: bool = False,
    ) -> Endpoint:
        return Endpoint(
            path,
            endpoint,
            ("GET",) if body is None else ("POST",),
            "OpenAI",
            answer,
            error=OpenAIError,
            statuses=OPENAI_STATUSES,
            streams=streams,
            extra=described_json(body) if body else {},
        )

    tokens = TokenEndpoints(native.service)
    facts = ServedModelEndpoint(native.service, package_version())
    generation = described_json(GenerateRequestBody)
    documents, pairs = described_json(DocumentsRequest), described_json(SimilarityRequest)
    return [
        Endpoint(
            "/",
            RootEndpoint(native, ranking).answer,
            ("POST",),
            "Native",
            streams=True,
            extra=described_json(AnyBody),
        ),
        plain(
            "/predict", native.predict, Prediction | list[Prediction], form_schema(PredictRequest)
        ),
        plain("/embed", native.embed, list[list[float]], form_schema(EmbedRequest)),
        plain("/rerank", ranking.rerank, list[Rank] | Reranked, described_json(AnyRerankRequest)),
        plain("/v2/rerank", ranking.rerank_documents, Reranked, documents),
        plain("/similarity", ranking.similarity, list[float], pairs),
        plain("/generate", native.generate, GenerateAnswer, generation, streams=True),
        plain(
            "/generate_stream", native.generate_stream, StreamEvent, generation, media_type=SSE_TYPE
        ),
        Endpoint("/info", facts.describe, ("GET",), "Native", ServedModel),
        plain(
            "/tokenize",
            tokens.tokenize,
            list[PlacedToken] | list[list[PlacedToken]] | CountedTokens,
            described_json(AnyTokenizeRequest),
        ),
        plain(
            "/detokenize",
            tokens.detokenize,
            list[str] | DetokenizedPrompt,
            described_json(AnyDetokenizeRequest),
        ),
        plain("/decode", tokens.decode, list[str], described_json(DecodeRequest)),
        v1("/v1/models", openai.models, ModelList),
        v1("/v1/models/{model:path}", openai.model, Model),
        v1("/v1/completions", openai.completions, Completion, CompletionRequest, streams=True),
        v1(
            "/v1/chat/completions",
            openai.chat_completions,
            ChatCompletion,
            ChatRequest,
            streams=True,
        ),
        v1(
            "/v1/responses",
            Responses(openai).create,
            ResponseAnswer,
            ResponseRequest,
            streams=True,
        ),
        v1("/v1/rerank", ranking.rerank_documents, Reranked, DocumentsRequest),
        v1("/v1/score", ranking.score, ScoreList, ScoreRequest),
        v1("/v1/embeddings", openai.embeddings, EmbeddingList, EmbeddingRequest),
    ]
