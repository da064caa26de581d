"""openai for Python, and the calls of vLLM and TEI for which people use a bare HTTP client."""

from __future__ import annotations

import asyncio

import httpx2
import openai

from tests.stand.client_calls import Calls, Served, raises, run_all

CLIENT = Calls("openai")
PLAIN = Calls("httpx2")
PROMPT = "a fine film"
MESSAGES = [{"role": "user", "content": PROMPT}]


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused-here", max_retries=0)


@CLIENT.call("models.list, models.retrieve")
def models(served: Served) -> None:
    with client(served.encoder) as calls:
        found = {one.id: one for one in calls.models.list()}
        assert {"mood", "relevance"} <= set(found)
        mood = calls.models.retrieve("mood").model_dump()
    assert (mood["task"], mood["labels"]) == ("text-classification", ["bad", "fine", "great"])


@CLIENT.call("completions.create")
def completions(served: Served) -> None:
    with client(served.decoder) as calls:
        told = calls.completions.create(
            model="story", prompt=[PROMPT, "by ann"], max_tokens=5, n=2, logprobs=2, seed=1
        )
        assert len(told.choices) == 4
        scored = calls.completions.create(
            model="story", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
        )
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.token_logprobs or ()) == 4


@CLIENT.call("completions.create, stream")
def completions_stream(served: Served) -> None:
    with client(served.decoder) as calls:
        asked = {"model": "story", "prompt": PROMPT, "max_tokens": 5, "temperature": 0.0}
        whole = calls.completions.create(**asked)  # type: ignore[call-overload]
        parts = list(
            calls.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
        )
    assert "".join(one.choices[0].text for one in parts if one.choices) == whole.choices[0].text
    assert parts[-1].usage is not None


@CLIENT.call("chat.completions.create")
def chat(served: Served) -> None:
    with client(served.decoder) as calls:
        for model, answering in (("story", "story"), ("dummy", "story"), ("", "story")):
            asked = {"model": model, "messages": MESSAGES, "max_completion_tokens": 4}
            told = calls.chat.completions.create(**asked)  # type: ignore[call-overload]
            assert told.model == answering
            assert told.choices[0].message.role == "assistant"


@CLIENT.call("chat.completions.create, stream")
def chat_stream(served: Served) -> None:
    with client(served.decoder) as calls:
        asked = {"model": "story", "messages": MESSAGES, "max_tokens": 5, "temperature": 0.0}
        whole = calls.chat.completions.create(**asked)  # type: ignore[call-overload]
        text = ""
        for part in calls.chat.completions.create(**asked, stream=True):  # type: ignore[call-overload]
            text += part.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content


@CLIENT.call("responses.create, stream, functions")
def responses(served: Served) -> None:
    function = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    history = [
        {"role": "user", "content": PROMPT},
        {"type": "function_call", "call_id": "call00001", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call00001", "output": "fine"},
    ]
    asked = {"model": "story", "max_output_tokens": 5, "temperature": 0.0}
    with client(served.decoder) as calls:
        whole = calls.responses.create(**asked, input=history, tools=[function])  # type: ignore[call-overload]
        events = list(
            calls.responses.create(**asked, input=history, tools=[function], stream=True)  # type: ignore[call-overload]
        )
    assert whole.status == "incomplete"
    assert events[-1].type == "response.incomplete"
    assert whole.output_text == events[-1].response.output_text
    assert [one.name for one in whole.tools] == ["look"]


@CLIENT.call("embeddings.create")
def embeddings(served: Served) -> None:
    with client(served.encoder) as calls:
        # By default it asks for base64 and decodes it.
        told = calls.embeddings.create(model="vectors", input=[PROMPT, "dull"])
        plain = calls.embeddings.create(model="vectors", input=PROMPT, encoding_format="float")
    assert len(told.data) == 2
    assert max(
        abs(a - b) for a, b in zip(told.data[0].embedding, plain.data[0].embedding, strict=True)
    ) < 1e-5  # fmt: skip


@CLIENT.call("AsyncOpenAI: chat, stream, embeddings")
def asynchronous(served: Served) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.decoder}/v1", api_key="x") as calls:
            asked = {"model": "story", "messages": MESSAGES, "max_tokens": 3}
            told = await calls.chat.completions.create(**asked)  # type: ignore[call-overload]
            assert told.choices
            stream = await calls.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
            assert [one async for one in stream]
        async with openai.AsyncOpenAI(base_url=f"{served.encoder}/v1", api_key="x") as calls:
            assert (await calls.embeddings.create(model="vectors", input=PROMPT)).data

    asyncio.run(ask())


