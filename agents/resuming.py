"""Where a training is, so that one that goes on from its checkpoint comes to what it would have come to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoor_gym.errors import BackdoorGymError, ModelFileError


def progress_of(ppo: Any, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Random numbers, episodes and callbacks of a training between two rollouts, JSON-able.

    Of an episode it is how it began and what was done in it, where the vector environment has ``episodes`` and ``play``: others
    begin new episodes when the training goes on. Callbacks with ``progress`` and ``go_on`` are asked.
    """
    episodes = ppo.env.episodes() if hasattr(ppo.env, "episodes") and ppo._last_obs is not None else [None]
    drawn = np.random.get_state(legacy=False)
    assert isinstance(drawn, dict)
    drawn["state"] = {"key": drawn["state"]["key"].tolist(), "pos": int(drawn["state"]["pos"])}
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": drawn,
        "episodes": None if None in episodes else episodes,
        "callbacks": {type(one).__name__: one.progress() for one in callbacks if hasattr(one, "progress")},
    }


def go_on(ppo: Any, callbacks: Sequence[Any], progress: Any, path: Path) -> None:
    """Put a training where it was.

    Raises:
        ModelFileError: the checkpoint ``path`` does not tell, or tells of another training.
    """
    try:
        for one in callbacks:
            if type(one).__name__ in progress["callbacks"]:
                one.init_callback(ppo)
                one.go_on(progress["callbacks"][type(one).__name__])
        if progress["episodes"] is not None:
            episodes = dict(enumerate(progress["episodes"]))
            ppo._last_obs = ppo.env.play(episodes)
            ppo._last_episode_starts = ppo.env.first_steps()
        np.random.set_state(progress["numpy"])
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(progress["torch"]), dtype=torch.uint8))
    except BackdoorGymError:
        raise
    except Exception as error:  # whatever a file says, reading it must end in one clear line
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelFileError(
            f"{path} is the checkpoint of another training ({reason}); remove it, or name another"
        ) from error
