"""What of a JSON schema the grammar engine would leave out in silence, and schemas without an end.

The engine refuses most of what it cannot keep. Not, however, keywords of no draft (which may be a
known one misspelt), a few keywords that count in one draft and not in another, the number of keys
where keys may repeat, and a schema that only an endless value fits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final

DEPTH: Final = 64
# Keywords that the engine keeps.
KEPT: Final = frozenset(
    {
        *("anyOf", "oneOf", "allOf", "$ref", "const", "enum", "type"),
        *("items", "additionalItems", "prefixItems", "minItems", "maxItems"),
        *("properties", "additionalProperties", "patternProperties", "required"),
        *("minProperties", "maxProperties", "minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
# Those beside which a schema may leave its type to others.
DECIDED: Final = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})
# Those that say something to people, or to other programs, and nothing of what is valid.
TOLD: Final = frozenset(
    {
        *("$anchor", "$defs", "definitions", "$schema", "$id", "id", "$comment", "title"),
        *("description", "default", "readOnly", "writeOnly", "examples", "example", "deprecated"),
        *("contentMediaType", "contentEncoding", "contentSchema", "discriminator", "$vocabulary"),
    }
)
# Those of some draft, or of OpenAPI, that count and are not kept.
NOT_KEPT: Final = frozenset(
    {
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems"),
        *("propertyNames", "dependencies", "dependentRequired", "dependentSchemas"),
        *("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$dynamicAnchor"),
        *("$recursiveRef", "$recursiveAnchor", "extends", "disallow", "divisibleBy", "nullable"),
        "x-guidance",  # the engine's own settings
    }
)
# Values by which such a keyword says nothing.
NEUTRAL_VALUES: Final[Mapping[str, object]] = {"uniqueItems": False, "nullable": False}
OLDER: Final = ("draft-03", "draft-04", "draft-06", "draft-07", "2019-09")
_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
_LISTS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE_SCHEMA: Final = ("items", "additionalItems", "additionalProperties")


class SchemaFault(Exception):
    """A schema that cannot be kept: the code of the error and its words."""

    def __init__(self, code: str, message: str, found: str, expected: str, fix: str) -> None:
        super().__init__(message)
        self.told = {
            "code": code,
            "message": message,
            "found": found,
            "expected": expected,
            "fix": fix,
        }


def checked_schema(schema: Any) -> Any:
    """The schema without keywords that say nothing.

    Raises:
        SchemaFault: A keyword that would be left out, no schema at all, too deep, or endless.
    """
    if not isinstance(schema, dict | bool):
        raise _unsupported("It is no JSON schema.", type(schema).__name__, "an object")
    draft = str(schema.get("$schema", "")) if isinstance(schema, dict) else ""
    cleaned = _cleaned(schema, draft, "", 0)
    if not _Ends(cleaned).has_end(cleaned):
        raise SchemaFault(
            "grammar_too_complex",
            "Only an endless value fits the schema.",
            "a recursion that every value has to follow",
            "a schema that some finite value fits",
            "Make the property or the item that recurs optional.",
        )
    return cleaned


def of_object(schema: Any) -> Any:
    """A schema that names properties and no type, as that of an object.

    Strictly, any text, number or list fits it as well. text-generation-inference, whose own
    examples leave the type out, answers with an object, and whoever writes one means it.
    """
    untyped = isinstance(schema, dict) and not DECIDED & schema.keys()
    if untyped and ("properties" in schema or "required" in schema):
        return {"type": "object", **schema}
    return schema


def _unsupported(message: str, found: str, expected: str, fix: str = "") -> SchemaFault:
    return SchemaFault(
        "unsupported_grammar", message, found[:200], expected, fix or "Leave it out, or reword it."
    )


def _cleaned(schema: Any, draft: str, where: str, depth: int) -> Any:
    if depth > DEPTH:
        raise SchemaFault(
            "grammar_too_complex",
            "The schema is nested too deeply.",
            f"more than {DEPTH} levels",
            f"at most {DEPTH}",
            "Name parts of it under $defs and refer to them.",
        )
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        at = f"{where}/{name}"
        if name in NEUTRAL_VALUES and value is NEUTRAL_VALUES[name]:
            continue
        _check_keyword(name, draft, at)
        if name in _MAPS and isinstance(value, dict):
            kept[name] = {
                key: _cleaned(one, draft, f"{at}/{key}", depth + 1) for key, one in value.items()
            }
        elif (name in _LISTS or name == "items") and isinstance(value, list):
            kept[name] = [
                _cleaned(one, draft, f"{at}/{index}", depth + 1) for index, one in enumerate(value)
            ]
        elif name in _ONE_SCHEMA:
            kept[name] = _cleaned(value, draft, at, depth + 1)
        else:
            kept[name] = value
    _check_counts(kept, where)
    return kept


def _check_keyword(name: str, draft: str, at: str) -> None:
    if name in NOT_KEPT:
        raise _unsupported(
            f"The keyword {name} cannot be kept.", f"{name} at {at[:120]}", "keywords that can be"
        )
    newer = (name == "const" and any(one in draft for one in OLDER[:2])) or (
        name == "prefixItems" and any(one in draft for one in OLDER)
    )
    if newer:
        raise _unsupported(
            f"The keyword {name} says nothing in the draft that the schema names.",
            f"{name} at {at[:120]} with $schema {draft[:60]}",
            "a keyword of that draft, or no $schema",
        )
    if name in KEPT or name in TOLD or name.startswith(("x-", "_")):
        return
    lowered = {one.lower(): one for one in (*KEPT, *NOT_KEPT)}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.86)
    if close:
        raise _unsupported(
            "A keyword of the schema is none, and looks like one.",
            f"{name} at {at[:120]}",
            f"{lowered[close[0]]}",
            "Spell it so, or begin its name with x- if it is your own.",
        )


def _check_counts(schema: Mapping[str, Any], where: str) -> None:
    """Keys that no property names may repeat in an answer, and count once in its value."""
    least, required = schema.get("minProperties"), schema.get("required", ())
    named = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int | float) and least > named + 1:
        raise _unsupported(
            "That many properties cannot be had for certain.",
            f"minProperties {least} at {where[:120] or '/'} with {named} required by name",
            f"at most {named + 1} there",
            "Name the properties, and list them under required.",
        )


class _Ends:
    """Whether some finite value fits: the least fixed point over a schema and what it refers to."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._known: dict[int, bool] = {}  # by id: nodes live as long as the root
        nodes = [one for one in _schemas(root) if isinstance(one, dict)]
        changed = True
        while changed:
            changed = False
            for one in nodes:
                if not self._known.get(id(one)) and self._fits(one):
                    self._known[id(one)] = changed = True

    def has_end(self, schema: Any) -> bool:
        if isinstance(schema, dict):
            return self._known.get(id(schema), False)
        return schema is not False

    def _fits(self, schema: dict[str, Any]) -> bool:
        if "const" in schema or "enum" in schema:
            return True
        if "$ref" in schema and not self._target(schema["$ref"]):
            return False
        for name in ("anyOf", "oneOf"):
            options = schema.get(name)
            if isinstance(options, list) and not any(map(self.has_end, options)):
                return False
        parts = schema.get("allOf")
        if isinstance(parts, list) and not all(map(self.has_end, parts)):
            return False
        types = schema.get("type")
        types = types if isinstance(types, list) else [types]
        if not set(types) <= {"object", "array"} and types != [None]:
            return True
        ends = []
        if types == [None]:
            # Of any type: a scalar fits, unless what it is combined with has decided.
            return True
        if "object" in types:
            ends.append(self._object(schema))
        if "array" in types:
            ends.append(self._array(schema))
        return any(ends)

    def _object(self, schema: dict[str, Any]) -> bool:
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        required = schema.get("required", ())
        if not isinstance(required, list) or not isinstance(properties, dict):
            return True
        return all(self.has_end(properties.get(name, others)) for name in map(str, required))

    def _array(self, schema: dict[str, Any]) -> bool:
        least = schema.get("minItems", 0)
        if not isinstance(least, int | float) or least <= 0:
            return True
        first = schema.get("prefixItems", schema.get("items"))
        first = first if isinstance(first, list) else []
        rest = schema.get("items", True) if not isinstance(schema.get("items"), list) else True
        needed = first[: int(least)]
        return all(map(self.has_end, needed)) and (least <= len(first) or self.has_end(rest))

    def _target(self, reference: Any) -> bool:
        """What a reference within the schema leads to; one to elsewhere is the engine's affair."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        found: Any = self._root
        for written in reference[1:].split("/")[1:]:
            part = written.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            else:
                return True
        return self.has_end(found)


def _schemas(schema: Any) -> Iterator[Any]:
    """A schema and all below it."""
    yield schema
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        if name in _MAPS and isinstance(value, dict):
            below = list(value.values())
        elif (name in _LISTS or name == "items") and isinstance(value, list):
            below = value
        elif name in _ONE_SCHEMA:
            below = [value]
        else:
            continue
        for one in below:
            yield from _schemas(one)
