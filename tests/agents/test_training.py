from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback

from backdoor_gym import repair
from backdoor_gym.agents import ONP, LookAhead
from backdoor_gym.agents.school import BUDGETS, MAX_STEPS, school
from backdoor_gym.agents.training import THRESHOLD, checkpoint_of, train
from backdoor_gym.agents.validation import Validation, run, summary
from backdoor_gym.agents.warm_start import examples
from backdoor_gym.baselines import CLP
from backdoor_gym.errors import DataError, ModelFileError
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.metrics import evaluate
from backdoor_gym.session.masked_model import SCORE_SAMPLES

QUICK = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}


@pytest.fixture
def files(infected, plain_infected, tmp_path):
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for model, path in zip((infected, infected), paths, strict=True):
        model.save(path)
    return [str(path) for path in paths]


def test_a_school_divides_the_models_and_varies_the_budget(files):
    vector = school([*files, *files], envs=4, seed=0)
    shares = vector.get_attr("generator")
    assert [len(share) for share in shares] == [1, 1, 1, 1]
    assert vector.get_attr("accuracy_budget") == [*BUDGETS, BUDGETS[0]]
    assert set(vector.get_attr("max_steps")) == {MAX_STEPS}
    vector.close()


def test_too_few_models_for_a_school_are_named(files):
    with pytest.raises(DataError, match="lower envs"):
        school(files, envs=3)


@pytest.mark.slow
def test_outcomes_are_those_of_the_episodes(infected):
    env = gym.make("BackdoorPrune-v0", infected=[infected, "digits-clean"], accuracy_budget=None, max_steps=30)
    outcomes = run(CLP(env, 1.5), env, [infected, "digits-clean"])
    result, tested = repair(infected, "clp", u=1.5, max_steps=30), infected.test.first(2 * SCORE_SAMPLES)
    assert outcomes[0].pruned == len(result.pruned)
    assert outcomes[0].acc == evaluate(result.network, tested.images, tested.labels).acc
    assert (outcomes[1].asr, outcomes[1].der) == (None, None)
    figures = summary(outcomes)
    assert figures["der"] == outcomes[0].der
    assert figures["untouched"] == float(outcomes[1].pruned == 0)
    assert figures["acc_drop"] == pytest.approx(np.mean([outcome.acc_drop for outcome in outcomes]))


@pytest.mark.slow
def test_validation_keeps_the_best_policy(files, tmp_path):
    vector = school(files, envs=2, seed=0, reward="oracle", max_steps=6)
    onp = ONP(vector, seed=0, **QUICK)
    seen = []
    best = Validation(onp, files[:1], tmp_path / "best.safetensors", every=1, report=seen.append, max_steps=6)
    onp.learn(96, callback=best)
    assert len(seen) == 4  # before, and after each of three rollouts
    kept = ONP.load(tmp_path / "best.safetensors")
    assert kept.facts["validation"]["return"] == max(figures["return"] for figures in seen)
    assert onp.env is vector


@pytest.mark.slow
def test_examples_that_are_made_already_are_not_made_again(files, tmp_path, monkeypatch):
    guide = examples(files, max_steps=6)
    monkeypatch.setattr("backdoor_gym.agents.training.examples", None)
    said = []
    train(
        files,
        files[:1],
        32,
        tmp_path / "policy.safetensors",
        envs=2,
        guide=guide,
        look_ahead=None,
        report=said.append,
        **QUICK,
    )
    assert any("warm start" in line for line in said)
    learned = ONP.load(tmp_path / "policy.safetensors")
    assert learned.threshold == THRESHOLD
    facts = learned.facts
    assert (facts["learned_on"], facts["chosen_on"]) == (files, files[:1])
    assert facts["timesteps"] == facts["validation"]["timesteps"]


class KilledError(Exception):
    pass


class Kill(BaseCallback):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def _on_step(self):
        if self.num_timesteps >= self.at:
            raise KilledError
        return True


def killed(monkeypatch, at, *arguments, **options):
    """A training that ends in the middle of a rollout."""
    learn = ONP.learn
    with monkeypatch.context() as patch:
        patch.setattr(
            ONP,
            "learn",
            lambda self, *given, callback, **more: learn(self, *given, callback=[callback, Kill(at)], **more),
        )
        with pytest.raises(KilledError):
            train(*arguments, **options)


@pytest.mark.slow
def test_a_killed_training_goes_on(files, tmp_path, monkeypatch):
    out = tmp_path / "policies" / "mine.safetensors"
    out.parent.mkdir()
    out.write_text("an older one")
    options = {"envs": 2, "epochs": 1, "look_ahead": LookAhead(2, 1.0), **QUICK}
    killed(monkeypatch, 80, files, files[:1], 128, out, **options)
    assert checkpoint_of(out).is_file()
    assert out.read_text() == "an older one"
    said = []
    onp = train(files, files[:1], 128, out, report=said.append, **options)
    assert not any("warm start" in line for line in said)
    assert onp.look_ahead == ONP.load(out).look_ahead == LookAhead(2, 1.0)
    assert onp.facts["models"] == 2
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert ONP.load(out).facts["learned_on"] == files


@pytest.mark.slow
def test_a_training_that_was_killed_comes_to_the_same(files, tmp_path, monkeypatch):
    monkeypatch.setattr("backdoor_gym.agents.training.VALIDATE_EVERY", 2)
    for place in ("training.MAX_STEPS", "school.MAX_STEPS"):
        monkeypatch.setattr(f"backdoor_gym.agents.{place}", 6)
    (tmp_path / "c.safetensors").write_bytes(Path(files[0]).read_bytes())
    names = [files[0], "digits-clean", str(tmp_path / "c.safetensors")]
    options = {**QUICK, "envs": 2, "epochs": 1, "guide": examples(names, max_steps=2)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(names, names[:1], 128, whole, **options)
    for at in (40, 70, 110):
        killed(monkeypatch, at, names, names[:1], 128, parts, **options)
    train(names, names[:1], 128, parts, **options)
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_tells_of_another_training_is_refused(files, tmp_path):
    vector = school(files, envs=2, seed=0, max_steps=6)
    checkpoint = tmp_path / "c"
    ONP(vector, seed=0, **QUICK).learn(32, checkpoint=checkpoint)
    tensors, metadata = read_tensors(checkpoint)
    good = metadata["progress"]
    first = good["episodes"][0]
    for bad in (
        None,
        {},
        {**good, "torch": "zz"},
        {**good, "torch": "00"},
        {**good, "numpy": {}},
        {**good, "episodes": [{}, {}]},
        {**good, "episodes": [{**first, "actions": [10**6]}]},
        {**good, "episodes": [first] * 3},
        {**good, "callbacks": None},
    ):
        write_tensors(checkpoint, tensors, {**metadata, "progress": bad})
        with pytest.raises(ModelFileError, match=r"checkpoint of another training|not what such a file must be"):
            ONP(vector, seed=0, **QUICK).learn(64, checkpoint=checkpoint)
    vector.close()
