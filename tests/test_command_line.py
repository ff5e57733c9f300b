"""Command lines parse, refuse and stop alike."""

import pytest

from dstlib.command_line import make_parser, run_command
from dstlib.errors import SettingError


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_a_script_returns_is_the_exit_code(returned, code, capsys):
    assert run_command(lambda: returned) == code
    assert capsys.readouterr().err == ""


def test_an_error_of_the_user_is_one_line(capsys):
    assert run_command(raising(SettingError("seed of it: expected 0, got 1."))) == 2
    assert capsys.readouterr().err == "error: seed of it: expected 0, got 1.\n"


def test_a_bug_is_no_error_of_the_user():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_an_interruption_says_what_it_brings_or_what_the_script_says(capsys):
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert run_command(raising(KeyboardInterrupt()), interrupted="Nothing was written.") == 130
    assert run_command(raising(KeyboardInterrupt("Saved.")), interrupted="Nothing was written.") == 130
    assert capsys.readouterr().err == "\nInterrupted.\n\nNothing was written.\n\nSaved.\n"


def test_options_are_known_by_their_whole_names_and_descriptions_keep_their_lines(capsys):
    parser = make_parser("First.\n\n    an example\n", prog="it", epilog="Last.")
    parser.add_argument("--steps", type=int)
    assert parser.parse_args(["--steps", "3"]).steps == 3
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--ste", "3"])
    help_text = parser.format_help()
    assert "First.\n\n    an example\n" in help_text
    assert help_text.startswith("usage: it")
    assert help_text.endswith("Last.\n")
