"""Bodies of the calls that compare texts: /rerank in two shapes, /v1/score and /similarity.

text-embeddings-inference has ``texts`` and answers with a list; Cohere, Jina and vLLM have
``documents`` and answer with an object. A body has one or the other, so one path takes both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, RootModel, Tag, model_validator

from server.edge.endpoints.openai_body import OpenAIBody, extra_fields
from server.edge.endpoints.schemas import (
    AdapterName,
    Answer,
    Body,
    Flag,
    TextBatch,
    Texts,
    Truncation,
    Whole,
)

AnyTexts = str | Texts


class RerankRequest(Truncation):
    query: str
    texts: TextBatch
    raw_scores: Flag = Field(default=False, description="Bare logits in place of their sigmoids.")
    return_text: Flag = False
    adapter: AdapterName | None = Field(
        default=None, description="The adapter, if not in the query."
    )


class DocumentObject(OpenAIBody):
    text: str


class DocumentsRequest(OpenAIBody):
    model: str | None = None
    query: str
    documents: Annotated[list[str | DocumentObject], Field(fail_fast=True)]
    top_n: Annotated[Whole, Field(ge=0)] | None = Field(
        default=None, description="How many are answered; 0 and the default: all."
    )
    return_documents: bool = True
    truncation: bool = Field(default=False, description="Cut pairs that are too long.")
    use_activation: bool = Field(
        default=True, description="Sigmoids; false: the bare logits, as vLLM has them."
    )

    @property
    def texts(self) -> list[str]:
        return [one if isinstance(one, str) else one.text for one in self.documents]

    def ignored_within(self) -> list[str]:
        objects = (one for one in self.documents if isinstance(one, DocumentObject))
        return extra_fields("documents", objects)


def _shape(content: Any) -> str:
    """Which of the two shapes a body has; tags with a dash are left out of a field's name."""
    if isinstance(content, DocumentsRequest):
        return "with-documents"
    documents = isinstance(content, dict) and "documents" in content and "texts" not in content
    return "with-documents" if documents else "with-texts"


class AnyRerankRequest(
    RootModel[
        Annotated[
            Annotated[RerankRequest, Tag("with-texts")]
            | Annotated[DocumentsRequest, Tag("with-documents")],
            Discriminator(_shape),
        ]
    ]
):
    """A body of /rerank: with ``texts``, or with ``documents``."""


# The two sides of a score, by the names that vLLM takes them by.
_SIDES = (
    ("text_1", "text_2"),
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
)


class ScoreRequest(OpenAIBody):
    model: str | None = None
    text_1: AnyTexts | None = None
    text_2: AnyTexts | None = None
    queries: AnyTexts | None = None
    documents: AnyTexts | None = None
    items: AnyTexts | None = None
    data_1: AnyTexts | None = None
    data_2: AnyTexts | None = None
    truncation: bool = Field(default=False, description="Cut pairs that are too long.")
    use_activation: bool = Field(default=True, description="Sigmoids; false: the bare logits.")

    @model_validator(mode="after")
    def _sides(self) -> Self:
        given = {name for pair in _SIDES for name in pair if getattr(self, name) is not None}
        if given not in [set(pair) for pair in _SIDES]:
            named = " or ".join(f"{one} and {other}" for one, other in _SIDES)
            raise ValueError(f"the two sides are {named}")
        first, second = self.sides
        if len(first) != len(second) and len(first) != 1:
            raise ValueError("the first side has one text, or as many as the second")
        return self

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The texts of both, as lists."""
        for pair in _SIDES:
            first, second = (getattr(self, name) for name in pair)
            if first is not None and second is not None:
                return _as_texts(first), _as_texts(second)
        return [], []

    @property
    def pairs(self) -> list[tuple[str, str]]:
        first, second = self.sides
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


def _as_texts(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


class SimilarityInputs(Body):
    source_sentence: str
    sentences: Texts


class SimilarityParameters(Truncation):
    prompt_name: str | None = Field(
        default=None, description="Of prompts that a base names; this server knows none."
    )


class SimilarityRequest(Body):
    inputs: SimilarityInputs
    parameters: SimilarityParameters = SimilarityParameters()
    adapter: AdapterName | None = None


class Rank(Answer):
    index: int
    score: float
    text: str | None = None


class RankedDocument(Answer):
    text: str


class RankedResult(Answer):
    index: int
    relevance_score: float
    document: RankedDocument | None = None


class RankingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Reranked(Answer):
    id: str
    model: str
    results: list[RankedResult]
    usage: RankingUsage


class Score(Answer):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(Answer):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: RankingUsage
