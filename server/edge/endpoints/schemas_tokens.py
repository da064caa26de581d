"""Bodies of /tokenize, /detokenize and /decode, in two shapes each, and the answer of /info.

text-embeddings-inference and text-generation-inference have ``inputs`` and ``ids`` and answer with
tokens and where they stand; vLLM has ``prompt``, ``messages`` and ``tokens`` and answers with ids.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, RootModel, Tag

from server.edge.endpoints.openai_body import OpenAIBody
from server.edge.endpoints.schemas import AdapterName, Answer, Body, Flag, TextBatch
from server.edge.endpoints.schemas_conversation import ConversationBody
from server.edge.endpoints.schemas_openai import IdLists, Ids


class TokenizeRequest(Body):
    inputs: str | TextBatch = Field(description="A text, or several.")
    add_special_tokens: Flag = Field(default=True, description="Those of the base's tokenizer.")
    prompt_name: str | None = Field(
        default=None, description="Of prompts that a base names; this server knows none."
    )
    adapter: AdapterName | None = None


class TokenizePromptRequest(OpenAIBody):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = Field(default=False, description="Also as the vocabulary has them.")


class TokenizeChatRequest(ConversationBody):
    add_special_tokens: bool = False
    add_generation_prompt: Literal[True] = Field(
        default=True, description="As a chat has it: what is counted is what would be sent."
    )
    continue_final_message: Literal[False] = False
    return_token_strs: bool = False


def _tokenize_shape(content: Any) -> str:
    """Which shape a body has; tags with a dash are left out of a field's name."""
    if isinstance(content, dict) and "inputs" not in content:
        if "messages" in content:
            return "with-messages"
        if "prompt" in content:
            return "with-prompt"
    return "with-inputs"


class AnyTokenizeRequest(
    RootModel[
        Annotated[
            Annotated[TokenizeRequest, Tag("with-inputs")]
            | Annotated[TokenizePromptRequest, Tag("with-prompt")]
            | Annotated[TokenizeChatRequest, Tag("with-messages")],
            Discriminator(_tokenize_shape),
        ]
    ]
):
    """A body of /tokenize: with ``inputs``, with ``prompt``, or with ``messages``."""


class DecodeRequest(Body):
    ids: Ids | IdLists = Field(description="Token ids of a text, or of several.")
    skip_special_tokens: Flag = True
    adapter: AdapterName | None = None


class DetokenizeRequest(OpenAIBody):
    model: str | None = None
    tokens: Ids


def _detokenize_shape(content: Any) -> str:
    tokens = isinstance(content, dict) and "tokens" in content and "ids" not in content
    return "with-tokens" if tokens else "with-ids"


class AnyDetokenizeRequest(
    RootModel[
        Annotated[
            Annotated[DecodeRequest, Tag("with-ids")]
            | Annotated[DetokenizeRequest, Tag("with-tokens")],
            Discriminator(_detokenize_shape),
        ]
    ]
):
    """A body of /detokenize: with ``ids``, or with ``tokens``."""


class PlacedToken(Answer):
    """A token and where it stands in its text, in characters; nowhere, if it was added to it."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class CountedTokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizedPrompt(Answer):
    prompt: str


class ServedModel(Answer):
    """The answer of /info: the fields of TGI and TEI, and what only this server has."""

    model_id: str = Field(description="The base's name.")
    model_sha: str | None = Field(description="The revision that the operator asked the hub for.")
    model_dtype: str | None = Field(description="Compute type; None until the worker has begun.")
    model_device_type: str | None
    model_pipeline_tag: str = Field(description="What the adapter, or the base, is for.")
    model_type: dict[str, dict[str, Any]] = Field(
        description="As TEI has it: classifier or reranker with its labels, embedding; else the "
        "task's name."
    )
    served_model_name: str = Field(description="The adapter's name, or the base's.")
    max_concurrent_requests: int
    max_client_batch_size: int
    max_batch_tokens: int
    max_batch_requests: int
    max_input_length: int | None = Field(description="Tokens of one input.")
    max_input_tokens: int | None = Field(description="Tokens of a prompt.")
    max_total_tokens: int | None = Field(description="Tokens of a prompt and its answer.")
    max_best_of: int
    max_stop_sequences: int
    auto_truncate: bool
    tokenization_workers: int
    validation_workers: int
    router: str
    version: str
    sha: str | None = None
    docker_label: str | None = None
    adapter: str | None
    adapter_version: str | None
    labels: list[str] | None
    chat: bool
    quantization: str | None = Field(description="How the base's linear layers are stored.")
    checkpoint_digest: str = Field(description="Of the base's checkpoint.")
    weights_digest: str | None = Field(
        description="Of the base's quantized weights; replicas that serve the same have the same."
    )


class Version(Answer):
    version: str
