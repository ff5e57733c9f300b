"""What an error says can be printed, whatever was given."""

import pickle
from unicodedata import category

from hypothesis import example, given
from hypothesis import strategies as st

from dstlib.errors import SettingError, printable, shown

texts = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["\x1b]0;owned\x07", "a\r\nb", "\u202etxt", "\x9b2J", "\x00"]
)


@given(what=texts, where=texts, value=texts)
@example(what="liver\x1b[2J", where="\udcff", value="\nStateError: all is well")
def test_what_was_given_is_shown_on_one_line(what, where, value):
    error = SettingError.of(what, where, allowed="text", given=value, remedy="Do so:\n  this\n  that")
    first, *others = str(error).split("\n")
    assert first.isprintable()
    assert others == ["  this", "  that"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    str(error).encode()  # halves of characters are escaped too


@given(texts)
def test_what_can_be_printed_stays_as_it_is(text):
    obeyed = [c for c in text if category(c)[0] in "CZ" and c not in " \n"]
    assert (printable(text) == text) == (not obeyed)
    assert printable(printable(text)) == printable(text)


@given(st.recursive(texts | st.integers() | st.floats(), lambda x: st.lists(x) | st.dictionaries(texts, x)))
@example("a" * 10**6)
@example(["a" * 10**6] * 10**4)
@example(10**4000)
def test_values_are_shown_in_short(value):
    assert shown(value).isprintable()
    assert len(shown(value)) < 5000


def test_errors_that_are_raised_by_hand_are_escaped_too():
    assert str(SettingError("axes of \x1b[2J")) == r"axes of \x1b[2J"
