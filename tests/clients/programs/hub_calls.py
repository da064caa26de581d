"""huggingface_hub's InferenceClient: every method for texts that this server has a task for."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.stand.client_calls import Calls, Served, raises, run_all

CLIENT = Calls("huggingface_hub")
TEXT = "a fine film"
LONG = " ".join(["very"] * 90)
MESSAGES = [{"role": "user", "content": TEXT}]


def encoder(served: Served, adapter: str) -> InferenceClient:
    return InferenceClient(model=f"{served.encoder}/?adapter={adapter}")


def story(served: Served) -> InferenceClient:
    return InferenceClient(model=f"{served.decoder}/?adapter=story")


@CLIENT.call("text_generation")
def text_generation(served: Served) -> None:
    whole = story(served).text_generation(TEXT, max_new_tokens=6, details=True)
    assert whole.details is not None
    assert whole.details.generated_tokens <= 6
    drawn: Any = story(served).text_generation(
        TEXT, max_new_tokens=6, typical_p=0.95, top_p=0.95, temperature=0.8, seed=3
    )
    assert isinstance(drawn, str)


@CLIENT.call("text_generation, stream")
def text_generation_stream(served: Served) -> None:
    calls = story(served)  # kept: a client that is let go of closes its streams
    whole: Any = calls.text_generation(TEXT, max_new_tokens=6)
    pieces: Any = calls.text_generation(TEXT, max_new_tokens=6, stream=True)
    assert "".join(pieces).strip() == whole.strip()
    events: Any = calls.text_generation(TEXT, max_new_tokens=6, stream=True, details=True)
    assert list(events)[-1].generated_text == whole


@CLIENT.call("chat_completion")
def chat_completion(served: Served) -> None:
    for model in (served.decoder, f"{served.decoder}/v1/chat/completions"):
        told = InferenceClient(model=model).chat_completion(MESSAGES, max_tokens=4)
        assert told.choices[0].message.role == "assistant"
        assert told.model == "story"


@CLIENT.call("chat_completion, stream")
def chat_completion_stream(served: Served) -> None:
    calls = InferenceClient(model=served.decoder)
    whole = calls.chat_completion(MESSAGES, max_tokens=4, temperature=0.0)
    chunks = calls.chat_completion(MESSAGES, max_tokens=4, temperature=0.0, stream=True)
    text = "".join(one.choices[0].delta.content or "" for one in chunks)
    assert text == whole.choices[0].message.content


@CLIENT.call("chat.completions.create")
def chat_alias(served: Served) -> None:
    calls = InferenceClient(base_url=f"{served.decoder}/v1")
    told = calls.chat.completions.create(messages=MESSAGES, max_tokens=4, model="story")
    assert told.model == "story"


@CLIENT.call("text_classification")
def text_classification(served: Served) -> None:
    # It takes the first of what comes: with TEI's shape, the likeliest label.
    told: Any = encoder(served, "mood").text_classification(TEXT, top_k=2)
    assert told.label in {"bad", "fine", "great"}


@CLIENT.call("token_classification")
def token_classification(served: Served) -> None:
    found = encoder(served, "words").token_classification(TEXT, aggregation_strategy="none")
    assert {one.entity for one in found} <= {"O", "B-PER", "I-PER"}


@CLIENT.call("fill_mask")
def fill_mask(served: Served) -> None:
    found = InferenceClient(model=f"{served.encoder}/").fill_mask("a [MASK] film", top_k=3)
    assert len(found) == 3
    assert 0 < found[0].score <= 1


@CLIENT.call("question_answering")
def question_answering(served: Served) -> None:
    found: Any = encoder(served, "answers").question_answering(
        question="fine", context="a film by ann in paris"
    )
    (one,) = found if isinstance(found, list) else [found]
    assert one.answer in "a film by ann in paris"


@CLIENT.call("feature_extraction: normalize, truncate")
def feature_extraction(served: Served) -> None:
    calls = encoder(served, "vectors")
    plain: Any = calls.feature_extraction(TEXT, normalize=False)
    unit: Any = calls.feature_extraction(TEXT, normalize=True)
    norm = math.sqrt(sum(float(one) ** 2 for one in plain[0]))
    assert max(abs(float(a) - float(b) / norm) for a, b in zip(unit[0], plain[0])) < 1e-5  # noqa: B905
    for side in ("left", "right"):
        cut: Any = calls.feature_extraction(LONG, truncate=True, truncation_direction=side)
        assert len(cut) == 1


@CLIENT.call("sentence_similarity")
def sentence_similarity(served: Served) -> None:
    found = encoder(served, "vectors").sentence_similarity(TEXT, [TEXT, "dull"])
    assert abs(found[0] - 1) < 1e-5
    assert found[1] < 0.9999


@CLIENT.call("AsyncInferenceClient")
def asynchronous(served: Served) -> None:
    async def ask() -> tuple[Any, Any]:
        calls = AsyncInferenceClient(model=f"{served.encoder}/?adapter=mood")
        talk = AsyncInferenceClient(model=served.decoder)
        label = await calls.text_classification(TEXT)
        return label, await talk.chat_completion(MESSAGES, max_tokens=2)

    label, told = asyncio.run(ask())
    assert label
    assert told.choices


@CLIENT.call("HfHubHTTPError")
def errors(served: Served) -> None:
    with raises(HfHubHTTPError) as caught:
        encoder(served, "nobody").text_classification(TEXT)
    assert "nobody" in str(caught[0])


if __name__ == "__main__":
    run_all(CLIENT)
