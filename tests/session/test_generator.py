import shutil
from importlib import resources

import pytest

from backdoor_gym.errors import DataError
from backdoor_gym.session.generator import InfectedGenerator
from backdoor_gym.session.prepared_model import Preparation


def test_environments_share_what_takes_long():
    one, other = (InfectedGenerator("digits-badnets", Preparation()) for _ in range(2))
    assert one.get("digits-badnets") is other.get("digits-badnets")


def test_other_options_are_another_victim():
    one = InfectedGenerator("digits-badnets", Preparation()).get("digits-badnets")
    assert InfectedGenerator("digits-badnets", Preparation(clean_samples=50)).get("digits-badnets") is not one


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    embedded = resources.files("backdoor_gym") / "embedded"
    file = tmp_path / "model.safetensors"
    names = []
    for name in ("digits-badnets", "digits-clean"):
        shutil.copyfile(str(embedded / f"{name}.safetensors"), file)
        names.append(InfectedGenerator(str(file), Preparation()).get(str(file)).model.facts["attack"])
    assert names == ["badnets", "clean"]


def test_models_given_as_objects_are_not_shared(infected):
    one, other = (InfectedGenerator(infected, Preparation()).get(infected) for _ in range(2))
    assert one is not other
    assert one.model is other.model


def test_what_was_used_longest_ago_is_forgotten(infected, plain_infected, monkeypatch):
    monkeypatch.setattr("backdoor_gym.session.generator.READY", 1)
    generator = InfectedGenerator([infected, plain_infected], Preparation())
    first = generator.get(infected)
    assert generator.get(infected) is first
    generator.get(plain_infected)
    assert generator.get(infected) is not first


def test_nothing_to_draw_from():
    with pytest.raises(DataError, match="no infected model"):
        InfectedGenerator([], Preparation())
