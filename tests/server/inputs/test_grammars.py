"""Grammars: what is refused and why, and masks that allow just the tokens that fit."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from server.inputs.grammar_engine import GrammarKind, Vocabulary, as_lark, engine_text
from server.inputs.grammars import GrammarLimits, GrammarProcess, GrammarRefused
from server.inputs.token_bytes import token_bytes
from tests.stand.dense import VOCABULARY, byte_tokenizer, spaced_tokenizer
from tests.stand.tiny_bases import tokenizer as word_tokenizer

BYTES = tuple(bytes((one,)) for one in range(256))


@pytest.fixture(scope="module")
def process() -> Iterator[GrammarProcess]:
    with GrammarProcess(lambda: BYTES, GrammarLimits(cpu_s=1.0)) as made:
        yield made


OVERLAPPING = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
OLD = {"$schema": "http://json-schema.org/draft-04/schema#", "const": 1}
SHORT_AND_LONG = {"type": "string", "minLength": 3, "maxLength": 2}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
NESTED = {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1}
BAD: dict[str, list[tuple[GrammarKind, Any, str]]] = {
    "unsupported_grammar": [
        ("json_schema", {"type": "object", "not": {}}, "not at /not"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"properties": {"a": {"if": {}}}}, "/properties/a/if"),
        ("json_schema", {"type": "string", "minlength": 3}, "minlength"),
        ("json_schema", {"x-guidance": {"lenient": True}}, "x-guidance"),
        ("json_schema", {"type": "string", "nullable": True}, "nullable"),
        ("json_schema", {"type": "string", "format": "colour"}, "colour"),
        ("json_schema", {"type": "object", "minProperties": 2}, "minProperties"),
        ("json_schema", OVERLAPPING, "oneOf"),
        ("json_schema", {"$ref": "http://localhost/a.json"}, "a.json"),
        ("json_schema", OLD, "const"),
        ("json_schema", "{", "JSON"),
        ("json_schema", "[]", "list"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", r"(a)\1", "backreferences"),
        ("lark", 'start: "a" missing', "missing"),
        ("lark", 'begin: "a"', "begin"),
        ("lark", 'start: "a" <[3]>', "<[3]>"),
        ("lark", "start: a\na[temperature=0.5]: /a+/", "0.5"),
        ("lark", 'start: %json {"not": {}}', "%json"),
        ("lark", "root ::= (", "GBNF"),
    ],
    "grammar_unreachable": [
        ("json_schema", SHORT_AND_LONG, "minLength"),
        ("regex", r"[^\x00-\U0010FFFF]", "NoExtension"),
        ("choice", [""], "first token"),
    ],
    "grammar_too_complex": [
        ("json_schema", ENDLESS, "recursion"),
        ("json_schema", {"$defs": {"x": NESTED}, "$ref": "#/$defs/x"}, "recursion"),
        ("json_schema", {"$ref": "#"}, "recursion"),
        ("lark", 'start: "a" start', "recursion"),
        ("lark", 'start: a\na: b "x"\nb: a', "recursion"),
    ],
}
REFUSED = [(kind, content, code, found) for code in BAD for kind, content, found in BAD[code]]


@pytest.mark.parametrize(("kind", "content", "code", "found"), REFUSED)
def test_what_cannot_be_kept_is_refused_and_named(
    process: GrammarProcess, kind: str, content: Any, code: str, found: str
) -> None:
    with pytest.raises(GrammarRefused) as caught:
        process.check(kind, content)
    error = caught.value
    assert error.code == code
    assert found in f"{error.found} {error.message}"
    assert error.expected
    assert error.fix


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (
            "json_schema",
            {"type": "array", "uniqueItems": False, "title": "A", "x-own": 1, "_format": 2},
        ),
        ("json_schema", {"type": "object", "properties": {"not": {}, "minlength": {}}}),
        ("json_schema", {"properties": {"next": {"$ref": "#"}}, "additionalProperties": False}),
        ("json_schema", True),
        ("json_schema", '{"type": "object", "anything": 1}'),
        ("regex", "[a-f]+(x|y)?"),
        ("choice", ['say "yes"\n', "né", "\\d"]),
        ("lark", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]+/'),
        ("lark", 'root ::= "a" x* "b"?\nx ::= [0-9]+ | "(" x ")"'),
    ],
)
def test_what_can_be_kept_is_taken(process: GrammarProcess, kind: str, content: Any) -> None:
    made = process.check(kind, content)
    assert made == process.check(kind, content)
    assert len(made.digest) == 64


@pytest.mark.parametrize(
    ("schema", "begins"),
    [
        ({"properties": {"a": {"type": "boolean"}}, "required": ["a"]}, b"{"),
        ('{"properties": {}}', b"{"),
        ({"required": ["a"]}, b"{"),
        ({"properties": {}, "type": ["object", "null"]}, b"n{"),
        ({"properties": {}, "anyOf": [{"type": "object"}, {"type": "null"}]}, b"n{"),
        ({"type": "array"}, b"["),
        ({"items": {"type": "integer"}}, b'"-0123456789[fnt{'),
    ],
)
def test_a_schema_of_properties_is_that_of_an_object(
    process: GrammarProcess, schema: Any, begins: bytes
) -> None:
    mask = Vocabulary(BYTES).matcher(process.check("json_schema", schema).text).compute_bitmask()
    assert bytes(one for one in range(256) if mask[one >> 3] >> (one & 7) & 1) == begins


def test_nesting_without_end_is_refused(process: GrammarProcess) -> None:
    deep: Any = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(GrammarRefused) as caught:
        process.check("json_schema", deep)
    assert caught.value.code == "grammar_too_complex"
    group = "start: " + "(" * 200 + '"a"' + ")" * 200
    with pytest.raises(GrammarRefused) as caught:
        process.check("lark", group)
    assert caught.value.code == "grammar_too_complex"


def test_one_that_takes_too_long_ends_its_process_and_the_next_is_answered() -> None:
    with GrammarProcess(lambda: BYTES, GrammarLimits(cpu_s=0.02)) as hurried:
        large = {"anyOf": [{"type": "string", "pattern": f"a{{{n}}}.*b"} for n in range(1, 2000)]}
        with pytest.raises(GrammarRefused) as caught:
            hurried.check("json_schema", large)
        assert caught.value.code == "grammar_too_complex"
        assert hurried.check("choice", ["yes"]).digest


def test_a_vocabulary_that_cannot_write_it_is_told() -> None:
    words = token_bytes(word_tokenizer("llama"), 96)
    with GrammarProcess(lambda: words) as process:
        assert process.check("regex", "( a| fine| film)+").digest
        for kind, content in (("json_schema", {}), ("regex", " film!"), ("regex", " (a|fine) é")):
            with pytest.raises(GrammarRefused) as caught:
                process.check(kind, content)
            assert caught.value.code == "grammar_unreachable"


@pytest.mark.parametrize("make", [byte_tokenizer, spaced_tokenizer])
def test_bytes_of_tokens_join_to_what_the_tokenizer_decodes(make: Any) -> None:
    made = make()
    table = token_bytes(made, VOCABULARY)
    rng = random.Random(1)
    written = [at for at, one in enumerate(table) if one]
    assert len(written) > 250
    for _ in range(200):
        ids = rng.choices(written, k=rng.randint(1, 12))
        text = b"".join(table[one] for one in ids)
        try:
            wanted = text.decode()
        except UnicodeDecodeError:
            continue
        anchor = made("to", add_special_tokens=False)["input_ids"]
        before = made.decode(anchor)
        assert made.decode([*anchor, *ids]).removeprefix(before) == wanted
    assert all(table[one] == b"" for one in made.all_special_ids if one < VOCABULARY)


ALPHABET = 'ab0,:{}[]" .-'
PATTERNS = ["(ab|a)*b", "a{2,4}b?", "[ab]+,[ab]*", "(a|b){3}", "a(b|,)?a"]


def small_vocabulary(seed: int) -> list[bytes]:
    rng = random.Random(seed)
    longer = {"".join(rng.choices(ALPHABET, k=rng.randint(2, 3))) for _ in range(60)}
    pieces = [*ALPHABET, *sorted(longer), "true", "null"]
    return [one.encode() for one in pieces]


def allowed(matcher: Any, vocabulary: Vocabulary) -> tuple[set[int], bool]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    found = set(np.flatnonzero(bits).tolist())
    return {one for one in found if one < vocabulary.size}, vocabulary.end in found


def texts_of(pattern: str, longest: int) -> list[str]:
    """Every text of a pattern over its characters, up to a length."""
    found, rows = [], [""]
    for _ in range(longest + 1):
        found += [one for one in rows if re.fullmatch(pattern, one)]
        rows = [one + character for one in rows for character in "ab,"]
        if len(rows) > 90_000:
            break
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_a_pattern_allow_just_what_leads_to_a_full_match(pattern: str) -> None:
    """The reference tries every token: is what is written then the beginning of some text?"""
    tokens = small_vocabulary(3)
    vocabulary = Vocabulary(tokens)
    texts = texts_of(pattern, 9)
    beginnings = {one[:end] for one in texts for end in range(len(one) + 1)}
    for seed in range(12):
        rng = random.Random(seed)
        matcher = vocabulary.matcher(engine_text("regex", pattern))
        written = ""
        while len(written) < 5:
            found, complete = allowed(matcher, vocabulary)
            wanted = {at for at, one in enumerate(tokens) if written + one.decode() in beginnings}
            assert found == wanted, written
            assert complete == bool(re.fullmatch(pattern, written))
            if not found:
                break
            token = rng.choice(sorted(found))
            assert matcher.consume_token(token)
            written += tokens[token].decode()


def test_masks_of_a_schema_allow_just_what_leads_to_a_value() -> None:
    """Of a schema with few values, each in its one compact spelling and in those with spaces."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["b", "ab", None]}, "b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tokens = [*small_vocabulary(5), b"f", b"als", b"s", b"e", b"tru", b"nul", b"l"]
    vocabulary = Vocabulary(tokens)
    space = ("", " ")
    seconds = [""]
    for word, s, t, u, v in product(("true", "false"), space, space, space, space):
        seconds.append(f',{s}"b"{t}:{u}{word}{v}')
    texts = []
    for word, s, t, u, v in product(('"b"', '"ab"', "null"), space, space, space, space):
        texts += [f'{{{s}"a"{t}:{u}{word}{v}{second}}}' for second in seconds]
    for text in set(texts):
        value = json.loads(text)
        assert set(value) <= {"a", "b"}
    beginnings = {one[:end] for one in texts for end in range(len(one) + 1)}
    for seed in range(10):
        rng = random.Random(seed)
        matcher = vocabulary.matcher(engine_text("json_schema", schema))
        written = ""
        while True:
            found, complete = allowed(matcher, vocabulary)
            assert found == {
                at for at, one in enumerate(tokens) if written + one.decode() in beginnings
            }, written
            assert complete == (written in texts)
            if not found:
                break
            token = rng.choice(sorted(found))
            assert matcher.consume_token(token)
            written += tokens[token].decode()


def test_gbnf_and_lark_say_the_same() -> None:
    vocabulary = Vocabulary(small_vocabulary(7))
    lark = 'start: "a" x* "b"\nx: "0" | "," '
    gbnf = 'root ::= "a" x* "b"\nx ::= "0" | ","'
    both = [vocabulary.matcher(engine_text("lark", as_lark(one))) for one in (lark, gbnf)]
    rng = random.Random(2)
    for _ in range(12):
        (found, complete), other = (allowed(one, vocabulary) for one in both)
        assert (found, complete) == other
        if not found:
            break
        token = rng.choice(sorted(found))
        assert all(one.consume_token(token) for one in both)
