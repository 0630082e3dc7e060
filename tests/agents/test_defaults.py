"""What ships is what the defaults make: the command, the options of the network, and the look-ahead."""

import inspect

import pytest

from backdoor_gym.agents import ONP, EncoderOptions, LookAhead, training
from backdoor_gym.analysis.evidence import VERDICT_THRESHOLD
from backdoor_gym.cli import app


class CalledError(Exception):
    pass


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What ``backdoor-gym train`` without options asks of the trainer."""
    arguments = {}

    def train(infected, validation, total_timesteps, out, **options):
        arguments.update(options, infected=infected, validation=validation, total_timesteps=total_timesteps)
        raise CalledError

    monkeypatch.setattr(training, "train", train)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalledError):
        app(["train"], standalone_mode=False)
    return arguments


def test_train_without_options_trains_the_policy_that_comes_with_the_package(asked):
    shipped = ONP.load()
    facts = shipped.facts
    assert asked["infected"] == facts["learned_on"]
    assert len(asked["infected"]) == facts["models"]
    assert asked["validation"] == facts["chosen_on"]
    assert asked["total_timesteps"] == facts["timesteps"]
    assert asked["seed"] == facts["seed"]
    assert asked["encoder"] == EncoderOptions() == shipped.options
    assert "look_ahead" not in asked
    assert shipped.threshold == training.THRESHOLD
    assert shipped.verdict_threshold == VERDICT_THRESHOLD


def test_the_look_ahead_of_the_defaults_is_the_shipped_one():
    assert LookAhead() == ONP.load().look_ahead
    assert inspect.signature(training.train).parameters["look_ahead"].default == LookAhead()
