"""The calls that turn texts into tokens and back, for clients that count or cut before they send.

What a text becomes does not depend on the adapter, which has the base's vocabulary; what a
conversation becomes does, by its chat template. Texts have the limits that they have in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from fastapi import Depends, Request, Response

from server.edge.admit.slow_work import INPUT_CHARACTERS
from server.edge.endpoints.adapter_named import Named, adapter_names
from server.edge.endpoints.answers import (
    BASE_VERSION,
    check_fields,
    check_inputs,
    context_of,
    json_response,
    tokenize,
)
from server.edge.endpoints.body import sent_json
from server.edge.endpoints.chat import chat_prompt
from server.edge.endpoints.json_text import written
from server.edge.endpoints.middleware import Json
from server.edge.endpoints.schemas_tokens import (
    AnyDetokenizeRequest,
    AnyTokenizeRequest,
    DecodeRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizePromptRequest,
    TokenizeRequest,
)
from server.edge.endpoints.tei_tgi import check_prompt_name
from server.edge.service import Service
from server.errors import Refusal
from server.inputs.text import Text
from server.metrics import BASE_LABEL

if TYPE_CHECKING:
    from adapters.registry.records import AdapterRecord

TOKENIZE_BODY: Any = Depends(sent_json(AnyTokenizeRequest))
DETOKENIZE_BODY: Any = Depends(sent_json(AnyDetokenizeRequest))
DECODE_BODY: Any = Depends(sent_json(DecodeRequest))
TOKEN_CHARACTERS: Final = 8  # of text that take as long as a token that is decoded


class TokenEndpoints:
    """The endpoints; one object per server."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def tokenize(
        self,
        request: Request,
        adapter: str | None = Named,
        sent: AnyTokenizeRequest = TOKENIZE_BODY,
    ) -> Response:
        """The tokens of texts, of a prompt, or of a conversation as it would be written out."""
        body = sent.root
        if isinstance(body, TokenizeRequest):
            return await self._placed(request, body, adapter)
        check_fields(request, body)
        if isinstance(body, TokenizePromptRequest):
            headers = self._headers(self._named(request, adapter, body.model, "model"))
            ids = await self._prompt(request, body.prompt, "prompt", body.add_special_tokens)
        else:
            ids, headers = await self._conversation(request, body, adapter)
        strings = await self._strings(request, ids) if body.return_token_strs else None
        texts = self.service.base.texts
        counted = {
            "count": len(ids),
            "max_model_len": texts.max_tokens,
            "tokens": list(ids),
            "token_strs": strings,
        }
        return await json_response(self.service, counted, headers)

    async def detokenize(
        self,
        request: Request,
        adapter: str | None = Named,
        sent: AnyDetokenizeRequest = DETOKENIZE_BODY,
    ) -> Response:
        """The text of token ids."""
        body = sent.root
        if isinstance(body, DecodeRequest):
            return await self.decode(request, adapter, body)
        return await self._detokenized(request, body, adapter)

    async def decode(
        self, request: Request, adapter: str | None = Named, body: DecodeRequest = DECODE_BODY
    ) -> Response:
        """The texts of lists of token ids."""
        headers = self._headers(self._named(request, adapter, body.adapter, "adapter"))
        lists: list[list[int]] = [list(one) if isinstance(one, list) else [one] for one in body.ids]
        if body.ids and isinstance(body.ids[0], int):
            lists = [[one for ids in lists for one in ids]]
        texts = await self._decoded(
            request, lists, "ids", skip_special_tokens=body.skip_special_tokens
        )
        return await json_response(self.service, texts, headers)

    async def _detokenized(
        self, request: Request, body: DetokenizeRequest, adapter: str | None
    ) -> Response:
        """One text, with its special tokens, as vLLM has it."""
        check_fields(request, body)
        headers = self._headers(self._named(request, adapter, body.model, "model"))
        (text,) = await self._decoded(
            request, [list(body.tokens)], "tokens", skip_special_tokens=False
        )
        return Json({"prompt": text}, headers=headers)

    async def _placed(
        self, request: Request, body: TokenizeRequest, adapter: str | None
    ) -> Response:
        """As TEI has it, a list for each text; of one text on a base that generates, as TGI."""
        headers = self._headers(self._named(request, adapter, body.adapter, "adapter"))
        check_prompt_name(body.prompt_name, "prompt_name")
        alone = isinstance(body.inputs, str)
        texts: list[str] = [body.inputs] if isinstance(body.inputs, str) else list(body.inputs)
        check_inputs(len(texts), self.service)
        flat = alone and self.service.base.task == "text-generation"
        most = self.service.settings.max_adapter_tokens

        def work(text: Text) -> bytes:
            # Written at once: as values they would take fifty times the memory of the texts.
            pieces: list[bytes] = []
            count = 0
            for index, one in enumerate(texts):
                tokens = text.tokens(one, index, special_tokens=body.add_special_tokens)
                count += len(tokens)
                if count > most:
                    raise _too_many(most)
                pieces.append(written([asdict(token) for token in tokens]))
            return pieces[0] if flat else b"[" + b",".join(pieces) + b"]"

        answer = await tokenize(
            request,
            self.service,
            self.service.base.texts,
            sum(map(len, texts)) + INPUT_CHARACTERS * len(texts),
            work,
        )
        return Response(answer, headers=headers, media_type=Json.media_type)

    async def _prompt(
        self, request: Request, prompt: str, field: str, special_tokens: bool
    ) -> tuple[int, ...]:
        """The ids that a call with this prompt would have, or on an encoder this text."""
        generates = self.service.base.task == "text-generation"

        def work(text: Text) -> tuple[int, ...]:
            if generates:
                return text.tokenize_prompt(prompt, special_tokens=special_tokens)
            return tuple(one.id for one in text.tokens(prompt, special_tokens=special_tokens))

        return await tokenize(
            request,
            self.service,
            self.service.base.texts,
            len(prompt) + INPUT_CHARACTERS,
            work,
            field,
        )

    async def _conversation(
        self, request: Request, body: TokenizeChatRequest, adapter: str | None
    ) -> tuple[tuple[int, ...], dict[str, str]]:
        """The ids of a conversation as the adapter's chat template, or the base's, writes it."""
        record = self._named(request, adapter, body.model, "model")
        names = (*adapter_names(request, adapter), body.model or None)
        target = self.service.targets.resolve(names, "/generate", "model", call="/tokenize")
        messages = [message.plain() for message in body.messages]
        prompt = await chat_prompt(
            request,
            self.service,
            target,
            messages,
            tools=body.used_tools(),
            variables=body.variables,
        )
        ids = await self._prompt(request, prompt, "messages", body.add_special_tokens)
        return ids, self._headers(record)

    async def _strings(self, request: Request, ids: Sequence[int]) -> list[str]:
        return await tokenize(
            request,
            self.service,
            self.service.base.texts,
            TOKEN_CHARACTERS * len(ids),
            lambda text: text.spellings(ids),
        )

    async def _decoded(
        self,
        request: Request,
        lists: Sequence[Sequence[int]],
        field: str,
        *,
        skip_special_tokens: bool,
    ) -> list[str]:
        check_inputs(len(lists), self.service, field)
        base = self.service.base.texts
        vocabulary = base.vocab_size or 1 << 31
        for ids in lists:
            if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
                raise Refusal.because(
                    "invalid_input",
                    "An id is none of the base's.",
                    found=str(min(ids) if min(ids) < 0 else max(ids)),
                    expected=f"ids from 0 to {vocabulary - 1}",
                    field=field,
                )
            if len(ids) > base.max_tokens:
                raise Refusal.because(
                    "input_too_long",
                    "More ids are given than a text of this base may have.",
                    found=f"{len(ids)} tokens",
                    expected=f"at most {base.max_tokens} tokens",
                    fix="Send them in parts.",
                    field=field,
                    limit_tokens=base.max_tokens,
                )
        return await tokenize(
            request,
            self.service,
            base,
            TOKEN_CHARACTERS * sum(map(len, lists)) + INPUT_CHARACTERS * len(lists),
            lambda text: [
                text.decode(ids, skip_special_tokens=skip_special_tokens) for ids in lists
            ],
            field,
        )

    def _named(
        self, request: Request, adapter: str | None, own: str | None, field: str
    ) -> AdapterRecord | None:
        names = (*adapter_names(request, adapter), own or None)
        record = self.service.targets.named_record(names, field)
        context_of(request).adapter = None if record is None else record.name
        return record

    def _headers(self, record: AdapterRecord | None) -> dict[str, str]:
        return {
            "X-Adapter": BASE_LABEL if record is None else record.name,
            "X-Adapter-Version": BASE_VERSION if record is None else record.version,
        }


def _too_many(most: int) -> Refusal:
    return Refusal.because(
        "request_too_large",
        "The texts have more tokens than one request may have.",
        found=f"more than {most} tokens",
        expected=f"at most {most} tokens",
        fix="Send several requests.",
        field="inputs",
    )
