"""Ways in which a file goes wrong: bytes damaged by chance, and contents changed by someone who knows the format.

Every function takes a generator of chance and the content, and returns the content changed, and what was done in words.
"""

import copy
import gzip
import io
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

Mutated = tuple[bytes, str]
Mutate = Callable[[Random, bytes], Mutated]

ROOT = "@ROOT@"  # in a text: the folder around all that a reader may see, which differs from process to process
HOSTILE = (
    *(
        "",
        ".",
        "..",
        "/",
        "a/b",
        "a\\b",
        "../../victim",
        f"{ROOT}/victim",
        "~/victim",
        "$HOME/victim",
        "${HOME}",
        "%TEMP%",
    ),
    *("CON", "nul.txt", "a:b", " a", "a ", "a.", ".hidden", "-rf", "x" * 300, "x" * 70_000, "\N{SNOWMAN}" * 200),
    *(
        "\x00",
        "a\x00b",
        "a\nb",
        "a\rb",
        "\x1b[2J\x1b]0;owned\x07",
        "\x7f",
        "\x9b31m",
        "\u202eabc",
        "\ud800",
        "1",
        "nan",
    ),
    *("victim.json", "../victim.json", "victim", "../victim", "%s%n", "{0}", "{0.__class__}", "a'b\"c"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64),
    *(10**30, -(10**30), 10**400, 0.0, -0.0, 0.5, 1.5, -1.5, 1e-320, 1e308, -1e308, 1e10, float("nan"), float("inf")),
)
OTHERS = (None, True, False, "", "text", [], {}, [1], {"a": 1}, [[]], [None], {"": None}, *NUMBERS)


# ---- bytes


def mutate_bytes(rng: Random, content: bytes) -> Mutated:
    """Damages bytes as disks, copies and programs do."""
    return rng.choice(_ON_BYTES)(rng, bytearray(content))


