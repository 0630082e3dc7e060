import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from backdoor_gym import BackdoorGymError, DataError, UnknownNameError
from backdoor_gym.errors import check_name
from backdoor_gym.wording import MOST_SAID, first_line, one_line, path_component, shown


class Mute:
    def __repr__(self):
        raise RuntimeError("says nothing")


@pytest.mark.parametrize(
    "value",
    [
        "a" * 10**7,
        "\x1b[31m\r\n\u202e",
        10**5000,
        list(range(10**6)),
        {number: number for number in range(10**6)},
        np.broadcast_to(np.zeros(1), (10**12,)),
        torch.zeros(1).expand(10**12),
        torch.zeros(10**6),
        Mute(),
        b"\x00" * 10**7,
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_shown_in_a_line(value):
    start = time.monotonic()
    said = shown(value)
    assert time.monotonic() - start < 1
    assert len(said) < 500
    assert said.isprintable()


def test_messages_are_one_line_of_what_can_be_shown():
    error = DataError("from a file: \x1b[2J\x07 and\nmore \u202e" + "x" * 10**6)
    assert str(error).isprintable()
    assert len(str(error)) < 2 * MOST_SAID
    assert str(error).startswith("from a file: \ufffd[2J\ufffd and more \ufffdxxx")
    assert one_line("as it was") == "as it was"
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(KeyError("x" * 10**6))) < 500


@pytest.mark.parametrize("name", [None, 5, ["badnets"], {}, "badnet", "x" * 5000, 2.5, b"badnets"])
def test_names_of_any_type_are_unknown(name):
    with pytest.raises(UnknownNameError, match="unknown attack") as told:
        check_name("attack", name, ("badnets", "blended"), "or none")
    said = str(told.value)
    assert len(said) < 400
    assert ("did you mean 'badnets'" in said) == (name == "badnet")
    assert ("a name is a text" in said) == (not isinstance(name, str))


def test_the_nearest_of_a_million_names_is_found_soon():
    start = time.monotonic()
    error = UnknownNameError("column", "labels", (f"column {number}" for number in range(10**6)))
    assert time.monotonic() - start < 10
    assert len(str(error)) < 500


def test_errors_come_back_from_other_processes():
    error = UnknownNameError("attack", "x", ("badnets",))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UnknownNameError
    assert str(again) == str(error)
    assert isinstance(again, BackdoorGymError)


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
