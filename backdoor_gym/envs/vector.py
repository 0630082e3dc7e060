"""Many ``BackdoorPrune-v0`` environments stepped at once."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import iterate

from ..arguments import check_whole
from ..errors import DataError, check_name
from ..wording import shown
from .prefetch import Prefetch, core_threads, maker, side_by_side
from .prune import BackdoorPruneEnv

#: Sub-environments of one vector.
MOST_ENVS = 1 << 16


class BackdoorPruneVectorEnv(SyncVectorEnv):
    """``BackdoorPrune-v0``, several at once: what ``gym.make_vec("BackdoorPrune-v0", num_envs)`` makes.

    Spaces, seeds, infos, autoreset modes and reset masks are those of ``gymnasium.vector.SyncVectorEnv``, and so is
    everything that is returned, to the last bit. The difference is in the work. Networks as small as these leave cores idle
    when each operation is divided among them, and while Python runs; here each sub-environment steps on one core, as many
    at once as torch has threads (``torch.set_num_threads``, when this is made). While one of them holds a large network
    (``prefetch.SIDE_BY_SIDE_BYTES``) they step one after the other, each on all cores. What was made ready of a network, and its
    activations while nothing is pruned, are there once for all sub-environments.

    Args:
        num_envs: sub-environments.
        autoreset_mode: "NextStep" (the default), "SameStep" or "Disabled".
        copy: whether what is returned stays as it is during the next step; False saves a copy of all observations.
        **options: of ``BackdoorPruneEnv``, the same for all.

    Raises:
        DataError: fewer than one sub-environment, ``render_mode="human"`` (a window belongs to one thread), or an unusable
            option.

    Examples:
        >>> import gymnasium as gym
        >>> env = gym.make_vec("backdoor_gym:BackdoorPrune-v0", num_envs=2)
        >>> observations, infos = env.reset(seed=0)
        >>> observations["nodes"].shape, env.step([5, 600])[2].tolist()
        ((2, 600, 17), [False, True])
    """

    _pool: ThreadPoolExecutor | None = None

    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        copy: bool = True,
        **options: Any,
    ) -> None:
        check_whole("num_envs", num_envs, 1, MOST_ENVS)
        if not isinstance(autoreset_mode, AutoresetMode):
            check_name("autoreset mode", autoreset_mode, [mode.value for mode in AutoresetMode])
        if options.get("render_mode") == "human":
            raise DataError('several environments cannot draw in one window; use render_mode="rgb_array"')
        threads = core_threads()
        first = BackdoorPruneEnv(**options)
        options["max_units"] = first.stop_action  # the others need not find it out
        envs = [first, *(BackdoorPruneEnv(**options) for _ in range(1, num_envs))]
        for env in envs:
            env.generator = first.generator  # a model that is given as an object is made ready once
        self._pool, self._prefetched = threads, [Prefetch(env, threads) for env in envs]
        super().__init__([maker(env) for env in self._prefetched], copy=copy, autoreset_mode=autoreset_mode)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in each, or in those that ``options={"reset_mask": ...}`` says.

        Raises:
            DataError: seeds, or a mask, of a wrong type or number; no episode has begun or ended then.
        """
        self._check_seed(seed)
        if options is not None and not isinstance(options, Mapping):
            raise DataError(f"the options of a reset must be a dict, not {shown(options)}")
        if options is not None and "reset_mask" in options:
            mask = options["reset_mask"]
            if (
                not isinstance(mask, np.ndarray)
                or mask.dtype != bool
                or mask.shape != (self.num_envs,)
                or not mask.any()
            ):
                raise DataError(
                    f"reset_mask must be a bool array ({self.num_envs},) with at least one that is True, not {shown(mask)}"
                )
        return super().reset(seed=seed, options=None if options is None else dict(options))

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of each; of one that has ended, what the autoreset mode says.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun in one of them, or it is over and nothing resets it.
            gymnasium.error.InvalidAction: another number of actions, or one that is none; no environment has stepped then.
        """
        self._check_actions(actions)
        mode = self.autoreset_mode
        begun = zip(self._prefetched, iterate(self.action_space, actions), self._autoreset_envs, strict=True)
        for env, action, ended in begun if side_by_side(self._prefetched) else ():
            if not ended or mode is AutoresetMode.SAME_STEP:
                env.begin_step(action, reset_after=mode is AutoresetMode.SAME_STEP)
            elif mode is AutoresetMode.NEXT_STEP:
                env.begin_reset()
        try:
            return super().step(actions)
        finally:
            for env in self._prefetched:
                env.abandon()

    def _check_seed(self, seed: Any) -> None:
        seeds = seed if isinstance(seed, list | tuple | np.ndarray) else [seed]
        if seeds is seed and len(seeds) != self.num_envs:
            raise DataError(f"there must be {self.num_envs} seeds, not {len(seeds)}")
        for number in seeds:
            check_whole("seed", number, may_be_none=True)

    def _check_actions(self, actions: Any) -> None:
        """Before the first of them steps: one that it refused later would leave the others a step ahead."""
        resets = self.autoreset_mode is AutoresetMode.NEXT_STEP
        try:
            given = list(iterate(self.action_space, actions))
        except (TypeError, ValueError, IndexError, KeyError):
            given = []
        if len(given) != self.num_envs:
            raise gym.error.InvalidAction(f"there must be {self.num_envs} actions, not {shown(actions)}")
        for env, action, ended in zip(self._prefetched, given, self._autoreset_envs, strict=True):
            if not (ended and resets):
                env.unwrapped.check_step(action)  # type: ignore[attr-defined]

    def close_extras(self, **kwargs: Any) -> None:
        """Close the sub-environments and end the threads."""
        super().close_extras(**kwargs)
        if self._pool is not None:  # None where an option was refused
            self._pool.shutdown()
