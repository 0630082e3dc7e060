import subprocess
import sys

import pytest

import backdoor_gym


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, backdoor_gym; print([name for name in ('torch', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("name", backdoor_gym.__all__)
def test_public_names_are_there(name):
    assert getattr(backdoor_gym, name) is not None
    assert name in dir(backdoor_gym)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        backdoor_gym.nothing_like_it  # noqa: B018