@CLIENT.call("NotFoundError, BadRequestError")
def errors(served: Served) -> None:
    with client(served.decoder) as calls:
        with raises(openai.NotFoundError):
            calls.completions.create(model="nobody", prompt=PROMPT)
        with raises(openai.BadRequestError) as caught:
            calls.completions.create(model="story", prompt="very " * 9000)
        assert getattr(caught[0], "code", None) == "context_length_exceeded"
        with raises(openai.BadRequestError):
            calls.completions.create(model="story", prompt=PROMPT, temperature=-1)


@PLAIN.call("vLLM's /v1/score, /v1/rerank")
def score(served: Served) -> None:
    asked = {"model": "relevance", "text_1": PROMPT, "text_2": ["fine", "dull"]}
    told = httpx2.post(f"{served.encoder}/v1/score", json=asked).json()
    assert len(told["data"]) == 2
    asked = {"model": "relevance", "query": PROMPT, "documents": ["fine", "dull"]}
    told = httpx2.post(f"{served.encoder}/v1/rerank", json=asked).json()
    assert {one["index"] for one in told["results"]} == {0, 1}


@PLAIN.call("vLLM's /tokenize, /detokenize, /ping, /version")
def vllm_tokens(served: Served) -> None:
    told = httpx2.post(f"{served.decoder}/tokenize", json={"model": "story", "prompt": PROMPT})
    back = {"model": "story", "tokens": told.json()["tokens"]}
    text = httpx2.post(f"{served.decoder}/detokenize", json=back).json()["prompt"]
    assert PROMPT in text
    chat = {"model": "story", "messages": MESSAGES}
    assert httpx2.post(f"{served.decoder}/tokenize", json=chat).json()["count"] > 3
    assert httpx2.get(f"{served.decoder}/ping").status_code == 200
    assert httpx2.get(f"{served.decoder}/version").json()["version"]


@PLAIN.call("TEI's /embed, /predict, /rerank, /similarity, /tokenize, /decode, /info")
def tei(served: Served) -> None:
    def ask(path: str, body: object) -> object:
        return httpx2.post(f"{served.encoder}{path}", json=body).raise_for_status().json()

    assert ask("/embed?adapter=vectors", {"inputs": [PROMPT], "normalize": True})
    assert ask("/predict?adapter=mood", {"inputs": [["a"], ["b"]], "raw_scores": True})
    assert ask("/rerank", {"query": PROMPT, "texts": ["fine"], "return_text": True})
    sentences = {"source_sentence": PROMPT, "sentences": ["fine"]}
    assert ask("/similarity?adapter=vectors", {"inputs": sentences})
    assert ask("/tokenize", {"inputs": PROMPT})
    assert ask("/decode", {"ids": [5, 6]}) == ["a fine"]
    told = httpx2.get(f"{served.encoder}/info?adapter=mood").json()
    assert told["model_type"]["classifier"]["id2label"]["0"] == "bad"


@PLAIN.call("TGI's /generate, /generate_stream, /tokenize, /info, /health")
def tgi(served: Served) -> None:
    asked = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
    assert httpx2.post(f"{served.decoder}/generate", json=asked).json()["generated_text"]
    lines = httpx2.post(f"{served.decoder}/generate_stream", json=asked).text
    assert lines.startswith("data:")
    told = httpx2.post(f"{served.decoder}/tokenize", json={"inputs": PROMPT}).json()
    assert [one["text"] for one in told][-1] == "film"
    assert httpx2.get(f"{served.decoder}/info").json()["max_total_tokens"]
    assert httpx2.get(f"{served.decoder}/health").status_code == 200


if __name__ == "__main__":
    run_all(CLIENT, PLAIN)
