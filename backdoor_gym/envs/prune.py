"""BackdoorPrune-v0: prune the backdoor out of an infected network, one neuron a step."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle

from ..arguments import check_callable, check_kind, check_path, check_real, check_whole
from ..devices import find_device
from ..errors import DataError, UnknownNameError, check_name
from ..masking.masked import PRECISIONS
from ..neurons.finding import RESIDUAL_MODES
from ..rendering.drawing import Snapshot
from ..rendering.viewer import Viewer
from ..session.defender import Defender
from ..session.generator import Infected, InfectedGenerator
from ..session.masked_model import SCORE_SAMPLES, Figures, MaskedVictim
from ..session.prepared_model import Slopes, Victim, VictimOptions
from ..wording import shown
from .observation import ObservationBuilder, Progress
from .reward import Reward, Transition, make_reward

DEFAULT_INFECTED = "digits-badnets"
#: Slack in comparing accuracies, which are shares of a few hundred images.
TOLERANCE = 1e-9
#: Units, strongest inputs (or similar neurons) of each, and edges that the observation may have room for: it is always full size.
MOST_UNITS, MOST_LINKS, MOST_EDGES = 1 << 20, 1 << 10, 1 << 24
_RESET = "call reset() before anything else"
_OVER = "the episode is over: call reset() before another step"
#: By which keys ``gave`` knows an observation.
OBSERVED = ("num_nodes", "nodes", "globals")
#: What a copy makes anew, or takes from the models that are ready, instead of carrying it.
_MADE_ANEW = ("generator", "_observer", "observation_space", "_reward", "_viewer", "_victim", "_masked")


class RenderModes(list[str]):
    """Render modes. ``gymnasium.make`` asks whether one is among them, and takes it for a text before anything else sees it."""

    def __contains__(self, mode: object) -> bool:
        if not isinstance(mode, str):
            raise UnknownNameError("render mode", mode, self)
        return super().__contains__(mode)


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt to prune.

    Attributes:
        reward: of it, with its costs.
        pruned: the unit that was pruned, None if none was.
        undone: whether it was pruned and undone, as it broke the accuracy budget.
    """

    reward: float
    pruned: int | None = None
    undone: bool = False


