"""Damage to files, drawn from a seed: blind, or by somebody who knows the format and gets past its container.

Blind mutants seldom get far: a checksum or a length finds them out. So each format has a mutator of its own, which
takes a file apart, damages one piece and puts it together again with the lengths and checksums that belong to it.

    blind      cut, flip, insert, zero, repeat, swap, overwrite with a number: any bytes
    tree       nested dicts and lists of plain values: JSON, and whatever a pickle may hold
    protobuf   fields of a message at any depth: tags, numbers, order, nesting
    pickled    opcodes of a pickle
    archive    members of a zip, each by what it is; names, copies, compression, and fields of the zip's own headers

Everything is a pure function of the bytes (or the value) and a `random.Random`. Not covered: damage that needs two
files at once, and damage that only makes sense in one field of one format; a target can add such a mutator of its own.
"""

from __future__ import annotations

import copy
import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

PAYLOAD = b"cos\nsystem\n(S'exit 7'\ntR."
"""A pickle that runs a command when it is loaded."""

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
"""Where counters, lengths and indices turn over."""

WORDS = (
    "",
    "\0",
    "../../out",
    "/dev/null",
    "x" * 300,
    "é\u202e",
    "\ud800",
    "__class__",
    "nan",
    "a.b.c",
    "-1",
    "{0}",
)
"""What a name should not be."""


# ---------------------------------------------------------------- any bytes


def _span(data: bytes, random: Random, most: int = 64) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.randint(1, most))


def _noise(random: Random, most: int = 64) -> bytes:
    return random.randbytes(random.randint(1, most))


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def drop(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random)
    return data[:start] + data[end:]


def flip(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 8) if data else 0):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def insert(data: bytes, random: Random) -> bytes:
    start, _ = _span(data, random)
    return data[:start] + _noise(random) + data[start:]


def zero(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random, 512)
    return data[:start] + bytes(end - start) + data[end:]


def repeat(data: bytes, random: Random) -> bytes:
    start, end = _span(data, random, 512)
    return data[:end] + data[start:end] * random.randint(1, 4) + data[end:]


