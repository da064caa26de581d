"""Which bytes each token of a vocabulary adds to a text: what grammars are matched against.

Tokens of a byte-level vocabulary are bytes under another spelling, and those of SentencePiece are
text with a mark for a space, or single bytes. For any other vocabulary the tokenizer's own
``decode`` is asked what a token adds behind a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from server.inputs.detokenize import UNDECODED, spelling_of

SPACE_MARK: Final = "\u2581"  # SentencePiece's space
ANCHORS: Final = ("a", "the", "0")  # a word to put a token behind
SAMPLED: Final = 64  # tokens by which a reading is held against ``decode``


def byte_table() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes, as GPT-2 has them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    table |= {chr(256 + at): byte for at, byte in enumerate(others)}
    return table


def token_bytes(tokenizer: Any, vocabulary: int) -> tuple[bytes, ...]:
    """What each id adds to a text that it does not begin, empty where that is nothing.

    Args:
        tokenizer: A fast tokenizer of transformers.
        vocabulary: Ids of the base: those without a token are there, too, and empty.
    """
    backend = tokenizer.backend_tokenizer
    silent = spelling_of(tokenizer).special
    added = backend.get_added_tokens_decoder()
    spelled: list[str | None] = [None] * vocabulary
    for token, at in backend.get_vocab(with_added_tokens=True).items():
        if at < vocabulary and at not in silent:
            spelled[at] = token
    plain = {at: one.content.encode() for at, one in added.items() if at not in silent}
    if "ByteLevel" in set(_decoder_kinds(backend)):
        table = byte_table()
        return tuple(
            plain.get(at, b"")
            if at in plain
            else b""
            if token is None
            else bytes(table[one] for one in token)
            if all(one in table for one in token)
            else token.encode()
            for at, token in enumerate(spelled)
        )
    bytes_of = spelling_of(tokenizer).bytes_of
    anchor = _anchor(backend)
    found: list[bytes | None] = [
        b""
        if token is None
        else bytes((bytes_of[at],))
        if at in bytes_of
        else plain[at]
        if at in plain
        else token.replace(SPACE_MARK, " ").encode()
        for at, token in enumerate(spelled)
    ]
    own = [at for at, token in enumerate(spelled) if token and at not in bytes_of]
    sample = own[:: max(1, len(own) // SAMPLED)]
    if any(_added(backend, anchor, at) != found[at] for at in sample):
        for at in own:
            found[at] = _added(backend, anchor, at)
    return tuple(one or b"" for one in found)


def _decoder_kinds(backend: Any) -> Iterator[str]:
    """The kinds of decoders of a tokenizer, nested ones too."""
    if backend.decoder is None:
        return
    waiting = [json.loads(backend.decoder.__getstate__())]
    while waiting:
        one = waiting.pop()
        yield one["type"]
        waiting += one.get("decoders", ())


def _anchor(backend: Any) -> list[int]:
    """Ids of a word that a token can be put behind; none where the vocabulary has none of them."""
    for word in ANCHORS:
        ids = backend.encode(word, add_special_tokens=False).ids
        if ids and backend.decode(ids).strip() == word:
            return list(ids)
    return []


def _added(backend: Any, anchor: list[int], token: int) -> bytes:
    """What ``decode`` has more with the token than without."""
    before = backend.decode(anchor) if anchor else ""
    text: str = backend.decode([*anchor, token])
    if not text.startswith(before) or UNDECODED in text:
        return b""
    return text[len(before) :].encode()
