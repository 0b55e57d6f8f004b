"""Valid files made wrong: anywhere, or deep inside with everything around it put right again."""

import gzip
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import yaml

NUMBERS = (0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
TEXTS = (
    "", "x", "../../../etc/passwd", "/etc/passwd", "..", "\x1b[31m\x1b]0;owned\x07", "a\nb\rwinner: fake", "\u202eevil",
    "\0", "\ud800", "a" * 5000, "F8_E4M3", "F4", "BOOL", "U8", "C64", "__metadata__", "net.py:Net", "os:system",
    "hf-hub:x/y", "%s{0}[bold]", "1e999", "NaN", "9" * 5000, "=1+1",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**53, 2**63, 2**64, 10**400, -(10**400), 1e-320, 1e308, float("nan"),
    float("inf"), -0.5, [], {}, [[]], [0], [1, 2, 3], [2**32, 2**32], [0, 2**62], {"": ""}, {"a": {"a": {"a": 1}}},
)  # fmt: skip


def mutated(valid: Sequence[bytes], kind: str, draw: random.Random) -> bytes:
    """One of the files of a kind, with something wrong with it."""
    data = draw.choice(valid)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
        deep = DEEP.get(kind)
        if deep is not None and draw.random() < 0.7:
            with suppress(Exception):  # what is too broken to be taken apart is broken further as it is
                data = deep(data, draw)
                continue
        data = anywhere(data, draw, draw.choice(valid))
    return data


# ------------------------------------------------------------------------------------------------ bytes


def anywhere(data: bytes, draw: random.Random, other: bytes = b"") -> bytes:
    """A file with bytes changed, cut, doubled, or put in from another one."""
    at = draw.randrange(len(data) + 1)
    span = draw.choice((1, 1, 2, 4, 8, draw.randrange(1, 200)))
    match draw.randrange(9):
        case 0 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + draw.randbytes(span) + data[at + span :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + span :]
        case 4:
            return data[:at] + data[at : at + span] * draw.choice((2, 3, 50)) + data[at + span :]
        case 5:
            start = draw.randrange(len(other) + 1)
            return data[:at] + other[start : start + span] + data[at:]
        case 6:
            return data[:at] + other[draw.randrange(len(other) + 1) :]
        case 7:
            return data[:at] + _packed(draw) + data[at + 4 :]
        case _:
            return data + draw.randbytes(span)


def _packed(draw: random.Random) -> bytes:
    number, form = draw.choice(NUMBERS), draw.choice(("<I", ">I", "<Q", "<H", ">Q"))
    size = struct.calcsize(form)
    return struct.pack(form, number % 2 ** (8 * size))


# ------------------------------------------------------------------------------------- values in one another


def value(draw: random.Random) -> Any:
    """Something that is not expected."""
    if draw.random() < 0.01:
        return [draw.choice(VALUES)] * draw.choice((5000, 30_000))
    if draw.random() < 0.02:
        nested: Any = 1
        for _ in range(draw.choice((60, 400))):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        return nested
    return draw.choice(TEXTS) if draw.random() < 0.4 else draw.choice(VALUES)


def tree(root: Any, draw: random.Random) -> Any:
    """Values within one another with some of them changed, lost, doubled, renamed or exchanged; a copy."""
    places: list[tuple[Any, Any]] = []

    def copied(node: Any) -> Any:
        if isinstance(node, dict):
            made: Any = {key: copied(item) for key, item in node.items()}
            places.extend((made, key) for key in made)
        elif isinstance(node, (list, tuple)):
            made = [copied(item) for item in node]
            places.extend((made, index) for index in range(len(made)))
        else:
            return node
        return made

    root = copied(root)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if not places or draw.random() < 0.01:
            return value(draw)
        holder, key = draw.choice(places)
        with suppress(KeyError, IndexError):
            match draw.randrange(6):
                case 0:
                    del holder[key]
                case 1 if isinstance(holder, dict):
                    holder[draw.choice(TEXTS)] = holder.pop(key)
                case 2 if isinstance(holder, list):
                    holder.extend([holder[key]] * draw.choice((1, 3, 100)))
                case 3:
                    there, name = draw.choice(places)
                    holder[key] = json.loads(json.dumps(there[name]))
                case 4 if isinstance(holder[key], (int, float)):
                    holder[key] = draw.choice((holder[key] + 1, -holder[key], holder[key] * 2, *NUMBERS))
                case _:
                    holder[key] = value(draw)
    return root


def dumped(found: Any, draw: random.Random) -> bytes:
    """As JSON; infinity now and then as a number that is too large."""
    text = json.dumps(found)
    return text.replace("Infinity", draw.choice(("1e999", "Infinity", "-1e400"))).encode()


# --------------------------------------------------------------------------------------------- containers


def safetensors(data: bytes, draw: random.Random) -> bytes:
    """The header changed, or the JSON in its metadata, or the numbers; lengths and offsets right again."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__") or {}
    what = draw.random()
    if what < 0.45 and metadata:
        key = draw.choice([*metadata])
        metadata[key] = dumped(tree(json.loads(metadata[key]), draw), draw).decode("utf-8", "replace")
    elif what < 0.75:
        header = tree(header, draw)
    else:
        at = draw.randrange(len(body) + 1) // 4 * 4
        special = struct.pack("<f", draw.choice((float("nan"), float("inf"), -float("inf"), 1e38)))
        body = body[:at] + special + body[at + 4 :] if draw.random() < 0.6 else anywhere(body, draw)
        if draw.random() < 0.5 and isinstance(header, dict):  # whole again
            body = body[: len(data) - 8 - length].ljust(len(data) - 8 - length, b"\0")
    raw = dumped(header, draw)
    return len(raw).to_bytes(8, "little") + raw + body


def lines(data: bytes, draw: random.Random) -> bytes:
    """One line of JSON changed, lost, doubled or moved."""
    found = data.splitlines(keepends=True)
    at = draw.randrange(len(found))
    match draw.randrange(5):
        case 0:
            del found[at]
        case 1:
            found.insert(draw.randrange(len(found)), found[at])
        case _:
            found[at] = dumped(tree(json.loads(found[at]), draw), draw) + b"\n"
    return b"".join(found)


def zipped(data: bytes, draw: random.Random, inside: Callable[[bytes, random.Random], bytes]) -> bytes:
    """One member changed, renamed, doubled or lost; checksums right. Or what the directory says of it, wrong."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    at = draw.randrange(len(members))
    name, content, how = members[at]
    what = draw.random()
    if what < 0.7:
        members[at] = (name, inside(content, draw), how)
    elif what < 0.76:
        members[at] = (draw.choice(TEXTS).replace("\ud800", "?") or "x", content, how)
    elif what < 0.8:
        del members[at]
    elif what < 0.84:
        members += [members[at]] * draw.choice((1, 2000))
    elif what < 0.9:
        members[at] = (name, content + bytes(draw.choice((100, 10**6, 3 * 10**7))), zipfile.ZIP_DEFLATED)
    else:
        members[at] = (name, content, draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, how in members:
            with suppress(UserWarning):
                archive.writestr(zipfile.ZipInfo(name or "x"), content, compress_type=how)
    made = file.getvalue()
    if draw.random() < 0.15:
        entry = draw.choice([match.start() for match in re.finditer(b"PK\x01\x02", made)])
        field = entry + draw.choice((8, 10, 16, 20, 24, 28, 42))  # flags, method, CRC, sizes, name's length, offset
        made = made[:field] + _packed(draw) + made[field + 4 :]
    return made


def npy(data: bytes, draw: random.Random) -> bytes:
    """The header of an array changed and padded again, or its numbers."""
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    match draw.randrange(5):
        case 0:
            shape = draw.choice(
                ("()", "(0,)", "(2**9,)", "(-1,)", "(1099511627776,)", "(4294967296, 4294967296)", "(True,)")
            )
            header = re.sub(r"\(.*\)", shape, header)
        case 1:
            kinds = (
                "|O",
                "<f8",
                ">f4",
                "|V1000000",
                "<U100000",
                "<M8[s]",
                "|b1",
                "|u1",
                "<c16",
                "<f16",
                "|V0",
                "?",
                "e",
            )
            header = re.sub(r"'descr': [^,]*", f"'descr': {draw.choice(kinds)!r}", header)
        case 2:
            header = header.replace(
                "False", draw.choice(("True", "None", "[" * 3000, "1 if 1 else 2", "__import__('os')"))
            )
        case 3:
            header = anywhere(header.encode("latin1"), draw).decode("latin1")
        case _:
            body = anywhere(body, draw)
    raw = header.rstrip(" \n").encode("latin1")
    raw = raw.ljust((len(raw) + 11 + 63) // 64 * 64 - 11) + b"\n"
    return data[:8] + (len(raw) % 65536).to_bytes(2, "little") + raw + body


def pickled(data: bytes, draw: random.Random) -> bytes:
    """A pickle with a number, an operation or a name changed; other records anyhow."""
    if not data.startswith(b"\x80"):
        return anywhere(data, draw)
    match draw.randrange(6):
        case 0:
            at = draw.choice([m.start() for m in re.finditer(rb"K.", data, re.S)] or [0])
            return data[:at] + b"J" + struct.pack("<i", draw.choice(NUMBERS[:11])) + data[at + 2 :]
        case 1:
            at = draw.choice([m.start() for m in re.finditer(rb"K.", data, re.S)] or [0])
            return data[:at] + b"\x8a\x09" + struct.pack("<Q", draw.choice(NUMBERS) % 2**64) + b"\0" + data[at + 2 :]
        case 2:
            names = (b"ctorch\nFloatTensor\n", b"cbuiltins\nbytearray\n", b"cos\nsystem\n", b"ctorch\nSize\n", b"ctorch\nTensor\n",  # noqa: E501
                     b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_qtensor\n")  # fmt: skip
            at = draw.choice([m.span() for m in re.finditer(rb"c[\w.]+\n\w+\n", data)] or [(2, 2)])
            return data[: at[0]] + draw.choice(names) + data[at[1] :]
        case 3:
            at_ = draw.randrange(2, len(data))
            return (
                data[:at_]
                + draw.choice((b"h\0", b"(", b")", b"}", b"]", b"t", b"R", b"0", b"2", b"N", b"s", b"\x86"))
                + data[at_:]
            )
        case 4:
            kinds = (
                b"FloatStorage",
                b"DoubleStorage",
                b"BoolStorage",
                b"HalfStorage",
                b"QInt8Storage",
                b"UntypedStorage",
            )
            return re.sub(rb"\w+Storage", draw.choice(kinds), data, count=1)
        case _:
            return anywhere(data, draw)


def gzipped(data: bytes, draw: random.Random) -> bytes:
    """What is inside changed, and packed again."""
    made = idx(gzip.decompress(data), draw)
    if draw.random() < 0.05:
        made = made[: 10**6] + bytes(draw.choice((10**6, 7 * 10**7)))
    packed = gzip.compress(made, mtime=0, compresslevel=1)
    return packed * draw.choice((1, 1, 1, 2)) if draw.random() < 0.9 else packed[:10] + zlib.compress(made)


def idx(data: bytes, draw: random.Random) -> bytes:
    """A side, the type or the number of sides changed; now and then with the right number of bytes after it."""
    what = draw.random()
    if what < 0.3:
        return data[:2] + bytes([draw.randrange(7, 16)]) + data[3:]
    if what < 0.5:
        return data[:3] + bytes([draw.choice((0, 1, 2, 4, 65, 255))]) + data[4:]
    if what < 0.8:
        at = 4 + 4 * draw.randrange(max(data[3], 1))
        return data[:at] + struct.pack(">I", draw.choice(NUMBERS) % 2**32) + data[at + 4 :]
    sides = [draw.choice((0, 1, 2, 3, 2**32 - 1)) for _ in range(draw.choice((1, 2, 3, 70)))]
    return bytes([0, 0, 8, len(sides)]) + struct.pack(f">{len(sides)}I", *sides) + data[-draw.randrange(1, 40) :]


WORDS = (
    "&a ", "*a", "<<: *a", "<<: {a: 1}", "!!python/object/apply:os.system ['true']", "!!python/name:os.system",
    "!!timestamp x", "!!int x", "!!bool x", "!!float x", "!!binary '@'", "!!set {a}", "!!omap [1]", "!!merge", "? ",
    "? [a]", "[", "{", "]", "- - - ", "'", '"\\x', "|", ">", "%YAML 9", "---\n", "...\n", "\t", "=", "0x" + "f" * 4000,
    "1" * 5000 + "x", "1:2:3", "1" * 5000, ".nan", "-.inf", "\u2028", "\ufeff", "[" * 500, "- " * 500, "{a: " * 300, "!",  # noqa: E501
    "model:\n", "run: {replicates: 10000000000}\n", "#",
)  # fmt: skip


def text(data: bytes, draw: random.Random) -> bytes:
    """A recipe's values changed, or words of YAML put between its own."""
    if b"&l" in data or len(data) > 20_000:  # laughs, which are not to be written out here, or long to read
        return anywhere(data, draw)
    if draw.random() < 0.6:
        return yaml.safe_dump(tree(yaml.safe_load(data), draw), allow_unicode=draw.random() < 0.5).encode()
    found = data.decode()
    if draw.random() < 0.05:
        return (found + "\n" + inflated_yaml(draw.choice((5, 12, 30)), "l0: &l0 [x]")).encode()
    places = [match.start() for match in re.finditer(r"\b|\n", found)]
    at = draw.choice(places)
    return (found[:at] + draw.choice(WORDS) + found[at:]).encode()


DEEP: dict[str, Callable[[bytes, random.Random], bytes]] = {
    **dict.fromkeys(("ticket", "compact", "weights", "arrays", "snapshot", "shrunken"), safetensors),
    "index": lambda data, draw: dumped(tree(json.loads(data), draw), draw),
    "torch": lambda data, draw: zipped(data, draw, pickled),
    "torch old": pickled,
    "recipe": text,
    "idx": idx,
    "idx.gz": gzipped,
    "npz": lambda data, draw: zipped(data, draw, npy),
    "log": lines,
}


def inflated_yaml(levels: int, start: str) -> str:
    """A recipe of a few lines that is 9^levels values when it is written out."""
    lines = [f"  l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(["data:", " args:", f"  {start}", *lines])
