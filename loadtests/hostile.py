"""Hostile bytes: forms, flipped and junk values, and safetensors headers that lie."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

CONFIG, TASK, TENSORS = "adapter_config.json", "config.json", "adapter_model.safetensors"
BOUNDARY = "hira-fuzz-boundary"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
Files = dict[str, bytes]
Random = random.Random

PATTERNS = (
    *(
        "(a+)+$",
        "(.*)*x",
        "(.*.*.*.*)*q_proj!",
        "((((((((((.*)*)*)*)*)*)*)*)*)*!",
        "[",
        "(?P<n>",
        "*",
    ),
    *(
        "\\",
        "(?R)",
        "(?<=.*)x",
        "a{1,999999999}",
        "(" * 2000 + ")" * 2000,
        ".*",
        "",
        "\0",
        "é" * 300,
    ),
    *("(?:(?:(?:q|q)|(?:q|q))*)*z", "(?i:Q_PROJ)", "^", "all-linear", "ALL-LINEAR", "q_proj$"),
)
OPTIONS = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "r", "target_modules"),
    *("exclude_modules", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "bias"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "use_dora"),
    *("init_lora_weights", "megatron_config", "trainable_token_indices", "layer_replication"),
    *("target_parameters", "runtime_config", "lora_dropout", "peft_version", "unheard_of", ""),
)
TASK_OPTIONS = (
    *("id2label", "label2id", "num_labels", "problem_type", "architectures", "model_type"),
    *("pad_token_id", "hidden_size", "vocab_size", "dtype", "torch_dtype", "classifier_dropout"),
    *("auto_map", "quantization_config", "num_hidden_layers", "rope_parameters", "hidden_act"),
    *("summary_type", "transformers_version", "_name_or_path", "trust_remote_code"),
)
NAMES = (
    *("", " ", ".", "..", "../x", "a/b", "UPPER", "é", "\U0001f600", "x" * 65, "x" * 4000, "-a"),
    *("a b", "a\0b", "a%2fb", "a\nb", "con:", "base", "__metadata__", "a" * 64 + "\n", "\\x"),
)
SOURCES = (
    *("/etc", "/etc/passwd", "../..", "..", ".", "", "/", "~", "file:///etc", "http://127.0.0.1/"),
    *("hf://a/b", "hf://a/b@main", "hf://", "hf://../..@x", "s3://bucket/key", "s3://", "\0"),
    *("/proc/self/mem", "/dev/zero", "/dev/stdin", "//etc", "x" * 100_000, "C:\\", "/tmp/\ud800"),
)


def form(fields: Mapping[str, str], files: Mapping[str, bytes]) -> bytes:
    body = b"".join(
        part_of(key, None, value.encode("utf-8", "replace")) for key, value in fields.items()
    )
    body += b"".join(part_of("files", name, content) for name, content in files.items())
    return body + f"--{BOUNDARY}--\r\n".encode()


def part_of(name: str, file: str | None, content: bytes) -> bytes:
    named = f'name="{name}"' + ("" if file is None else f'; filename="{file}"')
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; {named}\r\n\r\n"
    return head.encode("utf-8", "replace") + content + b"\r\n"


def flipped(raw: bytes, rng: Random, stop: int) -> bytes:
    """One to sixteen bits of the first ``stop`` bytes turned over."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 16))):
        changed[rng.randrange(min(stop, len(changed)))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def junk(rng: Random, depth: int = 0) -> Any:
    """Any JSON value, with a liking for the unpleasant."""
    match rng.randrange(10 if depth < 3 else 6):
        case 0:
            return rng.choice((None, True, False))
        case 1:
            return rng.choice((0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**4000, 4097))
        case 2:
            return rng.choice((0.0, -0.0, 1e308, 5e-324, 0.5, float("nan"), float("inf"), 1e16))
        case 3:
            return rng.choice(PATTERNS)
        case 4:
            return rng.choice((*NAMES, "\ud800", "q_proj", "score", "LORA", "x" * 100_000))
        case 5:
            return rng.choice(("SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION", "none"))
        case 6 | 7:
            return [junk(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))]
        case 8:
            return [rng.choice((1, "q_proj", None))] * rng.choice((1, 1000, 20_000))
        case _:
            keys = (*PATTERNS, "0", "1", "-1", "base_model_class", "q_proj", "x")
            return {rng.choice(keys): junk(rng, depth + 1) for _ in range(rng.choice((0, 1, 3)))}


