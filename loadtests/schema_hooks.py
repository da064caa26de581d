"""Gives schemathesis what a document cannot say: names of adapters that are there.

Loaded by schemathesis itself; see `loadtests.schema`. Half of all cases are left as generated.
"""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis
from hypothesis import strategies as st

ADAPTERS: list[str] = json.loads(os.environ.get("HIRA_SCHEMA_ADAPTERS", "[]")) or ["none"]
SOURCES: list[str] = json.loads(os.environ.get("HIRA_SCHEMA_SOURCES", "[]")) or ["none"]
MOST_TOKENS = 8  # generations are not what is tested here
NAMES = st.sampled_from(ADAPTERS)
TEXTS = st.sampled_from(["A fine film.", "The king", "", "\ud83d\ude00 \u00e9\u4e2d", "x " * 700])
OWN = st.sampled_from(["schema-a", "schema-b", "Schema C"])  # to register, change and remove


def valid_body(path: str) -> st.SearchStrategy[Any] | None:
    """Bodies that get past validation, so that what lies behind it is reached."""
    inputs = st.one_of(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
    tokens = st.integers(1, MOST_TOKENS)
    must: dict[str, st.SearchStrategy[Any]]
    more: dict[str, st.SearchStrategy[Any]]
    said: st.SearchStrategy[Any]
    sampled: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.floats(0.1, 2.0),
        "seed": st.integers(0, 2**31),
        "n": st.just(1),
    }
    match path:
        case "/predict":
            top = st.fixed_dictionaries({}, optional={"top_k": st.integers(1, 5)})
            return st.fixed_dictionaries({"inputs": inputs}, optional={"parameters": top})
        case "/embed":
            return st.fixed_dictionaries({"inputs": inputs})
        case "/generate" | "/generate_stream":
            more = {"do_sample": st.booleans(), "details": st.booleans(), "stop": st.just(["."])}
            given = st.fixed_dictionaries({"max_new_tokens": tokens}, optional=more)
            return st.fixed_dictionaries({"inputs": TEXTS, "parameters": given})
        case "/v1/completions":
            more = {**sampled, "echo": st.booleans(), "stream": st.booleans()}
            must = {"model": NAMES, "prompt": inputs, "max_tokens": tokens}
            return st.fixed_dictionaries(must, optional=more)
        case "/v1/chat/completions":
            roles = st.just("user")
            said = st.fixed_dictionaries({"role": roles, "content": TEXTS})
            must = {"model": NAMES, "messages": st.lists(said, min_size=1, max_size=3)}
            return st.fixed_dictionaries({**must, "max_tokens": tokens}, optional=sampled)
        case "/v1/embeddings":
            forms = st.sampled_from(["float", "base64"])
            must = {"model": NAMES, "input": inputs}
            return st.fixed_dictionaries(must, optional={"encoding_format": forms})
        case "/admin/adapters":
            flags = {name: st.booleans() for name in ("replace", "pinned", "preload")}
            must = {"name": OWN, "source": st.sampled_from(SOURCES)}
            return st.fixed_dictionaries(must, optional=flags)
        case "/admin/adapters/{name}":
            flags = {name: st.booleans() for name in ("pinned", "preload")}
            return st.fixed_dictionaries({}, optional=flags)
    return None


@schemathesis.hook
def before_generate_body(context: Any, strategy: Any) -> Any:
    """Half of the bodies are valid ones."""
    operation = context.operation
    valid = None if operation is None else valid_body(operation.path)
    return strategy if valid is None else st.one_of(strategy, valid)


@schemathesis.hook
def before_generate_query(context: Any, strategy: Any) -> Any:
    """Half of the queries name an adapter that is there."""
    operation = context.operation
    if operation is None or not any(one.name == "adapter" for one in operation.query):
        return strategy
    return st.one_of(strategy, NAMES.map(lambda name: {"adapter": name}))


@schemathesis.hook
def before_generate_path_parameters(context: Any, strategy: Any) -> Any:
    """Half of the paths lead somewhere. What others ask for is never removed or changed."""
    operation = context.operation
    changes = operation is not None and operation.method.upper() != "GET"
    names = OWN if changes and operation.path.startswith("/admin/") else NAMES
    # A path takes of these what it has a place for.
    return st.one_of(strategy, names.map(lambda name: {"name": name, "model": name, "alias": name}))


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Keep generations short."""
    if isinstance(body, dict):
        for holder in (body, body.get("parameters")):
            if isinstance(holder, dict):
                for name in ("max_tokens", "max_completion_tokens", "max_new_tokens"):
                    value = holder.get(name)
                    if type(value) is int and value > MOST_TOKENS and value < 1 << 20:
                        holder[name] = 1 + value % MOST_TOKENS
    return body
