"""The two servers that clients are run against: a tiny encoder and a tiny decoder with adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stand import tiny_bases
from tests.stand.client_calls import Served
from tests.stand.live import hira

ENCODERS = (
    ("mood", "text-classification", ("bad", "fine", "great")),
    ("words", "token-classification", ("O", "B-PER", "I-PER")),
    ("relevance", "text-ranking", ("LABEL_0",)),
    ("answers", "question-answering", ("no", "yes")),
    ("vectors", "feature-extraction", ("no", "yes")),
)
CONTEXT_TOKENS = 1024  # clients' own defaults ask for hundreds of tokens
TEMPLATE = (
    "{% for one in tools or [] %} {{ one['function']['name'] }} <tool_call>{% endfor %}"
    "{% for one in messages %} {{ one['content'] }}{% endfor %} good"
)


@contextmanager
def client_servers(root: Path) -> Iterator[Served]:
    """Both, made in a folder and started; unquantized and in float32."""
    common = ("--quantization=none", "--dtype=fp32")
    encoder = tiny_bases.base_folder(root, "bert")
    one = ["--base", str(encoder), "--default-adapter=relevance", *common]
    for name, task, labels in ENCODERS:
        folder = tiny_bases.adapter(root / name, encoder, task, labels=labels)
        one += ["--adapter", f"{name}={folder}"]
    decoder = tiny_bases.base_folder(root, "llama")
    config = json.loads((decoder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT_TOKENS
    (decoder / "config.json").write_text(json.dumps(config))
    template = root / "chat.jinja"
    template.write_text(TEMPLATE)
    story = tiny_bases.adapter(root / "story", decoder, "text-generation")
    other = ["--base", str(decoder), "--adapter", f"story={story}", "--default-adapter=story"]
    other += ["--chat-template", str(template), *common]
    with hira(root / "encoder", *one) as first, hira(root / "decoder", *other) as second:
        yield Served(first.url, second.url)
