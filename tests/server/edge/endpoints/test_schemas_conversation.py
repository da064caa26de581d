"""Messages as chat templates take them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.edge.endpoints.schemas_conversation import ChatRequest


def test_chat_content_parts_are_joined_and_other_kinds_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": parts}]}
    )
    assert body.messages[0].plain() == {"role": "user", "content": "ab"}
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
        )
