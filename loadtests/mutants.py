"""Hostile uploads, made from a good adapter and a seed: the same index gives the same bytes again.

Every `Mutant` is a whole body for ``POST /admin/adapters``. The kinds take turns, so any run of a
few dozen has each of them; those that go through the boundaries of a file meet every one of them
in turn.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.hostile import (
    BOUNDARY,
    CONFIG,
    CONTENT_TYPE,
    NAMES,
    OPTIONS,
    SOURCES,
    TASK,
    TASK_OPTIONS,
    TENSORS,
    Files,
    Random,
    boundaries,
    flipped,
    form,
    header_end,
    hostile_headers,
    hostile_json,
    junk,
    part_of,
)
from loadtests.hostile_archives import hostile_tar, hostile_zip, packed


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