class BackdoorPruneEnv(gym.Env[dict[str, np.ndarray], np.int64], EzPickle):
    """Prune the backdoor out of an infected network, one neuron a step, without losing clean accuracy.

    ## Description

    A defender holds a network that answers an attacker's label whenever an image bears a trigger. The defender has a
    few clean images and neither the trigger nor the label. Each step prunes one neuron of the network (see
    ``backdoor_gym.neurons.finding`` for what a neuron is) or ends the repair. After CLP (Zheng et al., ECCV 2022) and
    ONP (2024).

    ## Action space

    ``Discrete(N + 1)``: prune neuron i in network order, or stop (the last action). N is the number of neurons of the
    network, or of the largest one where several may be met. An action that is not legal (a neuron already
    pruned, tried and undone, or padding) changes nothing, costs the step penalty and counts as a step.
    ``env.unwrapped.action_masks()`` gives the legal actions, bool (N + 1,).

    ## Observation space

    A ``Dict`` of arrays of fixed shape; rows from ``num_nodes`` or ``num_edges`` on are padding (zeros).

    | key | dtype | shape | meaning |
    |---|---|---|---|
    | ``nodes`` | float32 | (N, 17) | features of each neuron, ``observation.NODE_FEATURES``; the static ones are defined in ``backdoor_gym.analysis.features`` |
    | ``edges`` | float32 | (E, 2) | strength in [0, 1]; 1 for a similarity link, 0 for a connection |
    | ``edge_links`` | int64 | (E, 2) | from which neuron to which |
    | ``num_nodes``, ``num_edges`` | int64 | (1,) | how many of them are real |
    | ``action_mask`` | int8 | (N + 1,) | 1 where the action is legal; stop always is |
    | ``globals`` | float32 | (12,) | accuracy, its drop, rise of the clean loss, accuracy budget (1 if none), shares of neurons pruned, steps left, failures left; suspected danger and its fall; 2 + log10 of the shift of BN means towards the suspected target (``backdoor_gym.analysis.suspected_target``); error and evidence of the inverted trigger (``backdoor_gym.analysis.trigger_inversion``); clamped to +-6 |

    The trigger never reaches the observation. The dynamic node features are: pruned, tried (pruned and undone), share
    of the layer that is pruned, ``pull_now``, ``harm_now`` and ``clean_pull_now`` (what pruning the neuron would take
    from the suspected target's margin under the inverted trigger, add to the clean loss, and take from that margin on
    the clean images as they are, to first order, each in standard deviations over the network; taken anew after every
    ``slopes_every`` prunes), and 1 for a real neuron.

    ## Accuracy budget

    A prune that takes the accuracy on the defender's clean images more than ``accuracy_budget`` below its initial value
    is undone, its neuron is flagged as tried, and ``failure_cost`` is charged. With ``accuracy_budget=None`` nothing is
    undone: published rules run as published.

    ## Rewards

    - ``"acc"`` (default): fall of the suspected danger, minus twice the accuracy that the prune cost. The suspected
      danger is the smoothed share of clean images that get the suspected target when they bear the inverted trigger, a
      change of the image found from the BN statistics (``backdoor_gym.analysis.trigger_inversion``): the trigger itself is
      not needed.
    - ``"oracle"``: fall of the danger, (ASR + mean sigmoid of a quarter of the target margin) / 2, minus the same price
      of accuracy, of that on test images; a prune of a network known to be clean costs 0.05 instead. For models whose
      trigger is known.
    - a callable from ``reward.Transition`` to float.

    Each step but stop also costs ``step_cost``. Stopping at once scores 0.

    ## Starting state

    The whole network, nothing pruned: of several models one is drawn, or ``reset(options={"infected": NAME})`` picks it.
    Where a model is met for the first time, its graph is made and its trigger sought, which takes some seconds.

    ## Episode end

    *Terminated*: stop, ``max_failures`` prunes undone, or no neuron left to prune. *Truncated*: ``max_steps`` steps (by
    default as many as the network has neurons).

    ``copy.deepcopy`` or ``pickle`` in mid-episode gives an environment that goes on where this one was.

    ## Info

    ``acc`` (accuracy on the clean images), ``pruned`` (number of neurons pruned), ``neuron`` (name of what this step
    pruned, "" if nothing), ``undone`` (whether this step's prune was undone), ``infected`` (name of the model);
    ``test_acc`` where there are test images, and ``asr`` and ``ra`` where trigger and target are known too (see
    ``score_samples``).

    ## Arguments

    Args:
        infected: name, pattern (``digits-train/*``), file, ``InfectedModel``, or a list of them; one is drawn at each
            reset.
        reward: "acc", "oracle" or a callable.
        accuracy_budget: tolerated loss of clean accuracy, or None.
        max_steps: steps until truncation, or None for the number of neurons.
        max_failures: undone prunes that end the episode.
        step_cost: charged for each step but stop.
        failure_cost: charged for an undone prune.
        residual: "channel", or "group" to prune neurons that share a residual sum together.
        connections: strongest inputs of each neuron that are edges.
        similar: similarity links of each neuron that are edges.
        slopes_every: prunes after which the derivatives among the features are taken anew.
        max_units: N, None for that of the largest network of ``infected``. Environments that are stepped together as one
            vector need the same.
        clean_samples: how many clean images the defender uses, None for all there are.
        score_samples: how many triggered test images ASR and RA are measured on, and half of how many clean ones the
            accuracy on test images; 0 switches them off.
        data: data set to read the images of model files from, instead of the one they name.
        device: where the network runs.
        precision: "float32", or "bfloat16" for masked evaluations in less time where the processor has it: answers that hang
            on rounding are computed again, so that accuracies are those of float32; danger, loss and derivatives are rounded
            (those of the whole network, which an episode begins with, are not).
        render_mode: "human", "rgb_array", "ansi" or None.

    ## Version history

    - v0: first version.
    """  # noqa: E501 (tables)

    metadata: dict[str, Any] = {  # noqa: RUF012 (declared so by gym.Env)
        "render_modes": RenderModes(("human", "rgb_array", "ansi")),
        "render_fps": 4,
    }

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
        slopes_every: int = 4,
        max_units: int | None = None,
        clean_samples: int | None = None,
        score_samples: int = SCORE_SAMPLES,
        data: str | None = None,
        device: str = "cpu",
        precision: str = "float32",
        render_mode: str | None = None,
    ) -> None:
        EzPickle.__init__(
            self, infected, reward, accuracy_budget, max_steps, max_failures, step_cost, failure_cost, residual,
            connections, similar, slopes_every, max_units, clean_samples, score_samples, data, device, precision,
            render_mode,
        )  # fmt: skip
        if render_mode is not None:
            check_name("render mode", render_mode, self.metadata["render_modes"])
        self._options = {
            "infected": infected, "accuracy_budget": accuracy_budget, "max_steps": max_steps, "max_failures": max_failures,
            "step_cost": step_cost, "failure_cost": failure_cost, "residual": residual, "connections": connections,
            "similar": similar, "slopes_every": slopes_every, "max_units": max_units,
            "clean_samples": clean_samples, "data": data, "device": device, "precision": precision,
        }  # fmt: skip
        _check({**self._options, "score_samples": score_samples})
        self.accuracy_budget = accuracy_budget
        self.max_steps = max_steps
        self.max_failures = max_failures
        self.step_cost = step_cost
        self.failure_cost = failure_cost
        self.render_mode = render_mode
        self.slopes_every = slopes_every
        self.precision = precision
        self.score_samples = score_samples
        self._reward = make_reward(reward)
        self.generator = InfectedGenerator(
            infected, VictimOptions(residual, connections, similar, clean_samples, device), data
        )
        self._observer = ObservationBuilder(max_units or self.generator.max_units(), connections, similar)
        self.observation_space = self._observer.space  # type: ignore[assignment]
        self.action_space = spaces.Discrete(self._observer.max_units + 1)
        self.stop_action = self._observer.max_units
        self._viewer: Viewer | None = None
        self._victim: Victim | None = None
        self._masked: MaskedVictim | None = None
        self._given: dict[str, np.ndarray] | None = None
        self._over = False

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, and where the episode is: a copy or pickle in mid-episode goes on where it was.

        What was made ready of a model is left out: of a name or a file the copy takes what its process has ready, and that
        of an ``InfectedModel`` is made again.
        """
        carried = {key: value for key, value in self.__dict__.items() if key not in _MADE_ANEW}
        return {**carried, "under_way": (self._victim is not None, self._masked is not None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        begun, open_ = state["under_way"]
        EzPickle.__setstate__(self, state)
        self.__dict__.update({key: value for key, value in state.items() if key != "under_way"})
        if begun:
            self._victim = self._victim_of_episode()
        if open_:
            self._masked = self._masked_again(self.victim)

    def _victim_of_episode(self) -> Victim:
        if self._asked_for is not None:
            return self.generator.get(self._asked_for)
        random = deepcopy(self.np_random)
        random.bit_generator.state = self._drawn_from
        return self.generator.draw(random)

    def _masked_again(self, victim: Victim) -> MaskedVictim:
        """The network as the episode has left it, changed in the same order: so its activations are the same to the last bit."""
        victim.prepare()
        masked = MaskedVictim.begin(victim, self.score_samples, self.precision)
        pruned = np.zeros(len(victim), dtype=bool)
        for unit, given_back in self._changes:
            pruned[unit] = not given_back
            masked.figures(pruned)
            masked.keep()
        return masked

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; ``options={"infected": NAME}`` picks the model.

        One that cannot begin leaves the episode before it as it was.

        Raises:
            UnknownNameError: no such option or model.
            DataError: an option of a wrong type, or a model that does not fit the spaces.
        """
        asked_for = self._option(options)
        random, random_seed = self._np_random, self._np_random_seed
        random_state: Any = None if random is None else random.bit_generator.state
        try:
            super().reset(seed=seed)
            drawn_from = self.np_random.bit_generator.state
            victim = self.generator.draw(self.np_random) if asked_for is None else self.generator.get(asked_for)
            masked = self._begin(victim)
        except BaseException:
            self._np_random, self._np_random_seed = random, random_seed
            if random is not None:
                random.bit_generator.state = random_state
            raise
        masked.restart()
        self._masked, self._victim, self._over = masked, victim, False
        self._asked_for, self._drawn_from = asked_for, drawn_from
        self._pruned = np.zeros(len(victim), dtype=bool)
        self._tried = np.zeros(len(victim), dtype=bool)
        self._too_dear = np.zeros(len(victim), dtype=bool)
        self._initial = self._current = self._masked.figures(self._pruned)
        self._steps = 0
        self._failures = 0
        self._history = [self._current]
        self._changes: list[tuple[int, bool]] = []
        self._given_back = 0
        self._slopes, self._slopes_taken = victim.first_slopes, 0
        if self.render_mode == "human":
            self.render()
        return self.observe(), self._info(None, False)

    def step(self, action: np.int64 | int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Prune a neuron or stop.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun, or it is over.
            gymnasium.error.InvalidAction: none of the action space, whatever it is; the episode goes on without it.
        """
        self.check_step(action)
        unit = int(action)
        stop = unit == self.stop_action
        outcome = Outcome(0.0) if stop else self.try_unit(unit)
        self._steps += 1
        terminated = stop or self.exhausted
        truncated = not terminated and self._steps >= self.step_limit
        self._over = terminated or truncated
        if self.render_mode == "human":
            self.render()
        return self.observe(), outcome.reward, terminated, truncated, self._info(outcome.pruned, outcome.undone)

    def check_step(self, action: Any) -> None:
        """Raise what ``step`` does of an action that it cannot take."""
        if self._victim is None:
            raise gym.error.ResetNeeded(_RESET)
        if self._over:
            raise gym.error.ResetNeeded(_OVER)
        if isinstance(action, bool) or not self.action_space.contains(action):
            raise gym.error.InvalidAction(f"the action {shown(action)} is none of 0 to {self.stop_action}")

    def try_unit(self, unit: int) -> Outcome:
        """What an action but stop does to the network, without the step that it is.

        For environments that are built on this one, and prune several units in a step.

        Raises:
            DataError: no number of a unit, or a reward function that gives no finite number.
        """
        victim, reward = self.victim, -self.step_cost
        check_whole("unit", unit)
        if unit >= len(victim) or self._pruned[unit] or self._tried[unit]:
            return Outcome(reward)
        if self.clean_also([unit]) is None:
            self._tried[unit] = True
            self._failures += 1
            return Outcome(reward - self.failure_cost, undone=True)
        figures = self.masked_victim.figures(self._with([unit]))
        reward += self._rewarded(Transition(victim, unit, self._current, figures))
        self._pruned[unit] = True
        self._changes.append((unit, False))
        self._current = figures
        self._history.append(figures)
        self.masked_victim.keep()
        return Outcome(reward, unit)

    @property
    def exhausted(self) -> bool:
        """Whether too many prunes were undone, or no unit is left to prune."""
        self._check_begun()
        return self._failures >= self.max_failures or bool((self._pruned | self._tried).all())

    @property
    def victim(self) -> Victim:
        """The model of this episode.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun.
        """
        if self._victim is None:
            raise gym.error.ResetNeeded(_RESET)
        return self._victim

    @property
    def masked_victim(self) -> MaskedVictim:
        """The same without what is pruned.

        Raises:
            gymnasium.error.ResetNeeded: no episode has begun, or the environment was closed.
        """
        if self._masked is None:
            raise gym.error.ResetNeeded(_RESET)
        return self._masked

    @property
    def pass_bytes(self) -> int:
        """``MaskedVictim.pass_bytes`` of the model of this episode, 0 before the first one."""
        return 0 if self._masked is None else self._masked.pass_bytes

    def spec_options(self) -> dict[str, Any]:
        """The arguments that another environment of the same networks is made with, without reward, scoring and drawing."""
        return {**self._options, "accuracy_budget": self.accuracy_budget, "max_steps": self.max_steps}

    @property
    def step_limit(self) -> int:
        """Steps after which this episode is truncated."""
        return self.max_steps or len(self.victim)

    @property
    def figures(self) -> Figures:
        """Figures of the network as it is now; for learning on models of one's own, since it may tell ASR and danger."""
        self._check_begun()
        return self._current

    @property
    def initial_figures(self) -> Figures:
        """Those of the whole network."""
        self._check_begun()
        return self._initial

    @property
    def pruned(self) -> np.ndarray:
        """Units pruned so far, bool (units,), a copy."""
        self._check_begun()
        return self._pruned.copy()

    @property
    def changes(self) -> list[tuple[int, bool]]:
        """What was done to the network, in order: the unit, and whether it was given back instead of pruned."""
        self._check_begun()
        return list(self._changes)

    def action_masks(self) -> np.ndarray:
        """The legal actions, bool (N + 1,), as MaskablePPO asks for them."""
        count = len(self.victim)
        masks = np.zeros(self.stop_action + 1, dtype=bool)
        masks[:count] = ~(self._pruned | self._tried)
        masks[self.stop_action] = True
        return masks

    def consult(self, function: Callable[[Defender], Any]) -> Any:
        """A function of the network and the clean images, for policies that need more than the observation.

        It is computed where the environment is, which may be another process.
        """
        check_callable("function", function)
        return function(self.victim.defender)

    def evaluate_also(self, units: list[int] | np.ndarray) -> Figures:
        """Figures on the clean images with these units pruned too; the episode does not change.

        For policies that look ahead: what they may know, without ASR and RA.
        """
        return self.masked_victim.figures(self._with(units), score=False)

    def clean_also(self, units: list[int] | np.ndarray) -> tuple[float, float] | None:
        """Accuracy and cross-entropy on the clean images with these units pruned too; None where that breaks the budget.

        Cheaper than ``evaluate_also``, by far where the budget is broken. Of a single unit that is remembered:
        ``too_dear``.
        """
        found = self.masked_victim.clean(self._with(units), self.least_acc)
        if found is None and len(units) == 1:
            self._too_dear[units[0]] = True
        return found

    def too_dear(self) -> np.ndarray:
        """Units whose prune was seen to break the accuracy budget in this episode, bool (units,), a copy."""
        self._check_begun()
        return self._too_dear.copy()

    def suspect_also(self, units: list[int] | np.ndarray) -> float:
        """Suspected danger with these units pruned too, at a fraction of what ``evaluate_also`` costs."""
        return self.masked_victim.suspected_danger(self._with(units))

    def suspected_fall(self, prunes: int) -> float | None:
        """How far the suspected danger fell over the last so many prunes; None where there were not as many."""
        self._check_begun()
        check_whole("prunes", prunes)
        if len(self._history) <= prunes:
            return None
        return self._history[-1 - prunes].suspected_danger - self._current.suspected_danger

    @property
    def least_acc(self) -> float:
        """Accuracy on the clean images below which the budget is broken; 0 without one."""
        self._check_begun()
        return 0.0 if self.accuracy_budget is None else self._initial.acc - self.accuracy_budget - TOLERANCE

    def give_back(self, unit: int) -> float:
        """Undo the prune of one unit, when the episode is over; it is no action. What its prune earns now, with the sign turned.

        Raises:
            DataError: that unit is not pruned, or is no number.
        """
        count = len(self.victim)
        check_kind("unit", unit, Integral, "a whole number")
        if not 0 <= unit < count or not self._pruned[unit]:
            raise DataError(f"unit {shown(unit)} of {self.victim.name} cannot be given back: it is not pruned")
        left = self._pruned.copy()
        left[unit] = False
        figures = self.masked_victim.figures(left)
        reward = self._rewarded(Transition(self.victim, unit, figures, self._current))
        self._pruned, self._current = left, figures
        self._changes.append((unit, True))
        self.masked_victim.keep()
        self._history.append(figures)
        self._given_back += 1
        return -reward

    def info(self) -> dict[str, Any]:
        """The info of the network as it is now."""
        return self._info(None, False)

    def render(self) -> Any:
        """An RGB array, a text, or None after showing a window, as ``render_mode`` says."""
        if self.render_mode is None:
            gym.logger.warn('render() does nothing without a render_mode; pass render_mode="rgb_array" to gym.make')
            return None
        self._viewer = self._viewer or Viewer(self.metadata["render_fps"])
        return self._viewer.render(self.snapshot(), self.render_mode)

    def close(self) -> None:
        """Close the window and give back memory."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        self._masked = None

    def _with(self, units: list[int] | np.ndarray) -> np.ndarray:
        pruned = self._pruned.copy()
        try:
            chosen = np.asarray(units)
        except ValueError:  # lists of lists of several lengths
            chosen = np.array(None)
        if chosen.ndim != 1 or (chosen.size and not np.issubdtype(chosen.dtype, np.integer)):
            raise DataError(f"units must be a list of whole numbers, not {shown(units)}")
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(pruned):
            raise DataError(f"units must be of 0 to {len(pruned) - 1}, not {shown(units)}")
        pruned[chosen.astype(np.int64)] = True
        return pruned

    def _check_begun(self) -> None:
        if self._victim is None:
            raise gym.error.ResetNeeded(_RESET)

    def _option(self, options: Any) -> Any:
        """The model that ``reset`` is asked for, or None."""
        if options is not None and not isinstance(options, Mapping):
            raise DataError(f"the options of a reset must be a dict, not {shown(options)}")
        for option in options or {}:
            check_name("reset option", option, ("infected",))
        return None if options is None else options.get("infected")

    def _begin(self, victim: Victim) -> MaskedVictim:
        """The network of an episode, with what is kept of the last one where it is the same."""
        if len(victim) > self._observer.max_units:
            raise DataError(
                f"{victim.name} has {len(victim)} neurons, and this environment's spaces have room for "
                f"{self._observer.max_units}; name it in infected= when the environment is made, or raise max_units"
            )
        before = None if self._masked is None else self._masked.victim
        if self._masked is not None and before is victim:
            return self._masked
        victim.prepare()
        self._masked = None  # its activations go before the next ones come
        try:
            return MaskedVictim.begin(victim, self.score_samples, self.precision)
        except BaseException:
            self._masked = None if before is None else self._masked_again(before)
            raise

    def _rewarded(self, transition: Transition) -> float:
        reward: Any = self._reward(transition)
        try:
            number = float(reward)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"a reward must be a finite number, not {shown(reward)}")
        return number

    def _slopes_now(self) -> Slopes:
        count = int(self._pruned.sum())
        if count - self._slopes_taken >= self.slopes_every:
            self._slopes, self._slopes_taken = self.masked_victim.slopes(self._pruned), count
        return self._slopes

    def observe(self) -> dict[str, np.ndarray]:
        """The observation of the network as it is now."""
        self._check_begun()
        progress = Progress(
            self._pruned,
            self._tried,
            self._initial,
            self._current,
            self.accuracy_budget,
            max(0.0, 1 - self._steps / self.step_limit),
            1 - self._failures / self.max_failures,
            self._slopes_now(),
        )
        self._given = self._observer.observe(self.victim, progress, self.action_masks())
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

    def _info(self, pruned: int | None, undone: bool) -> dict[str, Any]:
        self._check_begun()
        figures = {
            key: value for key, value in asdict(self._current).items() if key in ("acc", "asr", "ra", "test_acc")
        }
        return {
            **{key: value for key, value in figures.items() if value is not None},
            "pruned": int(self._pruned.sum()),
            "neuron": "" if pruned is None else self.victim.unit_names[pruned],
            "undone": undone,
            "infected": self.victim.name,
        }

    def snapshot(self) -> Snapshot:
        """What a drawing of the network needs."""
        victim = self.victim
        history, latest = self._history, np.zeros_like(self._pruned)
        if self._changes and not self._given_back:
            latest[self._changes[-1][0]] = True
        return Snapshot(
            name=victim.name,
            layers=tuple((layer.name, layer.size) for layer in victim.neurons.layers),
            suspicion=victim.suspicion,
            strengths=victim.strengths,
            pruned=~victim.neuron_mask(self._pruned),
            undone=~victim.neuron_mask(self._tried),
            latest=~victim.neuron_mask(latest),
            acc=tuple(figures.acc for figures in history),
            danger=() if victim.inverted is None else tuple(figures.suspected_danger for figures in history),
            asr=tuple(figures.asr for figures in history if figures.asr is not None),
            least_acc=None if self.accuracy_budget is None else self.least_acc,
            given_back=self._given_back,
        )


def _check(options: Mapping[str, Any]) -> None:
    """Raise ``DataError`` or ``UnknownNameError`` where an argument is of a wrong type or out of range."""
    check_real("accuracy_budget", options["accuracy_budget"], 0, 1, may_be_none=True)
    for name in ("step_cost", "failure_cost"):
        check_real(name, options[name])
    for name, least, most in (
        ("max_failures", 1, None),
        ("score_samples", 0, None),
        ("connections", 0, MOST_LINKS),
        ("similar", 0, MOST_LINKS),
        ("slopes_every", 1, None),
    ):
        check_whole(name, options[name], least, most)
    for name, most in (("max_steps", None), ("clean_samples", None), ("max_units", MOST_UNITS)):
        check_whole(name, options[name], 1, most, may_be_none=True)
    links = options["connections"] + options["similar"]
    if links == 0:
        raise DataError("connections and similar cannot both be 0: the graph would have no edge")
    if links * (options["max_units"] or 0) > MOST_EDGES:
        raise DataError(f"max_units times connections and similar may be {MOST_EDGES} edges at most")
    check_name("residual mode", options["residual"], RESIDUAL_MODES)
    check_name("precision", options["precision"], PRECISIONS)
    check_path("data", options["data"], may_be_none=True)
    find_device(options["device"])
