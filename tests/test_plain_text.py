from pathlib import Path

import pytest

from backdoor_gym.errors import BackdoorGymError, UnknownNameError
from backdoor_gym.plain_text import one_line, path_component, printable


def test_control_characters_and_lone_surrogates_are_shown_as_such():
    assert printable("a\x1b[31m\x07\x00\ud800\u202eb\nc") == "a�[31m����b\nc"


def test_one_line_is_one_line_of_bounded_length():
    assert one_line("a\nb\tc") == "a b c"
    assert one_line("x" * 5_000_000, 10) == "xxxxxxxxx…"


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("digits-badnets", "digits-badnets"),
        ("digits-test/3", "digits-test-3"),
        ("..", "unnamed"),
        (".", "unnamed"),
        ("", "unnamed"),
        ("../../etc/passwd", "etc-passwd"),
        (".hidden", "hidden"),
        ("C:\\a\\b", "C--a-b"),
        ("a\0b\nc", "a-b-c"),
        ("-rf", "rf"),
        ("Müller 日本", "Müller 日本"),
    ],
)
def test_a_name_becomes_one_component_of_a_path(name, component):
    assert path_component(name) == component
    folder = Path("/out")
    assert (folder / path_component(name)).resolve().parent == folder


def test_a_long_name_becomes_a_short_component():
    assert len(path_component("a/" * 100_000)) <= 100


def test_messages_are_one_printable_line_whatever_is_in_them():
    for error in (BackdoorGymError("a\x1b\n" * 10_000), UnknownNameError("model", "b\x1b\n" * 10_000, ["b"])):
        assert str(error).isprintable()
        assert len(str(error)) <= 2000


def test_names_of_any_type_are_unknown():
    for name in (None, 5, ["a"], {"a": 1}):
        assert "unknown attack" in str(UnknownNameError("attack", name, ["a"]))
