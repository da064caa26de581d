"""What a model is for, as /v1/models and /info tell clients: an adapter's, or the bare base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fastapi import Request, Response

from adapters.tasks import BY_NAME
from server.edge.endpoints.adapter_named import Named, adapter_names
from server.edge.endpoints.answers import context_of
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.schemas import MAX_COPIES, MAX_STOPS
from server.edge.service import Service
from server.inputs.text import Text

if TYPE_CHECKING:
    from adapters.registry.records import AdapterRecord

TEI_KINDS: Final = {
    "text-classification": "classifier",
    "text-ranking": "reranker",
    "feature-extraction": "embedding",
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a client has to know of a model before it calls it.

    Args:
        task: As the table of tasks calls it.
        labels: Of a classifier, in the order of its outputs.
        context: Tokens of one input, or of a prompt with its answer; None where no texts are taken.
        chat: Whether it can be asked for chats.
    """

    task: str
    labels: list[str] | None
    context: int | None
    chat: bool

    @classmethod
    def of(cls, service: Service, record: AdapterRecord | None) -> ModelFacts:
        """Those of an adapter, or with None of the bare base."""
        base = service.base
        task: str = base.task if record is None else record.task
        labels = None if record is None or record.labels is None else list(record.labels)
        if base.prompts is None:
            return cls(task, labels, None, chat=False)
        row = BY_NAME.get(task)
        generates = row is not None and row.lane == "generate"
        holder = base.prompts if generates or not isinstance(base.inputs, Text) else base.inputs
        own = record is not None and record.chat_template
        chats = generates and (own or base.prompts.chat_template is not None)
        return cls(task, labels, holder.max_tokens, chats)


class ServedModelEndpoint:
    """The endpoint /info; one object per server.

    Args:
        version: Of this package.
    """

    def __init__(self, service: Service, version: str) -> None:
        self.service = service
        self.version = version

    async def describe(self, request: Request, adapter: str | None = Named) -> Response:
        """The base as it is served, and what an adapter of it is for."""
        service = self.service
        base, settings = service.base, service.settings
        record = service.targets.named_record(adapter_names(request, adapter))
        context_of(request).adapter = name = None if record is None else record.name
        facts = ModelFacts.of(service, record)
        state = service.dispatcher.state()
        loaded: dict[str, Any] = {} if state is None else dict(state.snapshot)
        prompt = None if base.prompts is None else base.prompts.max_tokens
        return Json(
            {
                "model_id": base.name,
                "model_sha": settings.revision,
                "model_dtype": loaded.get("dtype"),
                "model_device_type": loaded.get("device"),
                "model_pipeline_tag": facts.task,
                "model_type": {TEI_KINDS.get(facts.task, facts.task): _particulars(facts)},
                "served_model_name": name or base.name,
                "max_concurrent_requests": settings.max_queue_requests,
                "max_client_batch_size": settings.max_inputs,
                "max_batch_tokens": settings.max_batch_tokens,
                "max_batch_requests": settings.max_batch_rows,
                "max_input_length": facts.context,
                "max_input_tokens": None if prompt is None else prompt - 1,
                "max_total_tokens": prompt,
                "max_best_of": MAX_COPIES,
                "max_stop_sequences": MAX_STOPS,
                "auto_truncate": False,
                "tokenization_workers": settings.api_processes,
                "validation_workers": settings.api_processes,
                "router": "hira-server",
                "version": self.version,
                "sha": None,
                "docker_label": None,
                "adapter": name,
                "adapter_version": None if record is None else record.version,
                "labels": facts.labels,
                "chat": facts.chat,
                "quantization": loaded.get("storage"),
                "checkpoint_digest": base.signature.digest,
                "weights_digest": loaded.get("weights_digest") or None,
            }
        )


def _particulars(facts: ModelFacts) -> dict[str, Any]:
    """Labels as TEI has them; of an embedding no pooling, which requests may choose."""
    if facts.labels is None:
        return {}
    return {
        "id2label": {str(index): label for index, label in enumerate(facts.labels)},
        "label2id": {label: index for index, label in enumerate(facts.labels)},
    }