def _block(rng: Random, content: bytes | bytearray) -> tuple[int, int]:
    """Draws where a block begins and ends: short ones, long ones, and those of a disk."""
    length = min(rng.choice((1, 2, 4, 8, 64, 512, 4096, len(content) // 2)), len(content))
    start = rng.randrange(len(content) - length + 1)
    return start, start + length


def _flip(rng: Random, content: bytearray) -> Mutated:
    places = sorted(rng.randrange(8 * len(content)) for _ in range(rng.choice((1, 1, 1, 2, 8))))
    for place in places:
        content[place // 8] ^= 1 << place % 8
    return bytes(content), f"flips bits {places}"


def _truncate(rng: Random, content: bytearray) -> Mutated:
    length = rng.choice((0, 1, len(content) - 1, rng.randrange(len(content))))
    return bytes(content[:length]), f"ends after {length} of {len(content)} bytes"


def _behead(rng: Random, content: bytearray) -> Mutated:
    start = rng.choice((1, rng.randrange(1, len(content) + 1)))
    return bytes(content[start:]), f"lacks its first {start} bytes"


def _remove(rng: Random, content: bytearray) -> Mutated:
    start, end = _block(rng, content)
    return bytes(content[:start] + content[end:]), f"lacks bytes {start} to {end}"


def _insert(rng: Random, content: bytearray) -> Mutated:
    start, end = _block(rng, content)
    new = rng.choice((bytes(end - start), rng.randbytes(end - start), bytes(content[start:end])))
    at = rng.randrange(len(content) + 1)
    return bytes(content[:at]) + new + bytes(content[at:]), f"has {len(new)} more bytes at {at}: {new[:8].hex()}..."


def _append(rng: Random, content: bytearray) -> Mutated:
    new = rng.choice((b"\0", b"\n", b" ", b"}", bytes(512), rng.randbytes(100), bytes(content)))
    return bytes(content) + new, f"has {len(new)} more bytes at its end: {new[:8].hex()}..."


def _overwrite(rng: Random, content: bytearray) -> Mutated:
    start, end = _block(rng, content)
    new = rng.choice((bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)))
    content[start:end] = new
    return bytes(content), f"has {new[:8].hex()}... in the place of bytes {start} to {end}"


def _overwrite_number(rng: Random, content: bytearray) -> Mutated:
    code = rng.choice(("<i", "<q", ">i", ">q", "<h", "<f", "<d"))
    bits = 8 * struct.calcsize(code)
    if code in ("<f", "<d"):
        number: float = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30))
    else:
        number = rng.choice((0, 1, 2 ** (bits - 1) - 1, 2 ** (bits // 2), 1000))
    new = struct.pack(code, number)
    at = rng.randrange(max(1, len(content) - len(new) + 1))
    content[at : at + len(new)] = new
    return bytes(content), f"has {number} as {code} at {at}"


def _swap(rng: Random, content: bytearray) -> Mutated:
    a, b = sorted((_block(rng, content), _block(rng, content)))
    if b[0] < a[1]:
        a, b = (a[0], a[0] + 1), (len(content) - 1, len(content))
    parts = content[: a[0]], content[b[0] : b[1]], content[a[1] : b[0]], content[a[0] : a[1]], content[b[1] :]
    return bytes(b"".join(parts)), f"has bytes {a[0]} to {a[1]} and {b[0]} to {b[1]} in each other's place"


_ON_BYTES = (
    *(_flip, _flip, _flip, _truncate, _behead, _remove, _insert, _append, _overwrite, _overwrite_number, _swap),
)


# ---- values: what JSON and saved states have in common


def _places(value: Any, path: str = "") -> list[tuple[Any, Any, str]]:
    """Lists every place of a nested value: the container, the key in it, and the path in words."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    found = [(value, key, f"{path}.{key}") for key, _ in items]
    for key, inner in items:
        found += _places(inner, f"{path}.{key}")
    return found


def _change_place(rng: Random, value: Any, change: Callable[[Random, Any], tuple[Any, str]]) -> tuple[Any, str]:
    """Changes one place of a nested value, which is the caller's to give away."""
    places = _places(value)
    if not places or rng.random() < 0.03:
        return rng.choice(OTHERS), "is another value as a whole"
    container, key, path = rng.choice(places)
    what = rng.choice(("change", "change", "change", "change", "other", "drop", "add", "rename", "repeat", "swap"))
    if what == "drop":
        del container[key]
        return value, f"lacks {path}"
    if what == "add":
        new = (
            rng.choice(HOSTILE) if rng.random() < 0.5 else rng.choice(("version", "format", "name", "dtype", "x", "0"))
        )
        other = copy.deepcopy(container[key]) if rng.random() < 0.5 else rng.choice(OTHERS)
        if isinstance(container, dict):
            container[new] = other
        else:
            container.insert(key, other)
        return value, f"has one more beside {path}: {_short(new)}"
    if what == "rename" and isinstance(container, dict):
        new = rng.choice((*HOSTILE, key.upper(), key + "_", key[:-1]) if isinstance(key, str) else (str(key), key + 1))
        renamed = {new if name == key else name: inner for name, inner in container.items()}
        container.clear()
        container.update(renamed)
        return value, f"calls {path} {_short(new)}"
    if what == "repeat" and isinstance(container, list):
        container[:] = rng.choice((container * 2, container[::-1], [*container, container[key]], container * 50))
        return value, f"repeats or turns what is around {path}"
    if what == "swap":
        other_container, other_key, other_path = rng.choice(places)
        a, b = copy.deepcopy(container[key]), copy.deepcopy(other_container[other_key])
        container[key], other_container[other_key] = b, a
        return value, f"has {path} and {other_path} in each other's place"
    if what == "other":
        container[key] = rng.choice(OTHERS)
        return value, f"has {_short(container[key])} at {path}"
    container[key], said = change(rng, container[key])
    return value, f"{said} at {path}"


def _change_plain(rng: Random, value: Any) -> tuple[Any, str]:
    """Changes a plain value to another of its type, or wraps it."""
    if isinstance(value, bool):
        new: Any = not value
    elif isinstance(value, int):
        new = rng.choice((value + 1, value - 1, -value, 2 * value, float(value), str(value), *NUMBERS))
    elif isinstance(value, float):
        new = rng.choice((value + 1, value - 1e-3, -value, 2 * value, str(value), *NUMBERS))
    elif isinstance(value, str):
        new = rng.choice((value + "x", value[:-1], value.upper(), value * 2, *HOSTILE))
        if rng.random() < 0.3:
            new = rng.choice(
                ("../" + value, f"{ROOT}/{value}", "/" + value, value + "\x1b[31m", value + "\n", "./" + value)
            )
    else:
        new = rng.choice(([value], {"a": value}, [], {}))
    return new, f"has {_short(new)} in the place of {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- JSON


def mutate_json(rng: Random, content: bytes) -> Mutated:
    """Changes what a JSON says: keys, types, values, nesting; or how it is written."""
    if rng.random() < 0.15:
        return rng.choice(_ON_TEXT)(rng, content.decode())
    value, said = _change_place(rng, json.loads(content), _change_plain)
    if rng.random() < 0.05:
        deep = '{"a":' * 100_000
        return deep.encode(), "is nested 100,000 deep"
    return json.dumps(value, indent=2).encode() + b"\n", said


def mutate_json_lines(rng: Random, content: bytes) -> Mutated:
    """Changes one line of JSON among several: what it says, or where it stands."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    what = rng.choice(("change", "change", "drop", "repeat", "swap"))
    if what == "drop":
        return b"".join(lines[:at] + lines[at + 1 :]), f"lacks line {at}"
    if what == "repeat":
        return b"".join([*lines, lines[at]]), f"has line {at} again at its end"
    if what == "swap":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
        return b"".join(lines), f"has lines {at} and {other} in each other's place"
    changed, said = mutate_json(rng, lines[at])
    lines[at] = changed.replace(b"\n", b"") + b"\n"
    return b"".join(lines), f"{said} in line {at}"


def _repeat_key(rng: Random, text: str) -> Mutated:
    name = rng.choice([key for _, key, _ in _places(json.loads(text)) if isinstance(key, str)])
    at = text.index("{") + 1
    return f"{text[:at]}{json.dumps(name)}: {json.dumps(rng.choice(OTHERS))},{text[at:]}".encode(), f"has {name} twice"


def _encode_otherwise(rng: Random, text: str) -> Mutated:
    encoding = rng.choice(("utf-8-sig", "utf-16", "utf-32", "utf-16-be"))
    return text.encode(encoding), f"is written in {encoding}"


def _write_otherwise(rng: Random, text: str) -> Mutated:
    new = rng.choice(
        ("", " ", "null", "[]", "{}", "0", '"text"', "[" * 100_000, "9" * 5_000, "NaN", "{}{}", text * 2, "\ufeff" * 2)
    )
    return new.encode(), f"is {_short(new)}"


def _use_long_number(rng: Random, text: str) -> Mutated:
    digits = [at for at, sign in enumerate(text) if sign.isdigit()]
    at, new = rng.choice(digits or [0]), rng.choice(("9" * 5_000, "1e999", "1e-999", "-0", "0x10", "1_0", "NaN", "٣"))
    return (text[:at] + new + text[at + 1 :]).encode(), f"has {_short(new)} for a digit at {at}"


_ON_TEXT = (_repeat_key, _encode_otherwise, _write_otherwise, _use_long_number)


# ---- saved states: what torch.save wrote


def mutate_state(rng: Random, content: bytes, *, seal: Callable[[Any], Any] = lambda state: state) -> Mutated:
    """Changes what a file of torch.save holds in one place, and saves it again; ``seal`` renews checksums in it."""
    changed, said = mutate_value(rng, torch.load(io.BytesIO(content), weights_only=True))
    buffer = io.BytesIO()
    torch.save(seal(changed), buffer)
    return buffer.getvalue(), said


def mutate_value(rng: Random, value: Any) -> tuple[Any, str]:
    """Changes one place of a nested value that may hold tensors; the value itself stays as it is."""
    return _change_place(rng, _plain(value), _change_value)


def _plain(value: Any) -> Any:
    """Returns a copy whose dicts may be changed: an OrderedDict with metadata is a plain one then."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else copy.deepcopy(value)


def _change_value(rng: Random, value: Any) -> tuple[Any, str]:
    if not isinstance(value, Tensor):
        return _change_plain(rng, value)
    change = rng.choice(
        (*_ON_TENSORS, _change_entries, _change_entries, *((_change_bits,) * 3 if value.dtype == torch.bool else ()))
    )
    try:
        new = change(rng, value.detach().clone())
    except (RuntimeError, TypeError, IndexError, NotImplementedError):  # of this type or shape there is none
        return value.new_zeros(0), "has an empty tensor"
    return new, f"has a tensor changed by {change.__name__.strip('_')}"


def _change_entries(rng: Random, x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    for _ in range(rng.choice((1, 1, 5))):
        at = rng.randrange(len(flat))
        flat[at] = rng.choice((0, 1, -1, float(flat[at]) + 1, float("nan"), float("inf"), -1e30, 2**30))
    return flat.reshape(x.shape)


def _change_bits(rng: Random, x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    at, other = rng.randrange(len(flat)), rng.randrange(len(flat))
    if rng.random() < 0.5:
        flat[at] = ~flat[at]
    else:
        flat[at], flat[other] = flat[other].clone(), flat[at].clone()
    return flat.reshape(x.shape)


def _change_type(rng: Random, x: Tensor) -> Tensor:
    types = (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
    )
    return x.to(rng.choice(types))


def _change_shape(rng: Random, x: Tensor) -> Tensor:
    ways = (
        x.flatten,
        x.t,
        lambda: x[:-1],
        lambda: x[None],
        lambda: x[..., 0],
        lambda: torch.cat((x, x)),
        lambda: x.sum(),
    )
    return rng.choice(ways)().clone()


def _change_order(rng: Random, x: Tensor) -> Tensor:
    return rng.choice((x.flip(0), x.roll(1), x.reshape(-1)[torch.randperm(x.numel())].reshape(x.shape)))


def _change_all(rng: Random, x: Tensor) -> Tensor:
    return rng.choice((torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, float("nan")), -x))


def _change_layout(rng: Random, x: Tensor) -> Tensor:
    ways = (
        lambda: x.to_sparse(),
        lambda: x.to("meta"),
        lambda: torch.zeros(1, dtype=x.dtype).expand(x.shape),
        lambda: torch.zeros(1, dtype=x.dtype).expand(2**40),
        lambda: torch.empty_permuted(x.shape, list(range(x.ndim))[::-1], dtype=x.dtype).copy_(x),
        lambda: torch.stack((x, x), dim=-1)[..., 0],
        lambda: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
        lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda: x.view(torch.uint8).fill_(2).view(x.dtype),
    )
    return rng.choice(ways)()


_ON_TENSORS = (_change_type, _change_shape, _change_order, _change_all, _change_layout)


# ---- scans


def mutate_nifti(rng: Random, content: bytes) -> Mutated:
    """Changes a field of the header of a NIfTI file, or some voxels."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    changed, (name, code, at, count) = bytearray(content), rng.choice(_NIFTI_FIELDS)
    at += struct.calcsize(code) * rng.randrange(count)
    if code == "f":
        number: float = rng.choice((0.0, 1.0, -1.0, 2.0, 1e-30, 1e-6, 1e6, 1e30, float("nan"), float("inf")))
    else:
        number = rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 256, 512, 1024, 2304, 9, 32767, -1))
    struct.pack_into(f"<{code}", changed, at, number % 256 if code == "B" else number)
    return bytes(changed), f"has {number} in {name} at {at}"


_NIFTI_FIELDS = (
    *(
        ("sizeof_hdr", "i", 0, 1),
        ("dim", "h", 40, 8),
        ("dim", "h", 40, 8),
        ("datatype", "h", 70, 1),
        ("bitpix", "h", 72, 1),
    ),
    *(("pixdim", "f", 76, 8), ("pixdim", "f", 76, 8), ("vox_offset", "f", 108, 1), ("scl_slope", "f", 112, 2)),
    *(("xyzt_units", "B", 123, 1), ("qform_code", "h", 252, 2), ("quatern", "f", 256, 6), ("srow", "f", 280, 12)),
    *(("magic", "B", 344, 4), ("extension", "B", 348, 4), ("extension", "i", 348, 2)),
)


def in_gzip(mutate: Mutate) -> Mutate:
    """Makes a mutation of what is in a gzip file, which is packed again with the right checksum."""

    def packed(rng: Random, content: bytes) -> Mutated:
        if rng.random() < 0.03:
            return content + _BOMB * 128, "goes on for 2 GB more, of zeros"
        changed, said = mutate(rng, gzip.decompress(content))
        return gzip.compress(changed, mtime=0), f"packed: {said}"

    return packed


def _zeros_in_gzip(num_bytes: int) -> bytes:
    packing = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packing.compress(bytes(num_bytes)) + packing.flush()


_BOMB = _zeros_in_gzip(2**24)


def mutate_text_header(rng: Random, content: bytes) -> Mutated:
    """Changes a word, a line or the end of the header of an NRRD or MetaImage file, or some bytes of it."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    end = next(at for at in (content.find(b"\n\n") + 1, content.find(b"LOCAL\n") + 5) if at > 4)
    lines = content[:end].split(b"\n")
    at = rng.randrange(len(lines))
    words = re.split(rb"([ (),]+)", lines[at])
    place = rng.randrange(len(words))
    other = rng.choice((*_HEADER_WORDS, rng.choice(NUMBERS), rng.choice(HOSTILE)))
    kind = rng.choice(("word", "word", "word", "word", "lost", "twice", "line"))
    new = str(other).encode("utf-8", "replace")
    if kind == "word":
        lines[at] = b"".join([*words[:place], new, *words[place + 1 :]])
    elif kind == "line":
        lines[at] = lines[at].split(b" ")[0] + b" " + new
    else:
        lines[at : at + 1] = [] if kind == "lost" else [lines[at]] * 2
    return b"\n".join(lines) + content[end:], f"line {at}, {kind}: {lines[at : at + 1]}"


_HEADER_WORDS = (
    *(
        "none",
        "nan",
        "(1,0,0)",
        "(0,0,0)",
        "RAS",
        "scanner-xyz",
        "list",
        "domain",
        "gzip",
        "raw",
        "big",
        "float",
        "block",
    ),
    *(
        "LOCAL",
        "LIST",
        "a.raw",
        "True",
        "False",
        "MET_FLOAT",
        "MET_CHAR",
        "1 0 0 0 1 0 0 0 1",
        "1000 1000 1000",
        "9 9 0",
    ),
    *("sizes:", "space", "data file: a.raw", "byte skip: -1", "DimSize", "NDims", "HeaderSize", "CompressedData"),
)


# ---- archives


def mutate_zip(rng: Random, content: bytes) -> Mutated:
    """Changes the members of an archive, as torch.save writes one, with the right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    name, data = members[at]
    what = rng.choice(("drop", "repeat", "rename", "change", "compress", "bomb", "shuffle", "add"))
    compression = zipfile.ZIP_DEFLATED if what in ("compress", "bomb") else zipfile.ZIP_STORED
    if what == "drop":
        del members[at]
    elif what == "repeat":
        members.append((name, mutate_bytes(rng, data or b"x")[0]))
    elif what == "rename":
        members[at] = rng.choice((f"../{name}", f"/{name}", name.upper(), name + "x", "victim")), data
    elif what == "change":
        members[at] = name, mutate_bytes(rng, data or b"x")[0]
    elif what == "bomb":
        members[at] = name, bytes(2**29)
    elif what == "shuffle":
        rng.shuffle(members)
    elif what == "add":
        members.append(
            (rng.choice(("archive/code/x.py", "../victim", "archive/constants.pkl", "x" * 1000)), b"precious")
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for member, inner in members:
            archive.writestr(member, inner)
    return buffer.getvalue(), f"archive: {what} {name}"


# ---- plans


def in_plan(rng: Random, content: bytes) -> Mutated:
    """Makes a change of what is in a plan, which gets the right size and checksum."""
    if rng.random() < 0.3:
        rest, said = mutate_bytes(rng, content[24:])
    else:
        body, words = bytearray(content[24:]), 4 * int.from_bytes(content[48:56], "little")
        fields, behind = 8 * rng.randrange((len(body) - words) // 8), len(body) - 4 - 4 * rng.randrange(words // 4)
        code, at = rng.choice((("q", fields), ("i", behind)))
        (old,) = struct.unpack_from(f"<{code}", body, at)
        most = 2 ** (8 * struct.calcsize(code) - 1) - 1
        number = rng.choice((old - 1, old + 1, -1, 0, 1, 2, 3, 16, 17, 255, 2**20, 2**31 - 1, most, -most, most // 4))
        struct.pack_into(f"<{code}", body, at, max(-most, min(number, most)))
        rest, said = bytes(body), f"has {number} in the place of {old} at {24 + at}"
    return struct.pack("<8sqII", content[:8], 24 + len(rest), zlib.crc32(rest), 0) + rest, f"sealed: {said}"
