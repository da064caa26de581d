"""Bodies of the native calls: what clients send and what they get back.

Requests forbid what they do not know, so that a misspelt parameter is an error that names it and
never a silent default. The shapes are those of text-embeddings-inference (`/predict`, `/embed`) and
text-generation-inference (`/generate`, `/generate_stream`). OpenAI's are in `schemas_openai`, those
of the administration in `schemas_admin`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

# As JSON writes them: "5" is no number, and true is no 1.
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
AdapterName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _question(one: Any) -> Any:
    """A question with its context, as the Hugging Face hub's clients write the pair."""
    if isinstance(one, dict) and set(one) == {"question", "context"}:
        return (one["question"], one["context"])
    return one


Pair = Annotated[
    tuple[str, str],
    BeforeValidator(_question),
    Field(description="Two texts, such as question and context."),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "prefixItems": [{"type": "string"}, {"type": "string"}],
                    "minItems": 2,
                    "maxItems": 2,
                },
                {
                    "type": "object",
                    "required": ["question", "context"],
                    "additionalProperties": False,
                    "properties": {
                        "question": {"type": "string"},
                        "context": {"type": "string"},
                    },
                },
            ]
        }
    ),
]
# One wrong item of a list is told, not each of a million: to list those stops everybody.
Texts = Annotated[list[str], Field(fail_fast=True)]


def _single_text(one: Any) -> Any:
    """A text that stands alone in a list, as text-embeddings-inference writes batches."""
    return one[0] if isinstance(one, list | tuple) and len(one) == 1 else one


# [["first"], ["second"]] is a batch, as ["first", "second"] is.
TextItem = Annotated[
    str,
    BeforeValidator(_single_text),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
            ]
        }
    ),
]
TextBatch = Annotated[list[TextItem], Field(fail_fast=True)]
TruncationDirection = Literal["left", "right", "Left", "Right"]
AggregationStrategy = Literal["none", "simple", "first", "average", "max"]
Finish = Literal["length", "eos_token", "stop_sequence"]

MAX_TOP_K = 1 << 20
MAX_TARGETS = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SEED = (1 << 63) - 1
MAX_COPIES = 16  # answers to one prompt
MAX_ALTERNATIVES = 20  # likeliest tokens told beside each
MAX_UNKNOWN = 32  # fields that are told to be unknown


def without_nulls(model: type[BaseModel], content: Any) -> Any:
    """A body without the known fields that are null: they have their defaults."""
    if not isinstance(content, dict):
        return content
    known = model.model_fields
    kept = {name: it for name, it in content.items() if it is not None or name not in known}
    if model.model_config.get("extra") == "forbid":
        # Each is an error of its own: a few are told, a hundred thousand would stop everybody.
        for name in [one for one in kept if one not in known][MAX_UNKNOWN:]:
            del kept[name]
    return kept


