"""Hostile uploads, made from a good adapter and a seed: the same index gives the same bytes again.

Every `Mutant` is a whole body for ``POST /admin/adapters``. The kinds take turns, so any run of a
few dozen has each of them; those that go through the boundaries of a file meet every one of them
in turn.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class Mutant:
    """One hostile request."""

    kind: str
    index: int
    name: str  # that it asks for, where it does
    body: bytes
    content_type: str | None = CONTENT_TYPE
    leave_after: int | None = None  # the client goes away after so many bytes of the body


class Maker:
    """Makes mutants of one adapter.

    Args:
        folder: A good PEFT adapter with a task configuration.
        seed: Of everything random.
        kept: Names of adapters that must survive; now and then one is aimed at.
    """

    def __init__(self, folder: Path, seed: int, kept: tuple[str, ...] = ()) -> None:
        self.seed = seed
        self.kept = kept
        hira = small(folder)
        self.bases = (hira, as_lora(hira))
        self._families: list[tuple[str, Callable[[Random, int], Mutant]]] = [
            ("tensors: flipped bits", self._flips),
            ("tensors: cut off", self._cut),
            ("tensors: cut at a boundary", self._cut_at_boundary),
            ("tensors: flipped at a boundary", self._flip_at_boundary),
            ("tensors: cut at a boundary", self._cut_at_boundary),
            ("tensors: flipped at a boundary", self._flip_at_boundary),
            ("tensors: hostile header", self._header),
            ("tensors: hostile values", self._values),
            ("config: values", self._config_values),
            ("config: values", self._config_values),
            ("config: text", self._config_text),
            ("task config: values", self._task_values),
            ("task config: text", self._task_text),
            ("archive: damaged", self._archive_damaged),
            ("archive: hostile", self._archive_hostile),
            ("archive: hostile", self._archive_hostile),
            ("multipart: form", self._form),
            ("multipart: bytes", self._form_bytes),
            ("multipart: client leaves", self._leaving),
            ("json: body", self._json),
        ]

    def make(self, index: int) -> Mutant:
        """The mutant of this index, negative ones too."""
        kind, family = self._families[index % len(self._families)]
        made = family(random.Random(f"{self.seed}/{index}"), index)
        return Mutant(
            kind, index, made.name, made.body, made.content_type, leave_after=made.leave_after
        )

    def good(self, name: str) -> Mutant:
        """The adapter as it is, under a name."""
        return self._upload(self.bases[0], 0, name=name)

    def _turn(self, index: int, period: int) -> int:
        """The how manieth of its family an index is; families of two places count both."""
        families = [name for name, _ in self._families]
        round_, place = divmod(index, len(families))
        places = [at for at, name in enumerate(families) if name == families[place]]
        turn = round_ * len(places) + places.index(place)
        order = list(range(period))
        random.Random(f"{self.seed}/order").shuffle(order)
        return order[turn % period]

    def _upload(self, files: Mapping[str, bytes], index: int, *, name: str | None = None) -> Mutant:
        """Files as a form, each a part."""
        rng = random.Random(f"{self.seed}/{index}/name")
        if name is None:
            aimed = bool(self.kept) and rng.random() < 0.1
            name = rng.choice(self.kept) if aimed else f"fuzz-{index}"
        fields = {"name": name, "replace": "true"}
        return Mutant("", index, name, form(fields, files))

    # The tensors

    def _flips(self, rng: Random, index: int) -> Mutant:
        base = rng.choice(self.bases)
        raw = base[TENSORS]
        stop = rng.choice((len(raw), header_end(raw), 16))
        return self._upload({**base, TENSORS: flipped(raw, rng, stop)}, index)

    def _cut(self, rng: Random, index: int) -> Mutant:
        base = rng.choice(self.bases)
        raw = base[TENSORS]
        cut = raw[: rng.randrange(len(raw))]
        if rng.random() < 0.3:
            cut = raw + rng.randbytes(rng.choice((1, 8, 4096)))
        return self._upload({**base, TENSORS: cut}, index)

    def _cut_at_boundary(self, rng: Random, index: int) -> Mutant:
        base = self.bases[0]
        places = boundaries(base[TENSORS])
        place = places[self._turn(index, len(places))] + rng.choice((-1, 0, 0, 1))
        return self._upload({**base, TENSORS: base[TENSORS][: max(0, place)]}, index)

    def _flip_at_boundary(self, rng: Random, index: int) -> Mutant:
        base = self.bases[0]
        raw = bytearray(base[TENSORS])
        places = [place for place in boundaries(base[TENSORS]) if place < len(raw)]
        raw[places[self._turn(index, len(places))]] ^= 1 << rng.randrange(8)
        return self._upload({**base, TENSORS: bytes(raw)}, index)

    def _header(self, rng: Random, index: int) -> Mutant:
        base = rng.choice(self.bases)
        makers = tuple(hostile_headers())
        raw = makers[self._turn(index, len(makers))](base[TENSORS], rng)
        return self._upload({**base, TENSORS: raw}, index)

    def _values(self, rng: Random, index: int) -> Mutant:
        base = rng.choice(self.bases)
        raw = bytearray(base[TENSORS])
        values = (float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45)
        for _ in range(rng.choice((1, 3, 100))):
            at = header_end(base[TENSORS]) + 4 * rng.randrange(1, 8000)
            if at + 4 <= len(raw):
                struct.pack_into("<f", raw, at, rng.choice(values))
        return self._upload({**base, TENSORS: bytes(raw)}, index)

    # The configurations

    def _config_values(self, rng: Random, index: int) -> Mutant:
        return self._with_values(rng, index, CONFIG, OPTIONS)

    def _task_values(self, rng: Random, index: int) -> Mutant:
        return self._with_values(rng, index, TASK, TASK_OPTIONS)

    def _with_values(self, rng: Random, index: int, file: str, options: tuple[str, ...]) -> Mutant:
        base = rng.choice(self.bases)
        content = json.loads(base[file])
        for _ in range(rng.choice((1, 1, 2, 5))):
            key = rng.choice((*content, *options))
            if rng.random() < 0.15:
                content.pop(key, None)
            else:
                content[key] = junk(rng)
        return self._upload({**base, file: json.dumps(content).encode()}, index)

    def _config_text(self, rng: Random, index: int) -> Mutant:
        return self._with_text(rng, index, CONFIG)

    def _task_text(self, rng: Random, index: int) -> Mutant:
        return self._with_text(rng, index, TASK)

    def _with_text(self, rng: Random, index: int, file: str) -> Mutant:
        base = rng.choice(self.bases)
        files = {**base, file: hostile_json(base[file], rng)}
        if rng.random() < 0.05:
            del files[file]
        return self._upload(files, index)

    # The archives

    def _archive_damaged(self, rng: Random, index: int) -> Mutant:
        suffix = rng.choice((".zip", ".tar", ".tar.gz"))
        raw = packed(rng.choice(self.bases), suffix)
        match rng.randrange(4):
            case 0:
                raw = raw[: rng.randrange(len(raw))]
            case 1:
                raw = flipped(raw, rng, len(raw))
            case 2:  # where the tables are
                raw = flipped(raw, rng, 512)
            case _:
                raw = raw[:-400] + flipped(raw[-400:], rng, 400)
        suffix = rng.choice((suffix, suffix, suffix, ".zip", ".tar.gz", ".tgz"))
        return self._upload({f"adapter{suffix}": raw}, index)

    def _archive_hostile(self, rng: Random, index: int) -> Mutant:
        makers = (hostile_tar, hostile_tar, hostile_zip)
        raw, suffix = rng.choice(makers)(rng.choice(self.bases), rng)
        return self._upload({f"adapter{suffix}": raw}, index)

    # The requests

    def _form(self, rng: Random, index: int) -> Mutant:
        """A form that can be read, but does not say what it should."""
        base = dict(rng.choice(self.bases))
        fields: dict[str, str] = {"name": f"fuzz-{index}", "replace": "true"}
        match rng.randrange(8):
            case 0:
                del base[rng.choice((CONFIG, TENSORS))]
            case 1:
                del fields["name"]
            case 2:
                fields["name"] = rng.choice(NAMES)
            case 3:
                flags = ("maybe", "2", "\0", "x" * 5000, "null", " ", "é")
                fields[rng.choice(("replace", "pinned", "preload"))] = rng.choice(flags)
            case 4:
                fields[rng.choice(("source", "path", "", "\0", "x" * 3000))] = rng.choice(SOURCES)
            case 5:
                wrong = ("../../x", "/etc/passwd", "..", "", "a\\b", "\0", "adapter_model.bin", "é")
                base[rng.choice(wrong)] = base.pop(rng.choice((CONFIG, TENSORS)))
            case 6:
                base = {f"file{number}.txt": b"x" for number in range(rng.choice((1, 63, 64, 200)))}
            case _:
                base = {}
        return Mutant("", index, fields.get("name", ""), form(fields, base))

    def _form_bytes(self, rng: Random, index: int) -> Mutant:
        """A body that is not quite a form."""
        name = f"fuzz-{index}"
        body = form({"name": name, "replace": "true"}, rng.choice(self.bases))
        line = f"--{BOUNDARY}\r\n".encode()
        content_type = CONTENT_TYPE
        match rng.randrange(12):
            case 0:
                content_type = rng.choice(
                    (
                        *("multipart/form-data", "multipart/form-data; boundary=", "multipart/"),
                        *("multipart/form-data; boundary=other", "multipart/mixed; boundary=x"),
                        f"multipart/form-data; boundary={'b' * 3000}",
                        f'multipart/form-data; boundary="{BOUNDARY}',
                        f"multipart/form-data; boundary={BOUNDARY}; boundary=x",
                        f"multipart/form-data; charset=utf-16; boundary={BOUNDARY}",
                        f"multipart/form-data; boundary*=utf-8''{BOUNDARY}",
                    )
                )
            case 1:
                body = body[: rng.randrange(len(body))]
            case 2:
                body = body[: rng.randrange(600)]
            case 3:
                body = flipped(body, rng, 500)
            case 4:
                body = body.replace(
                    b"\r\n", rng.choice((b"\n", b"\r", b"\r\n\r\n")), rng.choice((1, 5, -1))
                )
            case 5:
                body = body.removesuffix(b"--\r\n")
            case 6:
                body = rng.randbytes(rng.choice((0, 1, 100, 100_000)))
            case 7:
                header = rng.choice(
                    (b"X: " + b"y" * 5000, b"x" * 10_000, b": y", b"\0: \0", b"X:\r\n y")
                )
                body = line + header + b"\r\n\r\nx\r\n" + body
            case 8:
                body = line + b'Content-Disposition: form-data; name="a"\r\n\r\n1\r\n' + body
            case 9:
                part = line + b'Content-Disposition: form-data; name="name"\r\n\r\n'
                body = part + rng.randbytes(rng.choice((10, 4096, 4097, 50_000))) + b"\r\n" + body
            case 10:
                body = rng.randbytes(1000) + b"\r\n" + body
            case _:
                twice = part_of("files", CONFIG, b"{}")
                body = twice + body
        return Mutant("", index, name, body, content_type)

    def _leaving(self, rng: Random, index: int) -> Mutant:
        name = f"fuzz-{index}"
        body = form({"name": name, "replace": "true"}, rng.choice(self.bases))
        return Mutant("", index, name, body, leave_after=rng.randrange(len(body)))

    def _json(self, rng: Random, index: int) -> Mutant:
        wish: dict[str, Any] = {"name": f"fuzz-{index}", "source": rng.choice(SOURCES)}
        for _ in range(rng.choice((0, 1, 2))):
            key = rng.choice(("name", "source", "replace", "pinned", "preload", "extra", ""))
            wish[key] = rng.choice((junk(rng), rng.choice(NAMES)))
        raw = json.dumps(wish).encode()
        if rng.random() < 0.5:
            raw = hostile_json(raw, rng)
        types = ("application/json", "application/json; charset=utf-16", "text/plain", "", None)
        content_type = rng.choice((types[0], *types))
        return Mutant("", index, f"fuzz-{index}", raw, content_type)


def small(folder: Path) -> Files:
    """The files of an adapter with all but its first rank cut away: a small body, many tensors."""
    from safetensors.torch import load_file, save

    tensors = load_file(folder / TENSORS)
    for key, value in tensors.items():
        if key.endswith("_A"):
            tensors[key] = value[:1].float().contiguous()
        elif key.endswith("_B"):
            tensors[key] = value[:, :1].float().contiguous()
    config = {**json.loads((folder / CONFIG).read_text()), "r": 1}
    return {
        CONFIG: json.dumps(config).encode(),
        TASK: (folder / TASK).read_bytes(),
        TENSORS: save(tensors, {"format": "pt"}),
    }


def as_lora(files: Files) -> Files:
    """The same factors as a LoRA adapter."""
    from safetensors.torch import load, save

    config = json.loads(files[CONFIG])
    kept = ("base_model_name_or_path", "modules_to_save", "r", "target_modules", "task_type")
    lora = {"peft_type": "LORA", "lora_alpha": 1, **{key: config[key] for key in kept}}
    tensors = {
        key.replace("hira_A", "lora_A.weight").replace("hira_B", "lora_B.weight"): value
        for key, value in load(files[TENSORS]).items()
    }
    return {**files, CONFIG: json.dumps(lora).encode(), TENSORS: save(tensors, {"format": "pt"})}


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


# The archives


def packed(files: Mapping[str, bytes], suffix: str) -> bytes:
    out = io.BytesIO()
    if suffix == ".zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w") as archive_:
        for name, content in files.items():
            add(archive_, name, content)
    return gzip.compress(out.getvalue()) if suffix == ".tar.gz" else out.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **changes: Any) -> None:
    """A member of a tar, with any of its header's fields changed."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def hostile_tar(files: Files, rng: Random) -> tuple[bytes, str]:
    out = io.BytesIO()
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    targets = ("/etc/passwd", "../../x", CONFIG, "/dev/zero", "", "\udc80")
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    names = ("../x", "/etc/x", "a/../../x", "..", "C:\\x", "a\\..\\..\\x", "x" * 5_000, "./" * 500)
    with tarfile.open(fileobj=out, mode="w", format=rng.choice(formats)) as tar:
        for name, content in files.items():
            add(tar, name, content)
        match rng.randrange(9):
            case 0:
                link = rng.choice(targets)
                add(
                    tar,
                    rng.choice((TENSORS, "link", "README.md")),
                    type=rng.choice(kinds),
                    linkname=link,
                )
            case 1:
                add(tar, rng.choice(names), b"x")
            case 2:
                add(tar, rng.choice((CONFIG, TENSORS, "b/" + CONFIG)), b"{}")
            case 3:
                for number in range(rng.choice((900, 1_100, 5_000))):
                    add(tar, f"x{number}")
            case 4:
                add(tar, "big", b"\0" * (4 << 20))  # a bomb when it is packed
            case 5:
                records = {
                    "size": rng.choice(("99999999999999", "-1", "x")),
                    "comment": "y" * 100_000,
                }
                add(tar, "pax", b"x", pax_headers=records)
            case 6:
                sparse = {
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.name": CONFIG,
                }
                sparse["GNU.sparse.realsize"] = rng.choice(("9999999999999", "-5", "x"))
                add(tar, "sparse", b"1\n0\n1\n" + b"\0" * 506, pax_headers=sparse)
            case 7:
                add(tar, "adapter_model.bin", b"\x80\x04.")
            case _:
                add(tar, "odd", mode=0o7777, uid=2**21, mtime=2**33, uname="\udcff" * 20)
    raw = bytearray(out.getvalue())
    if rng.random() < 0.3:  # a size that lies, under a checksum that is right
        lie = rng.choice(
            (b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\x80" + b"\xff" * 11)
        )
        raw[124:136] = lie
        raw[148:156] = b" " * 8
        raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    if rng.random() < 0.4:
        return gzip.compress(bytes(raw)), ".tar.gz"
    if rng.random() < 0.1:
        return bz2.compress(bytes(raw)), rng.choice((".tar", ".tar.gz"))
    return bytes(raw), ".tar"


def hostile_zip(files: Files, rng: Random) -> tuple[bytes, str]:
    out = io.BytesIO()
    names = ("../x", "/etc/x", "a/../../x", "C:\\x", "a\\..\\x", "x\0y", "x" * 5_000, "é", "..")
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    case = rng.randrange(8)
    method = rng.choice(methods) if case == 0 else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if case == 1:
            archive.writestr(rng.choice(names), b"x")
        elif case == 2:
            member = zipfile.ZipInfo(rng.choice(("link", "README.md", TENSORS + "x")))
            member.external_attr = rng.choice((0o120777, 0o020666, 0o010666, 0o060666)) << 16
            archive.writestr(member, "/etc/passwd")
        elif case == 3:
            archive.writestr("big", b"\0" * (8 << 20))
        elif case == 4:
            for number in range(rng.choice((900, 1_100, 20_000))):
                archive.writestr(zipfile.ZipInfo(f"x{number}"), b"")
        elif case == 5:
            archive.comment = b"c" * 65_535
    raw = bytearray(out.getvalue())
    table = raw.find(b"PK\x01\x02")
    if case == 6 and table >= 0:  # the sizes in the table lie
        field = rng.choice((20, 24))
        struct.pack_into("<I", raw, table + field, rng.choice((0, 1, 2**31, 2**32 - 1)))
    elif case == 7 and table >= 0:  # flags, method, offset of the member
        field, width = rng.choice(((8, "<H"), (10, "<H"), (42, "<I"), (28, "<H"), (30, "<H")))
        struct.pack_into(width, raw, table + field, rng.choice((0, 1, 9, 99, 0xFFFF)))
    return bytes(raw), ".zip"
