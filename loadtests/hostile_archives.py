"""Hostile archives: members that leave them, links, devices, and sizes that are not so."""

from __future__ import annotations

import bz2
import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

from loadtests.hostile import CONFIG, TENSORS, Files, Random


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
