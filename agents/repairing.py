"""The policies of ``repair`` that look ahead: ONP out of a file, or fine-tuned; and ridge."""

from typing import Any

from backdoor_gym.baselines.ridge import Ridge

from .finetuning import learn_alone
from .look_ahead import LookAhead
from .onp import ONP, PRETRAINED
from .scoring import ScoringPolicy


def onp(env: Any, file: str | None = None, look_ahead: bool = True, finetune: int = 0, seed: int = 0) -> ONP:
    """ONP as it ships, or out of a file, after so many steps of fine-tuning on the network of ``env``."""
    policy = ONP.load(file or PRETRAINED, env, seed=seed)
    if finetune:
        learn_alone(policy, env, finetune)
    if not look_ahead:
        policy.look_ahead = None
    return policy


def ridge(env: Any, look_ahead: bool = True) -> ScoringPolicy:
    """The ridge regression that ships, with the look-ahead that ships."""
    return ScoringPolicy(Ridge.load(), env, look_ahead=LookAhead() if look_ahead else None)
