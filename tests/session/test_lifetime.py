"""How long activations and models that were made ready stay in memory."""

import gc
import weakref

import numpy as np

from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.masking import plan
from backdoor_gym.session import RepairSession, masked_model
from backdoor_gym.session.masked_model import MaskedModel
from backdoor_gym.session.prepared_model import Preparation, PreparedModel


def activations(masked):
    """The values that are kept of the first of the clean images."""
    return masked._clean[0].network._parts[0]._base


def test_sessions_of_a_model_share_the_activations_of_the_whole_network_while_one_lives(infected):
    prepared = PreparedModel(infected, Preparation(clean_samples=20))
    first, second = (RepairSession(prepared, score_samples=0) for _ in range(2))
    assert activations(first.masked) is activations(second.masked)
    whole = weakref.ref(masked_model._WHOLE[prepared][0, False])
    assert first.try_prune(3).pruned
    assert activations(first.masked) is not activations(second.masked)
    first.restart()
    assert activations(first.masked) is activations(second.masked)
    first.close()
    gc.collect()
    assert whole() is not None
    second.close()
    gc.collect()
    assert whole() is None
    assert len(masked_model._WHOLE[prepared]) == 0


def test_other_images_are_other_activations(infected):
    prepared = PreparedModel(infected, Preparation(clean_samples=20))
    few, many = (MaskedModel.begin(prepared, count) for count in (0, 8))
    assert activations(few) is not activations(many)
    assert sorted(masked_model._WHOLE[prepared]) == [(0, False), (8, False)]


def test_a_model_that_is_given_as_an_object_goes_with_its_environment(infected):
    env = BackdoorPruneEnv(infected, clean_samples=20, score_samples=0)
    env.reset(seed=0)
    env.step(3)
    prepared, neurons = env.session.prepared, env.session.prepared.neurons
    assert prepared in masked_model._WHOLE
    assert neurons in plan._FOLDED
    gone = [weakref.ref(prepared), weakref.ref(neurons), weakref.ref(plan._FOLDED[neurons])]
    env.close()
    del env, prepared, neurons
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


def test_a_closed_session_keeps_what_its_state_tells(infected):
    prepared = PreparedModel(infected, Preparation(clean_samples=20))
    session = RepairSession(prepared, score_samples=0)
    session.try_prune(3)
    before = session.figures
    session.close()
    assert (session.is_open, session.pass_bytes, session.figures) == (False, 0, before)
    session.reopen()
    assert session.masked.figures(session.state.pruned) == before
    assert np.flatnonzero(session.state.pruned).tolist() == [3]