def hostile_json(raw: bytes, rng: Random) -> bytes:
    """JSON damaged as text."""
    opening = raw.find(b"{") + 1
    depth = rng.choice((100, 5_000, 100_000))
    deep = rng.choice(
        (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth)
    )
    key = json.dumps(rng.choice((*OPTIONS[:6], "name", "source"))).encode()
    digits = rng.choice((400, 5_000, 200_000))
    constant = rng.choice((b"NaN", b"-Infinity", b"1e999", b"01", b"'a'"))
    long_text = b'"' + b"y" * rng.choice((1 << 16, 2 << 20)) + b'"'

    def inserted(entry: bytes) -> bytes:
        return raw[:opening] + entry + b", " + raw[opening:]

    choices = (
        lambda: flipped(raw, rng, len(raw)),
        lambda: raw[: rng.randrange(len(raw))],
        lambda: inserted(key + b": 1, " + key + b": 2"),
        lambda: inserted(key + b": " + deep),
        lambda: deep,
        lambda: inserted(key + b": " + b"9" * digits),
        lambda: inserted(b'"x": ' + constant),
        lambda: inserted(b'"x": ' + long_text),
        lambda: inserted(b'"\xff\xfe": 1'),
        lambda: inserted(b'"\\ud800": "\\udfff"'),
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: raw.decode().encode("utf-16"),
        lambda: raw + raw,
        lambda: rng.choice((b"", b"null", b"[]", b"0", b'""', b"{}", b"\0" * 100, b" " * 10_000)),
        lambda: rng.randbytes(rng.choice((1, 50, 5_000))),
    )
    return rng.choice(choices)()


# The header of safetensors: eight bytes of length, JSON, then the bytes of the tensors.


def header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def boundaries(raw: bytes) -> list[int]:
    """Offsets where one thing ends and the next begins, in the header and behind it."""
    end = header_end(raw)
    places = {*range(10), end - 2, end - 1, end, len(raw) - 1, len(raw)}
    # Each entry of the header: where its name, its fields and the entry itself begin and end.
    for at in range(8, end):
        if raw[at : at + 2] in (b'"}', b"},", b":{", b"}}") or raw[at : at + 3] == b'],"':
            places.add(at)
    for entry in json.loads(raw[8:end]).values():
        if "data_offsets" in entry:
            places.update(end + offset for offset in entry["data_offsets"])
    return sorted(places)


