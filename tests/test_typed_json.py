"""JSON that is read as the type it was written from: the same value again, or a refusal that names the place."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from dstlib.errors import DataError, StateError, require
from dstlib.files import write_json
from dstlib.typed_json import MAX_BYTES, MAX_DEPTH, OPTIONAL, parse_json, read_json, sealed


@dataclass(frozen=True)
class Row:
    name: str
    plain_ms: float | None
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fits = self.plain_ms is None or self.plain_ms > 0
        require(fits, "plain_ms", "Row", allowed="above 0", given=self.plain_ms, remedy="Measure anew.")


@dataclass(frozen=True, kw_only=True)
class Sheet:
    rows: list[Row]
    size: tuple[int, float, bool]
    method: Literal["set", "rigl"]
    by_name: dict[str, Row | int] = field(default_factory=dict)
    opaque: Any = None


SHEET = Sheet(rows=[Row("a", 1.5, (3, 3)), Row("b", None)], size=(1, 2.0, True), method="set", by_name={"x": 3})


def parsed(content: bytes | Any, kind: Any = Sheet, **options: Any) -> Any:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return parse_json(content, kind, where="sheet.json", remedy="Write it anew.", **options)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "sheet.json", asdict(SHEET))
    assert read_json(tmp_path / "sheet.json", Sheet, remedy="Write it anew.") == SHEET


def row(index: int, **values: Any) -> Callable[[Any], object]:
    return lambda document: document["rows"][index].update(values)


def top(**values: Any) -> Callable[[Any], object]:
    return lambda document: document.update(values)


def named(**values: Any) -> Callable[[Any], object]:
    return top(by_name={"a": {**asdict(Row("", 1)), **values}})


@pytest.mark.parametrize(
    ("change", "place", "text"),
    [
        (row(1, plain_ms="a"), "rows[1].plain_ms", "a number or null, got 'a'"),
        (row(0, plain_ms=True), "rows[0].plain_ms", "a number or null, got True"),
        (row(0, evil=1), "rows[0].evil", "none but name, plain_ms, taps, got 1"),
        (lambda d: d["rows"][0].pop("name"), "rows[0].name", "text, got nothing"),
        (lambda d: d["rows"][0].pop("taps"), "rows[0].taps", "a list, got nothing"),
        (row(0, taps=[1, 2.0]), "rows[0].taps[1]", "a whole number, got 2.0"),
        (row(0, taps=[True]), "rows[0].taps[0]", "a whole number, got True"),
        (row(0, plain_ms=-1), "rows[0]", "a value of Row, got plain_ms of Row: expected above 0"),
        (row(0, plain_ms=1e999), "rows[0].plain_ms", "a finite number of 64 bits, got inf"),
        (row(0, taps=[10**25]), "rows[0].taps[0]", "a finite number of 64 bits, got inf"),
        (row(0, taps=[10**4000]), "rows[0].taps[0]", "a finite number of 64 bits, got inf"),
        (row(0, name="\ud800"), "rows[0].name", "text in Unicode, got '\\ud800'"),
        (row(0, name=5), "rows[0].name", "text, got 5"),
        (top(rows={}), "rows", "a list, got {}"),
        (top(size=[1, 2]), "size", "a list of 3, got [1, 2]"),
        (top(size=[1, 2, 0]), "size[2]", "true or false, got 0"),
        (top(method="SET"), "method", "'set' or 'rigl', got 'SET'"),
        (top(by_name={"a b": None}), "by_name['a b']", "an object or a whole number, got None"),
        (named(x=1), "by_name.a.x", "none but name, plain_ms, taps, got 1"),
        (named(plain_ms=0), "by_name.a", "a value of Row, got plain_ms of Row: expected above 0"),
        (top(opaque=[{"deep": float("nan")}]), "opaque[0].deep", "a finite number of 64 bits, got nan"),
        (top(**{"a\x1b[2J": 1}), r"['a\x1b[2J']", "none but rows, size, method, by_name, opaque, got 1"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[Any], object], place: str, text: str) -> None:
    document = deepcopy(asdict(SHEET))
    change(document)
    with pytest.raises(StateError) as refused:
        parsed(document)
    assert str(refused.value).startswith(f"{place} of sheet.json: expected {text}")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "content of sheet.json: expected strict JSON in UTF-8"),
        (b"{", "content of sheet.json: expected strict JSON in UTF-8"),
        (b"\xff{}", "content of sheet.json: expected strict JSON in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "content of sheet.json: expected strict JSON in UTF-8"),
        (b'{"a": 1, "a": 1}', "expected each key once, got 'a' twice"),
        (b"[" * 100_000, f"expected at most {MAX_DEPTH} brackets in brackets, got more"),
        (b'{"a":' * 100_000, f"expected at most {MAX_DEPTH} brackets in brackets, got more"),
        (b'"' + b'\\"' * 100_000, "content of sheet.json: expected strict JSON in UTF-8"),
        (b" " * (MAX_BYTES + 1), f"expected at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
        (b"1" * 100_000, "content of sheet.json: expected a finite number of 64 bits"),
        (b"[]", "content of sheet.json: expected an object, got []"),
    ],
)
def test_what_is_no_such_json_is_refused(content: bytes, text: str) -> None:
    with pytest.raises(StateError) as refused:
        parsed(content)
    assert text in str(refused.value)


def test_brackets_within_text_have_no_depth() -> None:
    deep = "[" * MAX_DEPTH + '"' + r"[{\"[" * 100 + '"' + "]" * MAX_DEPTH
    assert parsed(deep.encode(), list[Any])


def test_files_of_others_may_hold_more_and_less() -> None:
    document = {"rows": [{"name": "a", "plain_ms": 1, "comment": {}}], "size": [1, 2, True], "method": "rigl"}
    sheet = parsed(document, foreign=True)
    assert sheet == Sheet(rows=[Row("a", 1.0)], size=(1, 2.0, True), method="rigl")
    with pytest.raises(StateError, match=r"rows\[0\].plain_ms of sheet.json: expected a number or null, got nothing"):
        parsed({**document, "rows": [{"name": "a"}]}, foreign=True)


def test_an_editors_byte_order_mark_does_no_harm() -> None:
    assert parsed(json.dumps(asdict(SHEET)).encode("utf-8-sig")) == SHEET


def no_file(folder: Path) -> Path:
    return folder / "none.json"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def a_large_file(folder: Path) -> Path:
    with open(folder / "large", "wb") as file:
        file.truncate(2**40)
    return folder / "large"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (no_file, "No such file"),
        (lambda folder: folder, "Is a directory"),
        (a_pipe, "a pipe or a device"),
        (lambda _: Path("/dev/zero"), "a pipe or a device"),
        (a_large_file, f"{2**40} bytes, of {MAX_BYTES} at most"),
        (lambda folder: folder / "a\0b", "No file can have this name"),
        (lambda folder: folder / ("a" * 300), "File name too long"),
    ],
)
def test_only_files_are_read_and_only_so_far(make: Callable[[Path], Path], text: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(DataError) as refused:
        read_json(path, Sheet, remedy="Write it anew.", error=DataError)
    assert text in str(refused.value)
    assert str(refused.value).endswith("Write it anew.")


texts = st.text(max_size=3)
leaves = st.sampled_from(
    [(int, st.integers(-(2**64), 2**64)), (str, texts), (bool, st.booleans()), (NoneType, st.none())]
)
finite = (float, st.floats(allow_nan=False, allow_infinity=False))
names = st.lists(st.from_regex(r"[a-z]{1,3}_", fullmatch=True), min_size=1, max_size=3, unique=True)
Typed = tuple[Any, st.SearchStrategy[Any]]


def _containers(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    def record(parts: list[Typed], names: list[str]) -> Typed:
        table = dict(zip(names, parts, strict=False))
        kind: Any = make_dataclass("Record", [(name, of[0]) for name, of in table.items()], frozen=True)
        return kind, st.builds(kind, **{name: of[1] for name, of in table.items()})

    return st.one_of(
        inner.map(lambda of: (list[of[0]], st.lists(of[1], max_size=2))),
        inner.map(lambda of: (tuple[of[0], ...], st.lists(of[1], max_size=2).map(tuple))),
        inner.map(lambda of: (dict[str, of[0]], st.dictionaries(texts, of[1], max_size=2))),
        inner.map(lambda of: (of[0] | None, of[1] | st.none())),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda of: (tuple[tuple(kind for kind, _ in of)], st.tuples(*(values for _, values in of)))
        ),
        st.builds(record, st.lists(inner, min_size=3, max_size=3), names),
    )


kinds: st.SearchStrategy[Typed] = st.recursive(leaves | st.just(finite), _containers, max_leaves=5)


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json.dumps(asdict(make_dataclass("Held", ["value"])(value))))["value"]


@examples(40, 150)
@given(st.data())
def test_any_value_of_any_type_comes_back(data: st.DataObject) -> None:
    kind, values = data.draw(kinds)
    value = data.draw(values)
    back = parsed(plain(value), kind)
    assert back == value
    assert repr(back) == repr(value)  # where 1 == 1.0 == True are told apart


def mutated(document: Any, data: st.DataObject) -> Any:
    """A document of which one place, key or order is another."""
    inside = (
        list(document)
        if isinstance(document, dict)
        else list(range(len(document)))
        if isinstance(document, list)
        else []
    )
    if inside and data.draw(st.booleans()):
        document, key = deepcopy(document), data.draw(st.sampled_from(inside))
        document[key] = mutated(document[key], data)
        return document
    change = data.draw(st.sampled_from(["another", "less", "more", "wrapped"]))
    if change == "less" and inside:
        return {k: v for k, v in document.items() if k != inside[0]} if isinstance(document, dict) else document[1:]
    if change == "more" and isinstance(document, dict):
        return {**document, "another": None}
    if change == "more" and isinstance(document, list):
        return [*document, None]
    other = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just([]) | st.just({})
    return [document] if change == "wrapped" else data.draw(other)


@examples(60, 300)
@given(st.data())
def test_every_other_document_is_another_value_of_the_type_or_refused(data: st.DataObject) -> None:
    kind, values = data.draw(kinds)
    document = mutated(plain(data.draw(values)), data)
    try:
        back = parsed(document, kind)
    except StateError:
        return
    assert plain(back) == document  # nothing of it was passed over, nothing was made up


@dataclass(frozen=True)
class Aged:
    size: int
    since: str | None = field(default=None, metadata={OPTIONAL: True})


def read_aged(content):
    return parse_json(json.dumps(content).encode(), Aged, where="a file", remedy="Write it anew.")


def test_what_came_later_may_be_lacking():
    assert read_aged({"size": 3}) == Aged(3)
    assert read_aged({"size": 3, "since": "v2"}) == Aged(3, "v2")
    with pytest.raises(StateError, match="size of a file: expected a whole number, got nothing"):
        read_aged({"since": "v2"})


@given(st.integers(), st.text())
def test_a_sealed_document_is_read_as_it_was(size, since):
    size %= 2**53
    assert read_aged(sealed({"size": size, "since": since})) == Aged(size, since)


@pytest.mark.parametrize("change", [{"size": 4}, {"since": "v3"}, {"crc32": "00000000"}])
def test_a_sealed_document_that_was_changed_is_refused(change):
    with pytest.raises(StateError, match=r"^crc32 of a file: .* it was changed since it was written"):
        read_aged({**sealed({"size": 3, "since": "v2"}), **change})


def test_the_laws_come_before_the_seal():
    with pytest.raises(StateError, match=r"^size of a file: expected a whole number, got 'x'"):
        read_aged({**sealed({"size": 3, "since": "v2"}), "size": "x"})
