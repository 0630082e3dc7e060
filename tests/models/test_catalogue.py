import shutil

import pytest

from backdoor_gym import list_infected, load_infected
from backdoor_gym.errors import ModelFileError, UnknownNameError
from backdoor_gym.models.catalogue import resolve


def test_patterns_stand_for_the_first_thousand_seeds():
    assert list_infected("digits-train/*") == [f"digits-train/{seed}" for seed in range(1000)]
    assert len(list_infected("digits-test/1?")) == 10
    assert "digits-badnets" in list_infected()
    assert list_infected("nothing*") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_infected() if "/" not in name])
def test_embedded_models_are_as_they_say(name):
    model = load_infected(name)
    measured = model.evaluate()
    assert model.name == name
    assert measured.acc == pytest.approx(model.facts["acc"], abs=0.005)
    assert measured.acc >= 0.95
    if model.trigger is not None:
        assert measured.asr == pytest.approx(model.facts["asr"], abs=0.005)
        assert measured.asr >= 0.9
    assert not set(model.clean.source.indices) & set(model.test.source.indices)


def test_names_are_resolved(infected_file):
    assert resolve(str(infected_file)) == [str(infected_file)]
    assert resolve("digits-test/4000") == ["digits-test/4000"]
    with pytest.raises(UnknownNameError, match="did you mean"):
        resolve("digits-badnet")
    with pytest.raises(UnknownNameError, match="pattern"):
        resolve("digit-*")
    for absent in ("absent.safetensors", "./absent", "~/absent"):
        with pytest.raises(ModelFileError, match="no file"):
            resolve(absent)


def test_a_pattern_stands_for_files_too(infected_file, tmp_path):
    for name in ("b-one", "a-one", "other"):
        shutil.copy(infected_file, tmp_path / f"{name}.safetensors")
    (tmp_path / "c-one.safetensors.lock").touch()
    assert resolve(f"{tmp_path}/*-one*") == [f"{tmp_path}/{name}-one.safetensors" for name in "ab"]
    with pytest.raises(UnknownNameError, match=r"or one of files that exist, \.safetensors"):
        resolve(f"{tmp_path}/*-two*")


def test_a_pattern_is_not_a_model():
    with pytest.raises(UnknownNameError, match="name one"):
        load_infected("digits-train/*")
