"""Policies by name, built for the environment that they act in."""

from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym

from .arguments import check_kind, check_whole
from .envs.prune import BackdoorPruneEnv
from .errors import DataError, check_name

#: The options of each policy.
POLICIES: dict[str, tuple[str, ...]] = {
    "onp": ("look_ahead", "finetune", "seed"),
    "clp": ("u",),
    "bnp": ("threshold",),
    "ep": ("threshold",),
    "anp": ("threshold", "seed", "steps"),
    "rnp": ("threshold", "seed"),
    "fine-pruning": ("threshold",),
    "magnitude": ("threshold",),
    "greedy": ("candidates",),
    "random": ("seed",),
}
#: Clean accuracy that each may lose by default; None is no guard, as a rule with a threshold was published.
BUDGETS: dict[str, float | None] = {
    **dict.fromkeys(POLICIES, 0.02),
    "onp": 0.01,
    **dict.fromkeys(("clp", "bnp", "ep", "anp"), None),
}
#: A file of a policy that ``ONP.save`` wrote is named by its path.
SUFFIX = ".safetensors"


class PredictingPolicy(Protocol):
    """Anything with the ``predict`` of Stable-Baselines3."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Action and state."""


def finish(policy: Any, env: gym.Env[Any, Any]) -> float:
    """Let a policy with a method ``finish(env)`` do what it does when an episode is over; the reward of it.

    ONP gives back there what need not have been pruned; other policies end with the episode.
    """
    method = getattr(policy, "finish", None)
    return 0.0 if method is None else float(method(env.unwrapped))


def check_policy(name: str, options: dict[str, Any]) -> None:
    """Find out before the work that a name or an option is unknown.

    Raises:
        UnknownNameError: no such policy, or it has no such option.
        DataError: an unusable option.
    """
    kind = kind_of_policy(name)
    for option in options:
        owners = [known for known, takes in POLICIES.items() if option in takes]
        hint = f"{option} is an option of {', '.join(owners)}" if owners else ""
        check_name(f"option of {kind}", option, POLICIES[kind], hint)
    for option, least in (("finetune", 0), ("steps", 1), ("candidates", 1), ("seed", 0)):
        check_whole(option, options.get(option, least), least)
    check_kind("look_ahead", options.get("look_ahead", True), bool, "True or False")


def kind_of_policy(name: str) -> str:
    """The name itself, or "onp" for a policy file.

    Raises:
        UnknownNameError: no such policy.
    """
    if isinstance(name, str) and is_onp(name):
        return "onp"
    check_name("policy", name, POLICIES, "or the path of a policy file, *.safetensors")
    return name


def is_onp(name: str) -> bool:
    """Whether a repair's policy is the learned one, that comes with the package or out of a file."""
    return name == "onp" or name.endswith(SUFFIX)


def make_policy(name: str, env: BackdoorPruneEnv, options: dict[str, Any]) -> PredictingPolicy:
    """The policy of that name, or of that file, for that environment.

    Raises:
        UnknownNameError: no such policy, or it has no such option.
        ModelFileError: an unreadable policy file.
    """
    from .baselines import ANP, BNP, CLP, EP, RNP, FinePruning, GreedyACC, Magnitude, RandomPolicy, Rule
    from .baselines.rule import ACCURACY_BUDGET

    check_policy(name, options)
    if name == "random":
        return RandomPolicy(**options)
    if name == "greedy":
        return GreedyACC(env, **options)
    budget = ACCURACY_BUDGET if env.accuracy_budget is None else env.accuracy_budget
    if name == "clp":
        return CLP(options.get("u", CLP.published), env, budget)
    rules: dict[str, type[Rule]] = {
        "bnp": BNP,
        "ep": EP,
        "anp": ANP,
        "rnp": RNP,
        "fine-pruning": FinePruning,
        "magnitude": Magnitude,
    }
    if name in rules:
        return rules[name](env, accuracy_budget=budget, **options)
    return _make_onp(name, env, **options)


def _make_onp(
    name: str, env: BackdoorPruneEnv, look_ahead: bool = True, finetune: int = 0, seed: int = 0
) -> PredictingPolicy:
    from .agents import ONP
    from .agents.finetuning import learn_alone
    from .agents.layers import PER_LAYER, LayerPolicy

    onp = ONP.load(Path(name) if name.endswith(SUFFIX) else "pretrained", env, seed=seed)
    if onp.facts.get(PER_LAYER):
        if finetune:
            raise DataError(f"{name} is shared by agents of layers; finetune is for policies of the whole network")
        return LayerPolicy(onp, env)
    if finetune:
        learn_alone(onp, env, finetune)
    if not look_ahead:
        onp.look_ahead = None
    return onp