def with_header(header: Any, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def hostile_headers() -> Iterator[Callable[[bytes, Random], bytes]]:
    """Ways to lie in a header; each takes a good file and a source of randomness."""
    for length in (0, 1, 7, 2**63 - 1, 2**63, 2**64 - 1, (8 << 20) + 1, 8 << 20, 640):
        yield lambda raw, _, length=length: struct.pack("<Q", length) + raw[8:]  # type: ignore[misc]
    for more in (-1, 1, 2):
        yield lambda raw, _, more=more: struct.pack("<Q", header_end(raw) - 8 + more) + raw[8:]  # type: ignore[misc]
    entries: tuple[tuple[str, tuple[Any, ...]], ...] = (
        (
            "data_offsets",
            (
                *(
                    [0, 4],
                    [-4, 0],
                    [4, 0],
                    [0, 2**63],
                    [0, 10**40],
                    [0.0, 4.0],
                    ["0", "4"],
                    [True, 4],
                ),
                *([0], [0, 4, 8], [], None, {}, [[0], [4]], "0,4", [2**64, 2**64 + 4], [1, 5]),
            ),
        ),
        (
            "dtype",
            (
                *(
                    "I64",
                    "U8",
                    "BOOL",
                    "F8_E4M3",
                    "F64",
                    "F16",
                    "BF16",
                    "f32",
                    "",
                    "F32\0",
                    None,
                    7,
                ),
                *([], {}, "x" * 10_000, "C64", "\ud800"),
            ),
        ),
        (
            "shape",
            (
                *([], [0], [-1, -256], [2**40, 2**40], [2**63], [10**50], [1] * 9, [1] * 10_000),
                *([1, 0], [256.0, 1], ["1"], [True, True], None, "1", {}, [[1]], [256, 1, 1]),
            ),
        ),
    )
    for field, values in entries:
        for value in values:
            yield lambda raw, rng, field=field, value=value: changed_entry(  # type: ignore[misc]
                raw, rng, field, value
            )
    for value in (None, 1, [], "x", {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [1]}):
        yield lambda raw, rng, value=value: changed_entry(raw, rng, None, value)  # type: ignore[misc]
    for name in (
        "",
        "x" * 600,
        "x" * 100_000,
        "\0",
        "\ud800",
        "__metadata__",
        "é",
        "../x",
        "a.b.c",
    ):
        yield lambda raw, rng, name=name: renamed_entry(raw, rng, name)  # type: ignore[misc]
    weird: tuple[Any, ...] = (1, [], None, {"a": 1}, {"a": {"b": "c"}}, {"x" * 100_000: "y"}, "x")
    for metadata in weird:
        yield lambda raw, _, metadata=metadata: with_metadata(raw, metadata)  # type: ignore[misc]
    yield repeated_entry
    yield lambda raw, rng: with_header(
        hostile_json(raw[8 : header_end(raw)], rng), raw[header_end(raw) :]
    )
    yield lambda raw, rng: with_header(hostile_json(raw[8 : header_end(raw)], rng), b"")
    yield lambda raw, _: with_header(many_tensors(10_000), b"\0" * 40_000)
    yield lambda raw, _: with_header(many_tensors(8_192), b"\0" * 4 * 8_192)
    yield lambda raw, _: with_header(b" " + raw[8 : header_end(raw)], raw[header_end(raw) :])
    yield lambda raw, _: with_header(
        raw[8 : header_end(raw)] + b" " * 5_000, raw[header_end(raw) :]
    )
    yield lambda raw, _: b""
    yield lambda raw, _: b"PK\x03\x04" + raw
    yield lambda raw, _: b"\x80\x04" + raw
    yield lambda raw, _: b"\0" * 100_000


def parsed(raw: bytes) -> tuple[dict[str, Any], bytes]:
    end = header_end(raw)
    return json.loads(raw[8:end]), raw[end:]


def changed_entry(raw: bytes, rng: Random, field: str | None, value: Any) -> bytes:
    header, data = parsed(raw)
    name = rng.choice([key for key in header if key != "__metadata__"])
    header[name] = value if field is None else {**header[name], field: value}
    return with_header(header, data)


def renamed_entry(raw: bytes, rng: Random, new: str) -> bytes:
    header, data = parsed(raw)
    old = rng.choice([key for key in header if key != "__metadata__"])
    return with_header({new if key == old else key: entry for key, entry in header.items()}, data)


def repeated_entry(raw: bytes, rng: Random) -> bytes:
    header, data = parsed(raw)
    name = rng.choice([key for key in header if key != "__metadata__"])
    again = f"{{{json.dumps(name)}:{json.dumps(header[name])},".encode()
    return with_header(again + json.dumps(header).encode()[1:], data)


def with_metadata(raw: bytes, metadata: Any) -> bytes:
    header, data = parsed(raw)
    return with_header({**header, "__metadata__": metadata}, data)


def many_tensors(count: int) -> dict[str, Any]:
    return {
        f"t{number}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * number, 4 * number + 4]}
        for number in range(count)
    }
