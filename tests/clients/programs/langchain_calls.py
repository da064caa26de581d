"""LangChain's classes for OpenAI's API and for Hugging Face's servers."""

from __future__ import annotations

import asyncio

from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from tests.stand.client_calls import Calls, Served, run_all

OPENAI = Calls("langchain-openai")
HUB = Calls("langchain-huggingface")
PROMPT = "a fine film"


def of_openai(url: str) -> dict[str, str]:
    return {"base_url": f"{url}/v1", "api_key": "unused-here"}


@OPENAI.call("ChatOpenAI: invoke, stream, ainvoke")
def chat(served: Served) -> None:
    model = ChatOpenAI(model="story", temperature=0, max_tokens=5, **of_openai(served.decoder))
    whole = model.invoke(PROMPT)
    assert whole.response_metadata["model_name"] == "story"
    assert "".join(one.content for one in model.stream(PROMPT)) == whole.content
    assert asyncio.run(model.ainvoke(PROMPT)).content == whole.content


@OPENAI.call("OpenAI: invoke, stream, batch")
def completion(served: Served) -> None:
    model = OpenAI(model="story", temperature=0, max_tokens=5, **of_openai(served.decoder))
    whole = model.invoke(PROMPT)
    assert "".join(model.stream(PROMPT)) == whole
    assert model.batch([PROMPT, PROMPT]) == [whole, whole]


@OPENAI.call("OpenAIEmbeddings")
def vectors(served: Served) -> None:
    # Texts as they are: the default sends token ids of a vocabulary of OpenAI's own.
    model = OpenAIEmbeddings(
        model="vectors", check_embedding_ctx_length=False, **of_openai(served.encoder)
    )
    assert len(model.embed_documents([PROMPT, "dull"])) == 2
    assert model.embed_query(PROMPT)


@HUB.call("HuggingFaceEndpoint, its defaults: invoke")
def endpoint(served: Served) -> None:
    model = HuggingFaceEndpoint(endpoint_url=f"{served.decoder}/?adapter=story")
    assert isinstance(model.invoke(PROMPT), str)


@HUB.call("HuggingFaceEndpoint: stream, ainvoke")
def endpoint_stream(served: Served) -> None:
    model = HuggingFaceEndpoint(
        endpoint_url=f"{served.decoder}/?adapter=story", max_new_tokens=5, seed=1
    )
    assert list(model.stream(PROMPT))
    assert isinstance(asyncio.run(model.ainvoke(PROMPT)), str)


@HUB.call("ChatHuggingFace")
def hub_chat(served: Served) -> None:
    model = ChatHuggingFace(
        llm=HuggingFaceEndpoint(endpoint_url=served.decoder, max_new_tokens=5),
        model_id="story",
    )
    assert isinstance(model.invoke(PROMPT).content, str)


if __name__ == "__main__":
    run_all(OPENAI, HUB)
