"""BackdoorPrune-v0: prune the backdoor out of an infected network, one neuron a step."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle

from ..analysis.trigger_inversion import InvertedTrigger
from ..arguments import check_callable
from ..rendering.drawing import Snapshot
from ..rendering.viewer import Viewer
from ..session import RepairSession
from ..session.generator import Infected, InfectedGenerator
from ..session.masked_model import SCORE_SAMPLES
from ..session.prepared_model import Preparation, PreparedModel
from ..session.session import COUNT, Transition
from ..wording import shown
from .observation import ObservationBuilder
from .options import RENDER_MODES, check_arguments, infected_option
from .reward import Reward, make_reward

DEFAULT_INFECTED = "digits-badnets"
_RESET = "call reset() before anything else"
_OVER = "the episode is over: call reset() before another step"
#: By which keys ``gave`` knows an observation.
OBSERVED = ("num_nodes", "nodes", "globals")
#: What a copy makes anew, or takes from the models that are ready, instead of carrying it.
_MADE_ANEW = ("generator", "_observer", "observation_space", "_reward", "_viewer", "_session")


class BackdoorPruneEnv(gym.Env[dict[str, np.ndarray], np.int64], EzPickle):
    """Prune the backdoor out of an infected network, one neuron a step, without losing clean accuracy.

    ## Description

    A defender holds a network that answers an attacker's label whenever an image bears a trigger. The defender has a few clean
    images and neither the trigger nor the label. Each step prunes one neuron of the network (see ``backdoor_gym.neurons.finding``
    for what a neuron is) or ends the repair. After CLP (Zheng et al., ECCV 2022) and ONP (2024).

    ## Action space

    ``Discrete(N + 1)``: prune neuron i in network order, or stop (the last action). N is the number of neurons of the network, or
    of the largest one where several may be met. An action that is not legal (a neuron already pruned, tried and undone, or
    padding) changes nothing, costs the step penalty and counts as a step. ``env.unwrapped.action_masks()`` gives the legal
    actions, bool (N + 1,).

    ## Observation space

    A ``Dict`` of arrays of fixed shape; rows from ``num_nodes`` or ``num_edges`` on are padding (zeros).

    | key | dtype | shape | meaning |
    |---|---|---|---|
    | ``nodes`` | float32 | (N, 17) | features of each neuron, ``observation.NODE_FEATURES``; the static ones are defined in ``backdoor_gym.analysis.features`` |
    | ``edges`` | float32 | (E, 2) | strength in [0, 1]; 1 for a similarity link, 0 for a connection |
    | ``edge_links`` | int64 | (E, 2) | from which neuron to which |
    | ``num_nodes``, ``num_edges`` | int64 | (1,) | how many of them are real |
    | ``action_mask`` | int8 | (N + 1,) | 1 where the action is legal; stop always is |
    | ``globals`` | float32 | (13,) | accuracy, its drop, rise of the clean loss, accuracy budget (1 if none), shares of neurons pruned, steps left, failures left; suspected danger and its fall; 2 + log10 of the shift of BN means towards the suspected target (``backdoor_gym.analysis.suspected_target``); error and evidence of the inverted trigger (``backdoor_gym.analysis.trigger_inversion``); verdict, the probability of a backdoor before the first prune (``backdoor_gym.analysis.evidence``); clamped to +-6 |

    The trigger never reaches the observation. The dynamic node features are: pruned, tried (pruned and undone), share of the layer
    that is pruned, ``pull_now``, ``harm_now`` and ``clean_pull_now`` (what pruning the neuron would take from the suspected
    target's margin under the inverted trigger, add to the clean loss, and take from that margin on the clean images as they are,
    to first order, each in standard deviations over the network; taken anew after every ``gradients_every`` prunes), and 1 for a
    real neuron.

    ## Accuracy budget

    A prune that takes the accuracy on the defender's clean images more than ``accuracy_budget`` below its initial value is undone,
    its neuron is flagged as tried, and ``failure_cost`` is charged. With ``accuracy_budget=None`` nothing is undone: published
    rules run as published.

    ## Rewards

    - ``"acc"`` (default): fall of the suspected danger, minus twice the accuracy that the prune cost. The suspected danger is the
      smoothed share of clean images that get the suspected target when they bear the inverted trigger, a change of the image found
      from the BN statistics (``backdoor_gym.analysis.trigger_inversion``): the trigger itself is not needed.
    - ``"oracle"``: fall of the danger, (ASR + mean sigmoid of a quarter of the target margin) / 2, minus the same price of
      accuracy, of that on test images; a prune of a network known to be clean costs 0.05 instead. For models whose trigger is
      known.
    - a callable from ``reward.Transition`` to float.

    Each step but stop also costs ``step_cost``. Stopping at once scores 0.

    ## Starting state

    The whole network, nothing pruned: of several models one is drawn, or ``reset(options={"infected": NAME})`` picks it. Where a
    model is met for the first time, its graph is made and its trigger sought, which takes some seconds.

    ## Episode end

    *Terminated*: stop, ``max_failures`` prunes undone, or no neuron left to prune. *Truncated*: ``max_steps`` steps (by default as
    many as the network has neurons).

    ``copy.deepcopy`` or ``pickle`` in mid-episode gives an environment that goes on where this one was.

    ## Info

    ``acc`` (accuracy on the clean images), ``pruned`` (number of neurons pruned), ``neuron`` (name of what this step pruned, "" if
    nothing), ``undone`` (whether this step's prune was undone), ``infected`` (name of the model); ``test_acc`` where there are
    test images, and ``asr`` and ``ra`` where trigger and target are known too (see ``score_samples``).

    Examples:
        >>> import gymnasium as gym
        >>> env = gym.make("backdoor_gym:BackdoorPrune-v0")
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, terminated, truncated, info = env.step(54)
        >>> info["neuron"], info["pruned"], info["acc"]
        ('layer2.0.conv1[14]', 1, 0.98)

    ## Arguments

    Args:
        infected: name, pattern (``digits-train/*``), file, ``InfectedModel``, or a list of them; one is drawn at each reset.
        reward: "acc", "oracle" or a callable.
        accuracy_budget: tolerated loss of clean accuracy, or None.
        max_steps: steps until truncation, or None for the number of neurons.
        max_failures: undone prunes that end the episode.
        step_cost: charged for each step but stop.
        failure_cost: charged for an undone prune.
        residual: "channel", or "group" to prune neurons that share a residual sum together.
        connections: strongest inputs of each neuron that are edges.
        similar: similarity links of each neuron that are edges.
        gradients_every: prunes after which the derivatives among the features are taken anew.
        max_units: N, None for that of the largest network; environments that are stepped as one vector need the same.
        clean_samples: how many clean images the defender uses, None for all there are.
        score_samples: how many triggered test images ASR and RA are measured on, and half of how many clean ones the accuracy on
            test images; 0 switches them off.
        data: data set to read the images of model files from, instead of the one they name.
        device: where the network runs.
        render_mode: "human", "rgb_array", "ansi" or None.
        fill: what a pruned neuron gives: "zero", or "mean" for its mean over the clean images (``backdoor_gym.masking.fill``).
        guard: what the budget is of: "count", the accuracy on the clean images; or "held-out", what is expected to be lost on
            other images, by one half of the clean ones, while the other half chooses (``RepairSession``).

    ## Version history

    - v0: first version.
    """  # noqa: E501 (tables)

    metadata: dict[str, Any] = {"render_modes": RENDER_MODES, "render_fps": 4}  # noqa: RUF012 (declared so by gym.Env)

    def __init__(
        self,
        infected: Infected = DEFAULT_INFECTED,
        reward: str | Reward = "acc",
        accuracy_budget: float | None = 0.02,
        max_steps: int | None = None,
        max_failures: int = 5,
        step_cost: float = 0.002,
        failure_cost: float = 0.02,
        residual: str = "channel",
        connections: int = 4,
        similar: int = 4,
        gradients_every: int = 4,
        max_units: int | None = None,
        clean_samples: int | None = None,
        score_samples: int = SCORE_SAMPLES,
        data: str | None = None,
        device: str = "cpu",
        render_mode: str | None = None,
        fill: str = "zero",
        guard: str = COUNT,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        EzPickle.__init__(self, **options)
        check_arguments(options)
        self._options = {key: options[key] for key in options.keys() - {"reward", "score_samples", "render_mode"}}
        self.guard = guard
        self._accuracy_budget = accuracy_budget
        self.max_steps, self.max_failures = max_steps, max_failures
        self.step_cost, self.failure_cost = step_cost, failure_cost
        self.gradients_every, self.score_samples = gradients_every, score_samples
        self.render_mode = render_mode
        self._reward = make_reward(reward)
        self.generator = InfectedGenerator(
            infected, Preparation(residual, connections, similar, clean_samples, device, fill), data
        )
        self._observer = ObservationBuilder(max_units or self.generator.max_units(), connections, similar)
        self.observation_space = self._observer.space  # type: ignore[assignment]
        self.action_space = spaces.Discrete(self._observer.max_units + 1)
        self.stop_action = self._observer.max_units
        self._viewer: Viewer | None = None
        self._session: RepairSession | None = None
        self._given: dict[str, np.ndarray] | None = None
        self._trigger: InvertedTrigger | None = None
        self._steps, self._over = 0, False

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, and where the episode is. What was made ready of a model, the copy takes or makes where it is."""
        session = self._session
        carried = {key: value for key, value in self.__dict__.items() if key not in _MADE_ANEW}
        return {**carried, "repair": None if session is None else (session.state, session.is_open)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        repair = state["repair"]
        EzPickle.__setstate__(self, state)
        self.__dict__.update({key: value for key, value in state.items() if key != "repair"})
        if repair is not None:
            prepared = self._model_of_episode()
            if self._trigger is not None:
                prepared = prepared.under(self._trigger)
            self._session = self._new_session(prepared, repair[0])
            if repair[1]:
                self._session.reopen()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; ``options={"infected": NAME}`` picks the model.

        One that cannot begin leaves the episode before it as it was.

        Raises:
            UnknownNameError: no such option or model.
            DataError: an option of a wrong type, or a model that does not fit the spaces.
        """
        asked_for = infected_option(options)
        random, random_seed = self._np_random, self._np_random_seed
        random_state: Any = None if random is None else random.bit_generator.state
        try:
            super().reset(seed=seed)
            drawn_from = self.np_random.bit_generator.state
            prepared = self.generator.draw(self.np_random) if asked_for is None else self.generator.get(asked_for)
            self._session = self._begin(prepared)
        except BaseException:
            self._np_random, self._np_random_seed = random, random_seed
            if random is not None:
                random.bit_generator.state = random_state
            raise
        self._asked_for, self._drawn_from, self._trigger = asked_for, drawn_from, None
        self._steps, self._over = 0, False
        if self.render_mode == "human":
            self.render()
        return self.observe(), self.info()

    def step(self, action: np.int64 | int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Prune a neuron or stop.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun, or it is over.
            gymnasium.error.InvalidAction: none of the action space, whatever it is; the episode goes on without it.
        """
        self.check_step(action)
        unit, session = int(action), self.session
        stop = unit == self.stop_action
        nothing: tuple[float, int | None, bool] = 0.0 if stop else -self.step_cost, None, False
        reward, pruned, undone = self.prune_unit(unit) if unit < len(session.prepared) else nothing
        self._steps += 1
        terminated = stop or session.exhausted
        truncated = not terminated and self._steps >= self.step_limit
        self._over = terminated or truncated
        if self.render_mode == "human":
            self.render()
        return self.observe(), reward, terminated, truncated, self.info(pruned, undone)

    def check_step(self, action: Any) -> None:
        """Raise what ``step`` does of an action that it cannot take."""
        if not self.session.is_open:
            raise gym.error.ResetNeeded(_RESET)
        if self._over:
            raise gym.error.ResetNeeded(_OVER)
        if isinstance(action, bool) or not self.action_space.contains(action):
            raise gym.error.InvalidAction(f"the action {shown(action)} is none of 0 to {self.stop_action}")

    def prune_unit(self, unit: int) -> tuple[float, int | None, bool]:
        """Prune a unit without a step, for environments that prune several in one.

        Returns:
            The reward with its costs, the unit that is pruned now or None, and whether one was undone.

        Raises:
            DataError: no number of a unit, or a reward function that gives no finite number.
        """
        attempt = self.session.try_prune(unit, self.worth)
        reward = attempt.worth - self.step_cost - (self.failure_cost if attempt.undone else 0.0)
        return reward, unit if attempt.pruned else None, attempt.undone

    @property
    def session(self) -> RepairSession:
        """The repair of this episode; raises ``gymnasium.error.ResetNeeded`` where none has begun."""
        if self._session is None:
            raise gym.error.ResetNeeded(_RESET)
        return self._session

    @property
    def accuracy_budget(self) -> float | None:
        """Tolerated loss of clean accuracy; it may be set, also in the middle of an episode."""
        return self._accuracy_budget

    @accuracy_budget.setter
    def accuracy_budget(self, budget: float | None) -> None:
        self._accuracy_budget = budget
        if self._session is not None:
            self._session.accuracy_budget = budget

    @property
    def step_limit(self) -> int:
        """Steps after which this episode is truncated."""
        return self.max_steps or len(self.session.prepared)

    @property
    def steps_left(self) -> float:
        """The share of them that is left."""
        return max(0.0, 1 - self._steps / self.step_limit)

    def spec_options(self) -> dict[str, Any]:
        """The arguments that another environment of the same networks is made with, without reward, scoring and drawing."""
        return {**self._options, "accuracy_budget": self.accuracy_budget, "max_steps": self.max_steps}

    def action_masks(self) -> np.ndarray:
        """The legal actions, bool (N + 1,), as MaskablePPO asks for them."""
        masks = np.zeros(self.stop_action + 1, dtype=bool)
        open_units = self.session.open_units
        masks[: len(open_units)] = open_units
        masks[self.stop_action] = True
        return masks

    def consult(self, function: Callable[[RepairSession], Any]) -> Any:
        """A function of the repair, for policies that need more than the observation.

        It is computed where the environment is, which may be another process.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun, or the environment was closed.
        """
        check_callable("function", function)
        if not self.session.is_open:
            raise gym.error.ResetNeeded(_RESET)
        return function(self.session)

    def observe(self) -> dict[str, np.ndarray]:
        """The observation of the network as it is now."""
        session = self.session
        self._given = self._observer.observe(session, self.steps_left, self.action_masks())
        return self._given

    def gave(self, observation: Mapping[str, np.ndarray]) -> bool:
        """Whether an observation is the last that this environment gave: a policy that asks it more would mix up two networks.

        A wrapper may have changed the features of the neurons or the figures, but not both.
        """
        given = self._given
        if given is None or not isinstance(observation, Mapping) or not observation.keys() >= set(OBSERVED):
            return False
        count, nodes, figures = (np.array_equal(given[key], observation[key]) for key in OBSERVED)
        return count and (nodes or figures)

    def info(self, pruned: int | None = None, undone: bool = False) -> dict[str, Any]:
        """The info of the network as it is now, after a step that pruned or undid something."""
        session = self.session
        scored = {key: getattr(session.figures, key) for key in ("acc", "asr", "ra", "test_acc")}
        return {
            **{key: value for key, value in scored.items() if value is not None},
            "pruned": int(session.state.pruned.sum()),
            "neuron": "" if pruned is None else session.prepared.unit_names[pruned],
            "undone": undone,
            "infected": session.prepared.name,
        }

    def render(self) -> Any:
        """An RGB array, a text, or None after showing a window, as ``render_mode`` says."""
        if self.render_mode is None:
            gym.logger.warn('render() does nothing without a render_mode; pass render_mode="rgb_array" to gym.make')
            return None
        self._viewer = self._viewer or Viewer(self.metadata["render_fps"])
        return self._viewer.render(Snapshot.of(self.session), self.render_mode)

    def close(self) -> None:
        """Close the window and give back memory."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        if self._session is not None:
            self._session.close()

    def worth(self, transition: Transition) -> float:
        """What the reward function says of a prune; ``DataError`` where it is no finite number."""
        return self._reward(transition)

    def _new_session(self, prepared: PreparedModel, state: Any = None) -> RepairSession:
        return RepairSession(
            prepared,
            self.accuracy_budget,
            self.max_failures,
            self.score_samples,
            self.gradients_every,
            state,
            self.guard,
        )

    def look_again(self, inverted: InvertedTrigger) -> dict[str, np.ndarray]:
        """Go on with the repair under another inverted trigger, also where the episode was over; the observation."""
        self._trigger = inverted
        self._session = self.session.under(inverted)
        self._over = False
        return self.observe()

    def _model_of_episode(self) -> PreparedModel:
        if self._asked_for is not None:
            return self.generator.get(self._asked_for)
        random = deepcopy(self.np_random)
        random.bit_generator.state = self._drawn_from
        return self.generator.draw(random)

    def _begin(self, prepared: PreparedModel) -> RepairSession:
        """The repair of an episode, with what is kept of the last one where the model is the same."""
        self._observer.check_room(prepared)
        before = self._session
        if before is not None and before.is_open and before.prepared is prepared:
            before.restart()
            return before
        prepared.prepare()
        was_open = before is not None and before.is_open
        if before is not None:
            before.close()  # its activations go before the next ones come
        try:
            return self._new_session(prepared)
        except BaseException:
            if before is not None and was_open:
                before.reopen()
            raise