def swap(data: bytes, random: Random) -> bytes:
    (a, b), (c, d) = sorted((_span(data, random), _span(data, random)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def overwrite(data: bytes, random: Random) -> bytes:
    size = random.choice((1, 2, 4, 8))
    number = (random.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, random.choice(("little", "big")))
    start, _ = _span(data, random)
    return data[:start] + number + data[start + size :]


BLIND: tuple[Mutator, ...] = (cut, drop, flip, insert, zero, repeat, swap, overwrite)


def blind(data: bytes, random: Random) -> bytes:
    """One to three kinds of damage that know no format."""
    for _ in range(random.choice((1, 1, 2, 3))):
        data = random.choice(BLIND)(data, random)
    return data


def text(data: bytes, random: Random) -> bytes:
    """Blind damage, or odd words and line ends in a text."""
    if random.random() < 0.5:
        return blind(data, random)
    odd = random.choice((*WORDS, "\u2028", "\x85", "\x1c", "\r", "\ufeff", " " * 200, "\n" * 50))
    start, end = _span(data, random)
    return data[:start] + odd.encode("utf-8", "surrogatepass") + data[end:]


# ---------------------------------------------------------------- nested plain values


def _deep(random: Random) -> Any:
    value: Any = []
    for _ in range(random.choice((10, 60, 150))):
        value = [value]
    return value


ODD: tuple[Callable[[Random], Any], ...] = (
    lambda random: random.choice(NUMBERS),
    lambda random: -random.choice(NUMBERS),
    lambda random: random.choice(WORDS),
    lambda random: random.choice((None, True, False, [], {}, 0.5, -0.0, 1e308, float("inf"), float("nan"))),
    lambda random: [random.choice(NUMBERS)] * random.randint(1, 70),
    lambda random: {random.choice(WORDS): random.choice(NUMBERS)},
    _deep,
)
"""Values that may stand where something else should."""


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            yield one, key
            waiting.append(one[key])


def tree(value: Any, random: Random, odd: Sequence[Callable[[Random], Any]] = ODD) -> Any:
    """A copy of a nested value with one to three changes: other values, other keys, gone, twice, changed over."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return random.choice(odd)(random)
        (holder, key), (other, its) = random.choice(places), random.choice(places)
        kind = random.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = copy.deepcopy(other[its])
        elif kind == 2 and isinstance(holder, dict):
            holder[random.choice(WORDS)] = holder.pop(key)
        elif kind == 2:
            holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif kind == 3 and isinstance(holder[key], int):
            holder[key] += random.choice((-1, 1, 2, 64))
        else:
            holder[key] = random.choice(odd)(random)
    return value


def as_json(data: bytes, random: Random) -> bytes:
    """Change a JSON document, or nest it deeper than anybody reads; what json cannot write is damaged blindly."""
    if random.random() < 0.03:
        return b"[" * (depth := random.choice((1_000, 100_000))) + b"]" * depth
    try:
        return json.dumps(tree(json.loads(data), random)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return blind(data, random)


# ---------------------------------------------------------------- protobuf


@dataclass
class Field:
    """One field of a message: a number, eight or four bytes, bytes, or another message."""

    number: int
    wire: int
    value: int | bytes | list[Field]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _write_varint(value: int) -> bytes:
    found = bytearray()
    value %= 2**64
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def decode(data: bytes, depth: int = 0) -> list[Field]:
    """The fields of a message; whatever can be read as a message in it, is.

    Raises:
        ValueError: it is none.
    """
    fields, at = [], 0
    try:
        while at < len(data):
            tag, at = _read_varint(data, at)
            number, wire, value = tag >> 3, tag & 7, b""
            if wire == 0:
                value, at = _read_varint(data, at)
            else:
                size = {1: 8, 5: 4}.get(wire, 0)
                if wire == 2:
                    size, at = _read_varint(data, at)
                value, at = data[at : at + size], at + size
            if not number or wire not in (0, 1, 2, 5) or at > len(data):
                raise ValueError("no message")
            fields.append(Field(number, wire, _inside(value, depth) if wire == 2 else value))
    except IndexError as error:
        raise ValueError("no message") from error
    return fields


def _inside(value: bytes, depth: int) -> bytes | list[Field]:
    if not value or depth > 12:
        return value
    try:
        return decode(value, depth + 1)
    except ValueError:
        return value


def encode(fields: Sequence[Field]) -> bytes:
    return b"".join(_encode(field) for field in fields)


def _encode(field: Field) -> bytes:
    tag = _write_varint(field.number << 3 | field.wire)
    if isinstance(field.value, int):
        return tag + _write_varint(field.value)
    content = field.value if isinstance(field.value, bytes) else encode(field.value)
    return tag + (_write_varint(len(content)) if field.wire == 2 else b"") + content


def _fields(message: list[Field]) -> Iterator[tuple[list[Field], int]]:
    """Every field at every depth: the message that holds it, and its place there."""
    for place, field in enumerate(message):
        yield message, place
        if isinstance(field.value, list):
            yield from _fields(field.value)


def protobuf(data: bytes, random: Random) -> bytes:
    """Change one to three fields of a message, at any depth, with all lengths put right."""
    try:
        message = decode(data)
    except ValueError:
        return blind(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        everything = list(_fields(message))
        if everything:
            _change_field(*random.choice(everything), *random.choice(everything), random)
    return encode(message)


def _change_field(holder: list[Field], place: int, other: list[Field], its: int, random: Random) -> None:
    field, kind = holder[place], random.randrange(8)
    if kind == 0:
        del holder[place]
    elif kind == 1:
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(field))
    elif kind == 2:
        holder[place] = Field(field.number, other[its].wire, copy.deepcopy(other[its].value))
    elif kind == 3:
        field.number = random.randint(1, 30)
    elif isinstance(field.value, int):
        field.value = random.choice((field.value + 1, field.value - 1, *NUMBERS))
    elif isinstance(field.value, bytes):
        odd = random.choice(WORDS).encode("utf-8", "surrogatepass")
        blindly = blind(field.value, random)
        fits = field.wire == 2
        field.value = random.choice((odd, blindly)) if fits else blindly.ljust(8, b"\xff")[: len(field.value)]
    else:
        field.value = [*field.value, *copy.deepcopy(field.value)] if kind == 4 else encode(field.value)[::2]


# ---------------------------------------------------------------- pickles


def pickled(data: bytes, random: Random) -> bytes:
    """Drop, repeat or exchange opcodes of a pickle, or put a command or lists in lists in its place."""
    try:
        starts = [at for _, _, at in pickletools.genops(data)]
    except Exception:  # noqa: BLE001 what is no pickle any more is damaged blindly
        return blind(data, random)
    if random.random() < 0.1:
        depth = random.choice((1_000, 100_000))
        return random.choice((PAYLOAD, b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."))
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 3))):
        place, other, kind = random.randrange(len(ops)), random.randrange(len(ops)), random.randrange(5)
        if kind == 0:
            ops[place] = b""
        elif kind == 1:
            ops.insert(place, ops[other])
        elif kind == 2:
            ops[place], ops[other] = ops[other], ops[place]
        elif kind == 3:
            ops[place] = ops[place][:1] + blind(ops[place][1:], random)
        else:
            ops.insert(place, PAYLOAD[:-1])
    return b"".join(ops)


# ---------------------------------------------------------------- archives


def archive(data: bytes, random: Random, inside: Mapping[str, Mutator]) -> bytes:
    """Change one member of a zip, or the zip itself, with the checksums that belong to it.

    Args:
        inside: how to damage a member, by the end of its name; others are damaged blindly.
    """
    if random.random() < 0.15:
        return zip_header(data, random)
    members = _members(data)
    name = random.choice(list(members))
    kind, compression = random.randrange(12), zipfile.ZIP_STORED
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[random.choice((*WORDS[:6], f"{name}/x", f"{name}.pkl", name.upper()))] = members.pop(name)
    elif kind == 2:
        members[name] = random.choice(list(members.values()))
    elif kind == 3:
        members[name] = PAYLOAD
    elif kind == 4:
        compression = zipfile.ZIP_DEFLATED
    else:
        mutator = next((mutate for end, mutate in inside.items() if name.endswith(end)), blind)
        members[name] = mutator(members[name], random)
    return pack(members, compression)


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def pack(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members, the same bytes every time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            member = zipfile.ZipInfo(name.encode("utf-8", "replace").decode())
            member.compress_type = compression
            file.writestr(member, content)
    return buffer.getvalue()


_HEADERS = {b"PK\x03\x04": 30, b"PK\x01\x02": 46, b"PK\x05\x06": 22, b"PK\x06\x06": 56}


def zip_header(data: bytes, random: Random) -> bytes:
    """Overwrite a field in one of a zip's own headers."""
    mark, size = random.choice(list(_HEADERS.items()))
    places = [at for at in range(len(data)) if data.startswith(mark, at)]
    if not places:
        return blind(data, random)
    at, width = random.choice(places), random.choice((2, 4))
    start = at + 4 + 2 * random.randrange((size - 4) // 2)
    number = random.choice(NUMBERS) % 2 ** (8 * width)
    return data[:start] + number.to_bytes(width, "little") + data[start + width :]


# ---------------------------------------------------------------- headers of arrays


def safetensors(data: bytes, random: Random) -> bytes:
    """Change the JSON header of a safetensors file, or its length."""
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = random.randrange(8)
    if kind == 0:
        return struct.pack("<Q", random.choice((size - 1, size + 1, *NUMBERS))) + data[8:]
    if kind == 1:
        rest = blind(rest, random)
    else:
        header = as_json(header, random) if kind < 6 else blind(header, random)
    return struct.pack("<Q", len(header)) + header + rest


_NPY = (
    b"'descr': '<f8'", b"'descr': '|O'", b"'descr': '<U9'", b"'descr': [('a', '<f4'), ('b', '<i4')]",
    b"'descr': '<M8[s]'", b"'fortran_order': True", b"'fortran_order': 2", b"'shape': (-1,)", b"'shape': ()",
    b"'shape': (10000000000000000,)", b"'shape': (0, 3)", b"'shape': 5", b"__import__('os').system('exit 7')",
    b"(" * 90, b"",
)  # fmt: skip


def npy(data: bytes, random: Random) -> bytes:
    """Change the header of a .npy file, whose length is put right, or its data."""
    size = int.from_bytes(data[8:10], "little")
    header, rest = data[10 : 10 + size], data[10 + size :]
    kind = random.randrange(6)
    if kind == 0:
        return data[:6] + bytes([random.choice((0, 1, 2, 3, 255)), 0]) + data[8:]
    if kind == 1:
        return data[:10] + header + blind(rest, random)
    if kind == 2:
        header = blind(header, random)
    else:
        parts = header.strip(b"{} \n").split(b", '")
        parts[random.randrange(len(parts))] = random.choice(_NPY)
        header = (
            b"{"
            + b", '".join(part.removeprefix(b"'") if k else part for k, part in enumerate(parts))
            + b"}\n"
        )
    return data[:8] + len(header).to_bytes(4, "little")[:2] + header + rest
