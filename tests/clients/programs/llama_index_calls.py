"""LlamaIndex: its class for servers like OpenAI's, and its classes for TEI."""

from __future__ import annotations

import asyncio

from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.llms.openai_like import OpenAILike
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference as TEIRerank

from tests.stand.client_calls import Calls, Served, run_all

LIKE = Calls("llama-index-llms-openai-like")
VECTORS = Calls("llama-index-embeddings-text-embeddings-inference")
RANKS = Calls("llama-index-postprocessor-tei-rerank")
PROMPT = "a fine film"


def like(served: Served, *, chat: bool) -> OpenAILike:
    return OpenAILike(
        model="story",
        api_base=f"{served.decoder}/v1",
        api_key="unused-here",
        is_chat_model=chat,
        temperature=0.0,
        max_tokens=5,
        context_window=512,
    )


@LIKE.call("OpenAILike: complete, stream_complete")
def complete(served: Served) -> None:
    model = like(served, chat=False)
    whole = model.complete(PROMPT).text
    assert [*model.stream_complete(PROMPT)][-1].text == whole


@LIKE.call("OpenAILike: chat, stream_chat, achat")
def chat(served: Served) -> None:
    model = like(served, chat=True)
    messages = [ChatMessage(role="user", content=PROMPT)]
    whole = model.chat(messages).message.content
    assert [*model.stream_chat(messages)][-1].message.content == whole
    assert asyncio.run(model.achat(messages)).message.content == whole


@VECTORS.call("TextEmbeddingsInference")
def vectors(served: Served) -> None:
    model = TextEmbeddingsInference(
        model_name="vectors", base_url=served.encoder, endpoint="/embed?adapter=vectors"
    )
    many = model.get_text_embedding_batch([PROMPT, "dull"])
    assert len(many) == 2
    assert model.get_query_embedding(PROMPT)
    assert asyncio.run(model.aget_text_embedding(PROMPT))


@RANKS.call("TextEmbeddingInference (rerank)")
def rerank(served: Served) -> None:
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.1) for text in ("fine", "dull", "a")]
    model = TEIRerank(base_url=served.encoder, top_n=2)
    ranked = model.postprocess_nodes(nodes, query_str=PROMPT)
    assert len(ranked) == 2
    assert ranked[0].score >= ranked[1].score


if __name__ == "__main__":
    run_all(LIKE, VECTORS, RANKS)
