from pathlib import Path

import numpy as np
import pytest

from backdoor_gym.arguments import check_kind, check_options, check_path, check_real, check_whole, is_finite
from backdoor_gym.errors import DataError


@pytest.mark.parametrize("value", [None, "3", 2.5, 3.0, True, -1, 11, [3], float("nan"), np.float32(3), np.array([3])])
def test_whole_numbers(value):
    check_whole("count", 3, 0, 10)
    check_whole("count", np.int64(10), 0, 10)
    check_whole("count", None, may_be_none=True)
    with pytest.raises(DataError, match="count must be a whole number of at least 0 and at most 10, not "):
        check_whole("count", value, 0, 10)


@pytest.mark.parametrize("value", [None, "0.5", True, -0.1, 1.1, float("nan"), float("inf"), 10**400, [0.5], 1j])
def test_real_numbers(value):
    check_real("share", 0.5, 0, 1)
    check_real("share", np.float32(1), 0, 1)
    check_real("share", None, may_be_none=True)
    assert is_finite(10**300)
    with pytest.raises(DataError, match="share must be a number from 0 to 1, not "):
        check_real("share", value, 0, 1)


def test_kinds_paths_and_options():
    check_path("out", Path("a"))
    check_options("options", {"width": 8})
    check_options("options", None)
    with pytest.raises(DataError, match="out must be a text or a Path, not 5"):
        check_path("out", 5)
    with pytest.raises(DataError, match="options must be a dict or None"):
        check_options("options", [("width", 8)])
    with pytest.raises(DataError, match="a name in options must be a text, not 5"):
        check_options("options", {5: 8})
    with pytest.raises(DataError, match="name must be a text or None, not 5"):
        check_kind("name", 5, str, "a text", may_be_none=True)
