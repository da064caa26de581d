"""text-generation, the client of text-generation-inference."""

from __future__ import annotations

import asyncio

import text_generation
from text_generation import errors

from tests.stand.client_calls import Calls, Served, raises, run_all

CLIENT = Calls("text-generation")
PROMPT = "a fine"
PATIENCE_S = 60


def client(served: Served, adapter: str = "story") -> text_generation.Client:
    return text_generation.Client(f"{served.decoder}/?adapter={adapter}", timeout=PATIENCE_S)


@CLIENT.call("generate")
def generate(served: Served) -> None:
    whole = client(served).generate(PROMPT, max_new_tokens=5)
    assert 1 <= whole.details.generated_tokens <= 5
    drawn = client(served).generate(
        PROMPT, max_new_tokens=5, do_sample=True, temperature=0.8, top_p=0.9, top_k=5,
        typical_p=0.95, repetition_penalty=1.1, seed=1, stop_sequences=["paris"],
    )  # fmt: skip
    assert drawn.generated_text is not None
    scored = client(served).generate(PROMPT, max_new_tokens=1, decoder_input_details=True)
    assert len(scored.details.prefill) == 3


@CLIENT.call("generate, at the server's root")
def generate_by_the_base(served: Served) -> None:
    whole = text_generation.Client(served.decoder, timeout=PATIENCE_S).generate(
        PROMPT, max_new_tokens=5
    )
    assert whole.details.generated_tokens <= 5


@CLIENT.call("generate_stream")
def generate_stream(served: Served) -> None:
    whole = client(served).generate(PROMPT, max_new_tokens=5)
    events = list(client(served).generate_stream(PROMPT, max_new_tokens=5))
    assert events[-1].generated_text == whole.generated_text
    assert events[-1].details.generated_tokens == whole.details.generated_tokens


@CLIENT.call("AsyncClient.generate, generate_stream")
def generate_async(served: Served) -> None:
    async def both() -> tuple[str, str]:
        calls = text_generation.AsyncClient(f"{served.decoder}/?adapter=story", timeout=PATIENCE_S)
        whole = await calls.generate(PROMPT, max_new_tokens=5)
        last = [one async for one in calls.generate_stream(PROMPT, max_new_tokens=5)][-1]
        return whole.generated_text, last.generated_text

    whole, streamed = asyncio.run(both())
    assert whole == streamed


@CLIENT.call("chat")
def chat(served: Served) -> None:
    calls = text_generation.Client(served.decoder, timeout=PATIENCE_S)
    told = calls.chat([{"role": "user", "content": PROMPT}], max_tokens=4, seed=1)
    assert told.model == "story", "the placeholder tgi means the default adapter"
    assert told.choices[0].message.role == "assistant"
    assert told.usage["completion_tokens"] <= 4


@CLIENT.call("ValidationError, NotFoundError")
def error_classes(served: Served) -> None:
    with raises(errors.ValidationError):
        client(served).generate("very " * 9000, max_new_tokens=5)
    with raises(errors.NotFoundError):
        client(served, "nobody").generate(PROMPT)


if __name__ == "__main__":
    run_all(CLIENT)
