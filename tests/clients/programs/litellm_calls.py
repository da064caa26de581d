"""LiteLLM, through its providers for servers like OpenAI's."""

from __future__ import annotations

import asyncio

import litellm

from tests.stand.client_calls import Calls, Served, raises, run_all

CLIENT = Calls("litellm")
PROMPT = "a fine film"
MESSAGES = [{"role": "user", "content": PROMPT}]


def of(url: str) -> dict[str, str]:
    return {"api_base": f"{url}/v1", "api_key": "unused-here"}


@CLIENT.call("completion, stream, acompletion (openai/)")
def completion(served: Served) -> None:
    asked = {"model": "openai/story", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    whole = litellm.completion(**asked, **of(served.decoder))
    parts = litellm.completion(**asked, stream=True, **of(served.decoder))
    text = "".join(one.choices[0].delta.content or "" for one in parts)
    assert text == whole.choices[0].message.content
    told = asyncio.run(litellm.acompletion(**asked, **of(served.decoder)))
    assert told.choices[0].message.content == text


@CLIENT.call("completion (hosted_vllm/)")
def hosted_vllm(served: Served) -> None:
    told = litellm.completion(
        model="hosted_vllm/story", messages=MESSAGES, max_tokens=4, **of(served.decoder)
    )
    assert told.choices[0].message.role == "assistant"


@CLIENT.call("text_completion")
def text_completion(served: Served) -> None:
    told = litellm.text_completion(
        model="text-completion-openai/story", prompt=PROMPT, max_tokens=4, **of(served.decoder)
    )
    assert told.choices[0].text is not None


@CLIENT.call("embedding")
def embedding(served: Served) -> None:
    told = litellm.embedding(model="openai/vectors", input=[PROMPT], **of(served.encoder))
    assert told.data[0]["embedding"]


@CLIENT.call("rerank (hosted_vllm/)")
def rerank(served: Served) -> None:
    told = litellm.rerank(
        model="hosted_vllm/relevance", query=PROMPT, documents=["fine", "dull"],
        api_base=f"{served.encoder}/v1", api_key="unused-here",
    )  # fmt: skip
    assert len(told.results) == 2


@CLIENT.call("ContextWindowExceededError and context_window_fallbacks")
def context(served: Served) -> None:
    long = [{"role": "user", "content": "very " * 9000}]
    with raises(litellm.ContextWindowExceededError):
        litellm.completion(model="openai/story", messages=long, **of(served.decoder))
    one = {"api_base": f"{served.decoder}/v1", "api_key": "unused-here"}
    router = litellm.Router(
        model_list=[
            {"model_name": "small", "litellm_params": {"model": "openai/story", **one}},
            {
                "model_name": "large",
                "litellm_params": {
                    "model": "openai/story", "mock_response": "from the large one", **one
                },
            },
        ],
        context_window_fallbacks=[{"small": ["large"]}],
        num_retries=0,
    )  # fmt: skip
    told = router.completion(model="small", messages=long)
    assert told.choices[0].message.content == "from the large one"


@CLIENT.call("NotFoundError")
def errors(served: Served) -> None:
    with raises(litellm.NotFoundError):
        litellm.completion(
            model="openai/nobody", messages=MESSAGES, num_retries=0, **of(served.decoder)
        )


if __name__ == "__main__":
    run_all(CLIENT)