def nullable(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that what has a default may be null."""
    required = schema.get("required", ())
    for name, one in schema.get("properties", {}).items():
        kinds = one.get("anyOf", [one])
        if name not in required and not any(kind.get("type") == "null" for kind in kinds):
            told = {key: one.pop(key) for key in ("title", "description", "default") if key in one}
            rest = one.pop("anyOf", None) or [dict(one)]
            one.clear()
            one |= {"anyOf": [*rest, {"type": "null"}], **told}


class Body(BaseModel):
    """What clients send: null means the default, as it does for the servers of these shapes."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=nullable)

    @model_validator(mode="before")
    @classmethod
    def _nulls(cls, content: Any) -> Any:
        return without_nulls(cls, content)


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class Truncation(Body):
    """How text-embeddings-inference says what becomes of inputs that are too long."""

    truncate: Flag = Field(default=False, description="Cut inputs that are too long.")
    truncation_direction: TruncationDirection = Field(
        default="right", description="Where they are cut: at their end, or at their start (left)."
    )

    @property
    def side(self) -> Literal["left", "right"]:
        return "left" if self.truncation_direction.lower() == "left" else "right"


class PredictParameters(Body):
    """How to read the inputs and how much to answer; what a task has no use for is refused."""

    top_k: Annotated[Whole, Field(ge=1, le=MAX_TOP_K)] | None = Field(
        default=None, description="Labels or words per input; all labels and 5 words by default."
    )
    truncation: Flag = Field(default=False, description="Cut inputs that are too long.")
    aggregation_strategy: AggregationStrategy | None = Field(
        default=None, description="Token classification: how tokens become entities."
    )
    ignore_labels: list[str] | None = Field(
        default=None, description="Token classification: labels to leave out.", max_length=64
    )
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = Field(
        default=None, description="Classification of texts and images: from logits to scores."
    )
    targets: list[Annotated[str, Field(min_length=1, max_length=256)] | Whole] | None = Field(
        default=None,
        description="Fill-mask: words or token ids to score at every mask, all by default; their "
        "scores are probabilities among the whole vocabulary.",
        min_length=1,
        max_length=MAX_TARGETS,
    )


class PredictRequest(Truncation):
    inputs: str | Pair | Annotated[list[Pair | TextItem], Field(fail_fast=True)] = Field(
        description="One text, or a list. A pair is written as a list of lists: [[first, second]]. "
        "On a base of images: base64, with or without data:image/…;base64, before it.",
        examples=["A wonderful film."],
    )
    parameters: PredictParameters = PredictParameters()
    raw_scores: Flag = Field(
        default=False, description="Classification: bare logits; as function_to_apply: none."
    )
    adapter: AdapterName | None = Field(
        default=None, description="The adapter, if not in the query."
    )


class EmbedParameters(Body):
    truncation: Flag = False
    normalize: Flag | None = Field(
        default=None,
        description="Scale every vector to length 1. By default as the adapter or else the base "
        "declares (modules.json), where neither does: true.",
    )
    pooling: Literal["mean", "cls", "last"] | None = Field(
        default=None,
        description="By default as the adapter or else the base declares (modules.json), where "
        "neither does: mean for encoders, last token for decoders.",
    )


class EmbedRequest(Truncation):
    inputs: str | TextBatch = Field(description="Texts; on a base of images, images in base64.")
    parameters: EmbedParameters = EmbedParameters()
    normalize: Flag | None = Field(default=None, description="As in parameters.")
    prompt_name: str | None = Field(
        default=None, description="Of prompts that a base names; this server knows none."
    )
    adapter: AdapterName | None = None


class TgiGrammar(Body):
    """What an answer is held to, as text-generation-inference has it."""

    type: Literal["json", "regex", "json_schema"]
    value: str | dict[str, Any] | bool = Field(
        description="A JSON schema; a pattern with regex; {name, schema} with json_schema."
    )


class GenerateParameters(Body):
    """text-generation-inference's parameters; those without effect here only take their neutral."""

    max_new_tokens: Annotated[Whole, Field(ge=1, le=1 << 20)] = 20
    do_sample: Flag = False
    temperature: Annotated[Number, Field(gt=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=MAX_TOP_K)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        Field(max_length=MAX_STOPS),
    ] = []
    seed: Annotated[Whole, Field(ge=0, le=MAX_SEED)] | None = None
    details: Flag = False
    return_full_text: Flag = False
    truncate: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Keep this many tokens at the end of the prompt."
    )
    truncation: Flag = Field(
        default=False, description="Cut the start of a prompt that is too long."
    )
    ignore_eos_token: Flag = False
    adapter_id: AdapterName | None = Field(
        default=None, description="Another place for the adapter."
    )
    best_of: Annotated[Whole, Field(ge=1, le=MAX_COPIES)] | None = Field(
        default=None,
        description="Sample so many answers and give the one with the greatest mean "
        "log-probability; the others are in the details. Not streamed.",
    )
    watermark: Literal[False] = False
    decoder_input_details: Flag = Field(
        default=False,
        description="Details with the prompt's tokens and their log-probabilities; not streamed.",
    )
    top_n_tokens: Annotated[Whole, Field(ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        default=None, description="Of details and streams: so many of the likeliest at each place."
    )
    typical_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = Field(
        default=None, description="Times the number of times that a token was generated, as OpenAI."
    )
    grammar: TgiGrammar | None = Field(
        default=None, description="What the answer is held to: a JSON schema or a pattern."
    )

    @property
    def samples(self) -> bool:
        """TGI's rule: any sampling parameter switches sampling on."""
        return self.do_sample or any(
            one is not None for one in (self.temperature, self.top_p, self.top_k, self.typical_p)
        )


class GenerateRequestBody(Body):
    inputs: str = Field(examples=["Once upon a time"])
    parameters: GenerateParameters = GenerateParameters()
    adapter: AdapterName | None = None
    stream: Flag = Field(default=False, description="/generate answers as /generate_stream would.")


class Label(Answer):
    label: str
    score: float


class Entity(Answer):
    entity: str | None = None
    entity_group: str | None = None
    score: float
    word: str
    start: int | None
    end: int | None


class FilledMask(Answer):
    token_str: str
    score: float
    sequence: str
    token: int | None = None


Prediction = list[Label] | list[Entity] | list[FilledMask] | list[dict[str, Any]]


class Token(Answer):
    id: int
    text: str
    logprob: float | None
    special: bool


class BestOfSequence(Answer):
    """One of the other answers of ``best_of``."""

    generated_text: str
    finish_reason: Finish
    generated_tokens: int
    seed: int | None
    prefill: list[Token] = []
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class GenerateDetails(Answer):
    finish_reason: Finish
    generated_tokens: int
    seed: int | None
    prefill: list[Token] = []
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = Field(
        default=None, description="With top_n_tokens: the likeliest at the place of each token."
    )
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateAnswer(Answer):
    generated_text: str
    details: GenerateDetails | None = None


class StreamDetails(Answer):
    finish_reason: Finish
    generated_tokens: int
    input_length: int
    seed: int | None


class StreamEvent(Answer):
    """One server-sent event; the last has ``generated_text`` and ``details``."""

    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None
    details: StreamDetails | None


class Health(Answer):
    status: str
    detail: str | None = None


class ProblemDetail(Answer):
    """RFC 9457 problem details, as every native error has them."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = None
    found: str | None = None
    expected: str | None = None
    fix: str | None = None
    error: str = Field(description="As detail, under the name that TGI and TEI have for it.")
    error_type: str = Field(description="TGI's type, else the code.")
    problems: list[dict[str, Any]] | None = None
