"""An example for every call, as the reference shows it and as the demo answers it."""

from __future__ import annotations

from typing import Any, Final

TEXT: Final = "A film that is warm, funny and well played."
_DOCUMENTS: Final = {
    "query": "a warm comedy",
    "documents": ["A film that is warm and funny.", "A sad song."],
}
# By path and method: the adapter that the query names, and the body.
CALLS: Final[dict[tuple[str, str], tuple[str | None, dict[str, Any] | None]]] = {
    ("/", "post"): ("hira-imdb", {"inputs": TEXT}),
    ("/predict", "post"): ("hira-imdb", {"inputs": TEXT, "parameters": {"top_k": 1}}),
    ("/embed", "post"): ("hira-imdb", {"inputs": [TEXT, "Another text."]}),
    ("/rerank", "post"): (
        None,
        {"query": "a warm comedy", "texts": [TEXT, "A sad song."], "return_text": True},
    ),
    ("/v2/rerank", "post"): (None, _DOCUMENTS),
    ("/v1/rerank", "post"): (None, _DOCUMENTS),
    ("/v1/score", "post"): (
        None,
        {"model": "my-reranker", "text_1": "a warm comedy", "text_2": [TEXT, "A sad song."]},
    ),
    ("/similarity", "post"): (
        "hira-imdb",
        {"inputs": {"source_sentence": TEXT, "sentences": ["A fine comedy.", "A sad song."]}},
    ),
    ("/generate", "post"): (
        "hira-shakespeare",
        {"inputs": "The king", "parameters": {"max_new_tokens": 16}},
    ),
    ("/generate_stream", "post"): (
        "hira-shakespeare",
        {"inputs": "The king", "parameters": {"max_new_tokens": 16}},
    ),
    ("/tokenize", "post"): (None, {"inputs": TEXT}),
    ("/detokenize", "post"): (None, {"ids": [[5, 6, 7]]}),
    ("/decode", "post"): (None, {"ids": [[5, 6, 7]]}),
    ("/v1/completions", "post"): (
        None,
        {"model": "hira-shakespeare", "prompt": "The king", "max_tokens": 16},
    ),
    ("/v1/chat/completions", "post"): (
        None,
        {
            "model": "my-assistant",
            "messages": [{"role": "user", "content": "What is a high-rank update?"}],
            "max_tokens": 64,
        },
    ),
    ("/v1/responses", "post"): (
        None,
        {"model": "my-assistant", "input": "What is a high-rank update?", "max_output_tokens": 64},
    ),
    ("/v1/embeddings", "post"): (None, {"model": "hira-imdb", "input": [TEXT]}),
    ("/admin/adapters", "post"): (
        None,
        {"name": "my-adapter", "source": "/srv/adapters/my-adapter", "replace": False},
    ),
    ("/admin/adapters/{name}", "patch"): (None, {"pinned": True}),
    ("/admin/adapters/{name}/rollback", "post"): (
        None,
        {"version": "0123456789abcdef0123456789abcdef"},
    ),
    ("/admin/adapters/{name}/canary", "put"): (
        None,
        {"version": "0123456789abcdef0123456789abcdef", "share": 10.0},
    ),
    ("/admin/aliases/{alias}", "put"): (None, {"adapter": "hira-imdb"}),
    ("/admin/apply", "post"): (
        None,
        {
            "adapters": [{"name": "my-adapter", "version": "0123456789abcdef0123456789abcdef"}],
            "dry_run": True,
        },
    ),
}
PATHS: Final = {"name": "hira-imdb", "model": "hira-imdb", "alias": "production"}


def add_examples(path: str, method: str, operation: dict[str, Any]) -> None:
    """Put the example of a call into its part of the OpenAPI document, in place."""
    adapter, body = CALLS.get((path, method), (None, None))
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == "adapter" and adapter is not None:
            parameter["example"] = adapter
        elif parameter["in"] == "path":
            parameter["example"] = PATHS[parameter["name"]]
    if body is not None:
        operation["requestBody"]["content"]["application/json"]["example"] = body
